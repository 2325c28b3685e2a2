"""A new teacher's column from a few probe prompts, in closed form, on what the known teachers' heads say.

``s_m(x) = u(x)^T v_m + b_m`` with ``v_m = (U^T U + lambda I)^-1 U^T (r_m - b_m)``: u(x) are the predictions
for the known teachers, centred; their span is the low-dimensional picture of a prompt that training found.
UniRoute (arXiv 2502.08773) and EmbedLLM (arXiv 2410.02223) add teachers by the same idea.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Strongest first, so that among equals the one nearer to the constant is taken. In units of the probes' mean
# squared length; weaker ones than 1 lost on held-out prompts (docs/experiments.md).
L2_GRID = (math.inf, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
_MIN_TO_FIT = 3
"""With no more probes the column is a constant: bias and control take two of them."""
_NO_SPREAD = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """An affine combination of the known teachers' columns."""

    weight_M: FloatArray
    mean: float
    """Value where the known teachers' columns are at their means: the new teacher's mean over the training
    prompts, as far as the probes tell."""
    center_M: FloatArray
    """Those means."""
    l2: float
    """Infinity means zero weights: a constant column."""

    @property
    def bias(self) -> float:
        """Value where all known columns are 0."""
        return self.mean - float(self.weight_M @ self.center_M)


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """What K prompts say of a new teacher and of the M known ones."""

    known_KM: FloatArray
    """Predictions for the known teachers, by heads that did not see the prompt where there are such."""
    surprise_K: FloatArray
    """By how much the known teachers' targets lie above their predictions, their mean."""
    target_K: FloatArray
    """The new teacher's values."""
    center_M: FloatArray
    """The known teachers' means over the training prompts."""

    def rows(self, index: NDArray[np.int64]) -> "Probes":
        """Some of the probes."""
        return Probes(self.known_KM[index], self.surprise_K[index], self.target_K[index], self.center_M)


def fit_column(probes: Probes, l2: float | None = None) -> Column:
    """Ridge regression with a free bias; its L2 by leave-one-out in closed form, up to a constant column.

    An L2 has to beat the constant by a standard error.

    Two things keep the luck of which prompts were probed out of the mean. It is read off where the known
    columns are at their training means, not the probes'. And ``surprise_K``, whose mean over all prompts is
    0, is a control variate, a regressor without L2 that is left out again: where the known teachers did
    better than foretold, the new one often did too.

    Args:
        probes: At least one.
        l2: In units of the mean squared length of the centred rows of ``known_KM``; chosen if None.
    """
    n_probes, middle_M = len(probes.target_K), probes.known_KM.mean(axis=0)
    surprise_K = probes.surprise_K - probes.surprise_K.mean()
    length = float(np.linalg.norm(surprise_K))
    control_K = surprise_K / length if length > _NO_SPREAD else np.zeros(n_probes)
    known_KM, target_K = probes.known_KM - middle_M, probes.target_K - probes.target_K.mean()
    # What the control explains is taken out of both sides (Frisch and Waugh, 1933).
    free_KM = known_KM - np.outer(control_K, control_K @ known_KM)
    free_K = target_K - control_K * float(control_K @ target_K)
    # K x K, whatever the number of teachers: eigenvectors give the fit and the leave-one-out of every L2.
    squares_K, vectors_KK = np.linalg.eigh(free_KM @ free_KM.T)
    squares_K = np.maximum(squares_K, 0.0)
    unit = float(squares_K.sum()) / n_probes
    if n_probes <= _MIN_TO_FIT or unit <= _NO_SPREAD:
        l2 = math.inf
    elif l2 is None:
        taken_K = control_K**2 + 1.0 / n_probes
        errors_GK = np.stack(
            [_left_out(squares_K, vectors_KK, free_K, taken_K, step * unit) for step in L2_GRID]
        )
        l2 = L2_GRID[int(_cautious(errors_GK).argmin())]
    if math.isinf(l2):
        weight_M = np.zeros_like(middle_M)
    else:
        weight_M = free_KM.T @ (vectors_KK @ ((vectors_KK.T @ free_K) / (squares_K + l2 * unit)))
    # A slope from few probes is shrunk: it is there to lessen noise, not to add its own.
    trust = max(n_probes - _MIN_TO_FIT, 0) / n_probes
    slope = trust * float(control_K @ (target_K - known_KM @ weight_M)) / max(length, _NO_SPREAD)
    level = float(probes.target_K.mean()) - slope * float(probes.surprise_K.mean())
    return Column(weight_M, level + float(weight_M @ (probes.center_M - middle_M)), probes.center_M, l2)


def _left_out(
    squares_K: FloatArray, vectors_KK: FloatArray, free_K: FloatArray, taken_K: FloatArray, l2: float
) -> FloatArray:
    """Squared leave-one-out errors, K: residuals over one minus the leverage.

    Args:
        taken_K: Leverage of what has no L2: the bias and the control.
    """
    share_K = np.zeros_like(squares_K) if math.isinf(l2) else squares_K / (squares_K + l2)
    leverage_K = (vectors_KK**2) @ share_K + taken_K
    residual_K = free_K - vectors_KK @ (share_K * (vectors_KK.T @ free_K))
    # A probe whose control stands alone has leverage 1 and no say.
    return np.asarray((residual_K / np.maximum(1.0 - leverage_K, _NO_SPREAD)) ** 2)


def _cautious(errors_GK: FloatArray) -> FloatArray:
    """Mean errors, each with the standard error of its gain over the constant, the first of the grid.

    Twenty probes find a good L2 by luck: without this the column was worse than a mean (docs/experiments.md).
    """
    doubt_G = (errors_GK[0] - errors_GK).std(axis=1, ddof=1) / math.sqrt(errors_GK.shape[1])
    return np.asarray(errors_GK.mean(axis=1) + doubt_G)

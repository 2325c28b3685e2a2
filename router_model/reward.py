"""The reward of a response: quality and learnability on one scale, mixed; and the regret of a choice.

Equations (1) and (2) of PerSyn (arXiv 2510.10925). Both terms are normalised within a prompt, over its
teachers.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from router_model.errors import RouterError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Normalization = Literal["minmax", "zscore", "rank", "none"]


def normalize(values_NM: FloatArray, mask_NM: BoolArray, method: Normalization = "minmax") -> FloatArray:
    """Bring the values of each prompt to a common scale, over its present teachers.

    Args:
        values_NM: Raw values; what stands in masked cells does not matter.
        mask_NM: Which cells are present.
        method: ``minmax`` to [0, 1]; ``zscore`` to mean 0 and variance 1; ``rank`` to the mean rank, scaled
            to [0, 1]; ``none`` leaves the values as they are.

    Returns:
        NM, NaN in masked cells. A prompt whose present values are all equal gives 0.5 (``minmax``, ``rank``)
        or 0 (``zscore``): a constant cannot move the choice.
    """
    if method not in get_args(Normalization):
        raise RouterError(
            f"unknown normalization {method!r}: expected one of {list(get_args(Normalization))}"
        )
    if method == "none" or not mask_NM.size:
        return np.where(mask_NM, values_NM, np.nan)
    if method == "rank":
        return _rank(values_NM, mask_NM)
    low_N1 = np.where(mask_NM, values_NM, np.inf).min(axis=1, keepdims=True)
    high_N1 = np.where(mask_NM, values_NM, -np.inf).max(axis=1, keepdims=True)
    varies_N1 = high_N1 > low_N1
    low_N1, high_N1 = np.where(varies_N1, low_N1, 0.0), np.where(varies_N1, high_N1, 1.0)
    scaled_NM = (np.where(mask_NM & varies_N1, values_NM, low_N1) - low_N1) / (high_N1 - low_N1)
    if method == "minmax":
        return np.where(mask_NM, np.where(varies_N1, scaled_NM, 0.5), np.nan)
    # The z-score of the min-max value equals that of the raw value, and cannot overflow.
    n_N1 = np.maximum(mask_NM.sum(axis=1, keepdims=True), 1)
    centred_NM = np.where(mask_NM, scaled_NM - (scaled_NM * mask_NM).sum(axis=1, keepdims=True) / n_N1, 0.0)
    deviation_N1 = np.sqrt((centred_NM**2).sum(axis=1, keepdims=True) / n_N1)
    return np.where(mask_NM, centred_NM / np.where(varies_N1, deviation_N1, 1.0), np.nan)


def _rank(values_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """Mean rank among the present teachers, 0 for the lowest and 1 for the highest."""
    both_NMM = mask_NM[:, :, None] & mask_NM[:, None, :]
    below_NMM = both_NMM & (values_NM[:, :, None] > values_NM[:, None, :])
    equal_NMM = both_NMM & (values_NM[:, :, None] == values_NM[:, None, :])
    # Each present cell equals itself; that half is taken off again.
    rank_NM = below_NMM.sum(axis=2) + 0.5 * (equal_NMM.sum(axis=2) - 1)
    n_N1 = mask_NM.sum(axis=1, keepdims=True)
    scaled_NM = np.where(n_N1 > 1, rank_NM / np.maximum(n_N1 - 1, 1), 0.5)
    return np.where(mask_NM, scaled_NM, np.nan)


def mix_reward(
    quality_NM: FloatArray,
    learnability_NM: FloatArray | None,
    mask_NM: BoolArray,
    *,
    alpha: float,
    normalization: Normalization = "minmax",
) -> FloatArray:
    """Reward of each response, equation (2): ``r = (1 - alpha) * r_q + alpha * r_l``.

    Args:
        quality_NM: Quality, higher is better.
        learnability_NM: Closeness to the student, higher is closer; None if unknown.
        mask_NM: Which cells are present.
        alpha: Weight of learnability, in [0, 1].
        normalization: How both terms are brought to one scale within each prompt.

    Returns:
        NM, NaN in masked cells; in [0, 1] for ``minmax`` and ``rank``.

    Raises:
        RouterError: alpha is outside [0, 1], or above 0 without learnability.
    """
    if not 0.0 <= alpha <= 1.0:
        raise RouterError(
            f"alpha is {alpha}: expected a number between 0 (quality only) and 1 (learnability only)"
        )
    quality_part_NM = normalize(quality_NM, mask_NM, normalization)
    if alpha == 0.0:
        return quality_part_NM
    if learnability_NM is None:
        raise RouterError(
            f"alpha is {alpha} but the table has no learnability: "
            "score the responses under the student first, or train with alpha 0"
        )
    return (1.0 - alpha) * quality_part_NM + alpha * normalize(learnability_NM, mask_NM, normalization)


def all_equal(values_NM: FloatArray) -> bool:
    """Whether no prompt has two present values that differ. NaN where none is present."""
    lowest_N = np.where(np.isnan(values_NM), np.inf, values_NM).min(axis=1)
    highest_N = np.where(np.isnan(values_NM), -np.inf, values_NM).max(axis=1)
    return not (highest_N > lowest_N).any()


def best_present(values_NM: FloatArray, mask_NM: BoolArray) -> NDArray[np.int64]:
    """Column of the highest present value in each row; the first of equals. Rows need a present cell."""
    chosen_N: NDArray[np.int64] = np.argmax(np.where(mask_NM, values_NM, -np.inf), axis=1).astype(np.int64)
    return chosen_N


def regret(values_NM: FloatArray, rewards_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """Reward lost by following ``values_NM``: ``max_m r_m - r_c`` with ``c`` its highest present teacher.

    Returns:
        N, at least 0, in units of the reward. Each row needs a present cell.
    """
    rows_N = np.arange(len(rewards_NM))
    chosen_N = rewards_NM[rows_N, best_present(values_NM, mask_NM)]
    highest_N = np.where(mask_NM, rewards_NM, -np.inf).max(axis=1)
    return np.asarray(highest_N - chosen_N)

"""What a router says of prompts, and how it follows for an alpha: strengths, their spread, their meaning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from router_model.errors import StrategyError

FloatArray = NDArray[np.float64]
ALPHAS = tuple(tenth / 10 for tenth in range(11))
"""Where a router that serves any alpha is calibrated and judged."""
Mode = Literal["parts", "paper"]
"""``parts``: quality and learnability are predicted apart. ``paper``: one head on the mixed reward."""


@dataclass(frozen=True, slots=True)
class AlphaCalibration:
    """What cross-validation said of a router at one alpha."""

    alpha: float
    helps: bool
    """Whether the predictions beat the best single teacher; if not, its means are the strengths."""
    gain: float | None
    """Held-out reward above the best single teacher in hindsight; None without held-out prompts."""
    gain_se: float | None
    inverse_temperature: float
    """Logits per unit of predicted reward, by the pairwise log-loss of held-out predictions."""
    conformal_width: float | None
    """A teacher within this many logits of the strongest may be the best, by held-out prompts."""


@dataclass(frozen=True, slots=True, eq=False)
class TopDeviations:
    """By how much more often than over all prompts a teacher is predicted to be the best of this prompt."""

    alphas: tuple[float, ...]
    """Ascending; A of them."""
    values: FloatArray
    """``...AM``, on the scale of the reward."""

    def at(self, alpha: float) -> FloatArray:
        """Linear between the alphas, ``...M``."""
        above = int(np.searchsorted(self.alphas, alpha))
        high = min(above, len(self.alphas) - 1)
        low = max(min(above - 1, high), 0)
        width = self.alphas[high] - self.alphas[low]
        share = (alpha - self.alphas[low]) / width if width else 0.0
        return np.asarray((1.0 - share) * self.values[..., low, :] + share * self.values[..., high, :])


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Predicted parts of the reward, normalised within the prompt as in training."""

    quality: FloatArray
    learnability: FloatArray | None
    top: TopDeviations | None = None
    """None where the heads predict rewards alone."""

    def mixed(self, alpha: float) -> FloatArray:
        """``(1 - alpha) * quality + alpha * learnability``: rewards mix as their parts do."""
        if self.learnability is None or alpha == 0.0:
            return self.quality
        return (1.0 - alpha) * self.quality + alpha * self.learnability

    def strengths(self, alpha: float, means: FloatArray) -> FloatArray:
        """The teachers' mean rewards, moved by the mean of both predictions for the prompt, if there are two.

        Args:
            means: Mean rewards at this alpha; they broadcast against the parts.
        """
        if self.top is None:
            return self.mixed(alpha)
        return np.asarray(means + (self.mixed(alpha) - means + self.top.at(alpha)) / 2)


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """A router's view of B prompts and M teachers at one alpha."""

    alpha: float
    strengths_BM: FloatArray
    """Bradley-Terry logits, centred over the teachers."""
    expected_reward_BM: FloatArray
    """Mixed reward, on the normalised scale."""
    members_EBM: FloatArray
    """Strengths by each of E routers that were trained without one fold."""
    helps: bool
    conformal_width: float | None
    coverage: float | None


@dataclass(frozen=True, slots=True, eq=False)
class RouterOutput:
    """What the router says of B prompts and M teachers, in the order of the manifest."""

    mode: Mode
    alpha: float
    """The checkpoint's."""
    calibration: Sequence[AlphaCalibration]
    coverage: float | None
    parts: Parts
    """Each BM."""
    member_parts: Parts
    """Each EBM."""
    mean_parts: Parts
    """The teachers' means over the training prompts, each M: what counts where routing does not help."""
    member_means: Parts
    """Each EM."""
    fixed_BM: FloatArray | None
    """In ``paper`` mode, what its one head says."""
    member_fixed_EBM: FloatArray | None
    quality_BM: FloatArray
    """On the raw scale of the table."""
    learnability_BM: FloatArray
    """On the scale of the measure, nats per token for log-probabilities; NaN if trained without."""
    input_tokens_B: NDArray[np.int64]
    truncated_B: NDArray[np.bool_]
    out_of_distribution_B: NDArray[np.bool_]
    """Farther from the training prompts than all but one in a hundred of these are from each other."""
    outlooks: dict[float, Outlook] = field(default_factory=dict)
    """Those asked for so far."""

    @property
    def any_alpha(self) -> bool:
        """Whether other alphas than the checkpoint's can be asked for."""
        return self.mode == "parts" and self.parts.learnability is not None

    def at(self, alpha: float | None = None) -> Outlook:
        """The strengths at an alpha, by default the checkpoint's.

        Raises:
            StrategyError: The router cannot answer for this alpha.
        """
        wanted = self.alpha if alpha is None else alpha
        if not self.any_alpha and not math.isclose(wanted, self.alpha, abs_tol=1e-9):
            reason = "has one head for one alpha" if self.mode == "paper" else "knows no learnability"
            raise StrategyError(
                f"the router {reason}: it was trained at alpha = {self.alpha:g} and cannot answer for "
                f"{wanted:g}"
            )
        if not 0.0 <= wanted <= 1.0:
            raise StrategyError(f"alpha is {wanted:g}: expected a number between 0 and 1")
        if wanted not in self.outlooks:
            self.outlooks[wanted] = self._outlook(wanted)
        return self.outlooks[wanted]

    def _outlook(self, alpha: float) -> Outlook:
        known = min(self.calibration, key=lambda item: (abs(item.alpha - alpha), item.alpha))
        means_M, means_EM = self.mean_parts.mixed(alpha), self.member_means.mixed(alpha)
        shape = self.quality_BM.shape
        if known.helps and self.fixed_BM is not None and self.member_fixed_EBM is not None:
            raw_BM, members_EBM = self.fixed_BM, self.member_fixed_EBM
        elif known.helps:
            raw_BM = self.parts.strengths(alpha, means_M)
            members_EBM = self.member_parts.strengths(alpha, means_EM[:, None])
        else:
            raw_BM = np.broadcast_to(means_M, shape)
            members_EBM = np.broadcast_to(means_EM[:, None], (len(means_EM), *shape))
        expected_BM = self.parts.mixed(alpha) if known.helps else np.broadcast_to(means_M, raw_BM.shape)
        return Outlook(
            alpha=alpha,
            strengths_BM=_centred(raw_BM) * known.inverse_temperature,
            expected_reward_BM=np.asarray(expected_BM),
            members_EBM=_centred(members_EBM) * known.inverse_temperature,
            helps=known.helps,
            conformal_width=known.conformal_width,
            coverage=None if known.conformal_width is None else self.coverage,
        )


def _centred(values: FloatArray) -> FloatArray:
    return np.asarray(values - values.mean(axis=-1, keepdims=True))

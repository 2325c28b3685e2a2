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
_MAX_TERMS = 256
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
        return self.moved(self.mixed(alpha), alpha, means)

    def moved(self, mixed: FloatArray, alpha: float, means: FloatArray) -> FloatArray:
        """``strengths``, where ``mixed(alpha)`` is known already."""
        if self.top is None:
            return mixed
        return np.asarray(means + (mixed - means + self.top.at(alpha)) / 2)

    def part(self, index: int | slice) -> "Parts":
        """The same along the first axis."""
        return Parts(
            self.quality[index],
            None if self.learnability is None else self.learnability[index],
            None if self.top is None else TopDeviations(self.top.alphas, self.top.values[index]),
        )


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
class RouterTraits:
    """What a router says of every prompt alike. F counts the router itself and then its E members."""

    mode: Mode
    alpha: float
    """The checkpoint's."""
    calibration: Sequence[AlphaCalibration]
    coverage: float | None
    means: Parts
    """The teachers' means over the training prompts, each FM: what counts where routing does not help."""
    terms: dict[float, "AlphaTerms"] = field(default_factory=dict)
    """Those asked for so far."""

    def at(self, alpha: float) -> "AlphaTerms":
        """What all outlooks at an alpha have in common."""
        terms = self.terms.get(alpha)
        if terms is None:
            if len(self.terms) >= _MAX_TERMS:
                self.terms.clear()
            known = min(self.calibration, key=lambda item: (abs(item.alpha - alpha), item.alpha))
            terms = self.terms[alpha] = AlphaTerms(known, self.means.mixed(alpha)[:, None])
        return terms


@dataclass(frozen=True, slots=True, eq=False)
class AlphaTerms:
    """What all outlooks of a router at one alpha have in common."""

    known: AlphaCalibration
    """Of the nearest alpha that was calibrated."""
    means_F1M: FloatArray
    """The teachers' mean rewards."""


@dataclass(frozen=True, slots=True, eq=False)
class RouterOutput:
    """What the router says of B prompts and M teachers, in the order of the manifest.

    F counts the router itself and then its E members, who were each trained without one fold.
    """

    traits: RouterTraits
    parts_F: Parts
    """Each FBM."""
    fixed_FBM: FloatArray | None
    """In ``paper`` mode, what its one head says; there may be fewer members of it than of the parts."""
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
    def parts(self) -> Parts:
        """By the router itself, each BM."""
        return self.parts_F.part(0)

    @property
    def member_parts(self) -> Parts:
        """By its members, each EBM."""
        return self.parts_F.part(slice(1, None))

    @property
    def mean_parts(self) -> Parts:
        """The teachers' means over the training prompts, each M."""
        return self.traits.means.part(0)

    @property
    def any_alpha(self) -> bool:
        """Whether other alphas than the checkpoint's can be asked for."""
        return self.traits.mode == "parts" and self.parts_F.learnability is not None

    def at(self, alpha: float | None = None) -> Outlook:
        """The strengths at an alpha, by default the checkpoint's.

        Raises:
            StrategyError: The router cannot answer for this alpha.
        """
        own = self.traits.alpha
        wanted = own if alpha is None else alpha
        outlook = self.outlooks.get(wanted)
        if outlook is not None:
            return outlook
        if not self.any_alpha and not math.isclose(wanted, own, abs_tol=1e-9):
            reason = "has one head for one alpha" if self.traits.mode == "paper" else "knows no learnability"
            raise StrategyError(
                f"the router {reason}: it was trained at alpha = {own:g} and cannot answer for {wanted:g}"
            )
        if not 0.0 <= wanted <= 1.0:
            raise StrategyError(f"alpha is {wanted:g}: expected a number between 0 and 1")
        self.outlooks[wanted] = outlook = self._outlook(wanted)
        return outlook

    def _outlook(self, alpha: float) -> Outlook:
        terms = self.traits.at(alpha)
        known, means_F1M = terms.known, terms.means_F1M
        mixed_FBM = self.parts_F.mixed(alpha)
        if not known.helps:
            raw_FBM = mixed_FBM = np.broadcast_to(means_F1M, mixed_FBM.shape)
        elif self.fixed_FBM is not None:
            raw_FBM = self.fixed_FBM
        else:
            raw_FBM = self.parts_F.moved(mixed_FBM, alpha, means_F1M)
        strengths_FBM = _centred(raw_FBM) * known.inverse_temperature
        return Outlook(
            alpha=alpha,
            strengths_BM=strengths_FBM[0],
            expected_reward_BM=mixed_FBM[0],
            members_EBM=strengths_FBM[1:],
            helps=known.helps,
            conformal_width=known.conformal_width,
            coverage=None if known.conformal_width is None else self.traits.coverage,
        )


def _centred(values: FloatArray) -> FloatArray:
    # The sum divided: ``mean`` gives the same and takes three times as long for one prompt.
    return np.asarray(values - values.sum(axis=-1, keepdims=True) / values.shape[-1])

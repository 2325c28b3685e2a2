"""Heads of the two parts of the reward: what they are fitted to, and how they are chosen together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.alpha_calibration import HeldOut, standard_error
from router_model.design import Design
from router_model.fitting import HeadFit, blend, fit_head, fit_ridges
from router_model.outlook import Parts
from router_model.top_fit import TopFit, TopTarget, top_alphas, top_targets

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

AUTO_RIVALS = ("knn", "cluster")
MIN_PROMPTS_FOR_AUTO = 10


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """What the heads are trained on."""

    design: Design
    mask_NM: BoolArray
    quality_NM: FloatArray
    """Normalised within the prompt, as learnability is."""
    learnability_NM: FloatArray | None
    raw_quality_NM: FloatArray
    raw_learnability_NM: FloatArray | None
    lent_quality: HeadFit | None = None

    def mixed(self, alpha: float) -> FloatArray:
        """Mixed reward, NM."""
        return Parts(self.quality_NM, self.learnability_NM).mixed(alpha)

    def tops(self, alpha: float) -> dict[str, TopTarget]:
        """Which teacher is the best at each of several alphas, by name; too few prompts cannot tell."""
        if self.design.n_prompts < MIN_PROMPTS_FOR_AUTO:
            return {}
        alphas = top_alphas(alpha, any_alpha=self.learnability_NM is not None)
        targets = (TopTarget(at, top_targets(self.mixed(at), self.mask_NM)) for at in alphas)
        return {f"top at {target.alpha!r}": target for target in targets}


@dataclass(frozen=True, slots=True, eq=False)
class PartFits:
    """One kind of head, fitted to each part of the reward."""

    quality: HeadFit
    learnability: HeadFit | None
    top: TopFit | None = None
    """Only ``auto`` asks also which teacher is the best."""

    def held_out(self, alpha: float) -> HeldOut | None:
        """What the router would go by for held-out prompts, and the means that it would fall back to."""
        quality, learnability = self.quality, self.learnability
        if quality.out_of_fold_NM is None or quality.means_NM is None:
            return None
        predicted = Parts(
            quality.out_of_fold_NM,
            None if learnability is None else learnability.out_of_fold_NM,
            None if self.top is None else self.top.out_of_fold,
        )
        means = Parts(quality.means_NM, None if learnability is None else learnability.means_NM).mixed(alpha)
        return HeldOut(predicted.strengths(alpha, means), means)

    def facts(self) -> dict[str, Any]:
        """Hyper-parameters of both."""
        learnability = {} if self.learnability is None else {"learnability": dict(self.learnability.facts)}
        return {"quality": dict(self.quality.facts), **learnability}


def fit_part_ridges(data: TrainingData, tops: Mapping[str, TopTarget]) -> dict[str, HeadFit]:
    """Ridge heads of both parts of the reward, of the raw values that explain it, and of the best teacher."""
    targets = {
        "learnability": data.learnability_NM,
        "raw_learnability": data.raw_learnability_NM,
        **{name: target.values_NM for name, target in tops.items()},
    }
    if data.lent_quality is None:
        targets |= {"quality": data.quality_NM, "raw_quality": data.raw_quality_NM}
    known = {name: values_NM for name, values_NM in targets.items() if values_NM is not None}
    return fit_ridges(data.design, known, data.mask_NM) if known else {}


def choose_head(
    head_kind: str, data: TrainingData, alpha: float, ridges: Mapping[str, HeadFit]
) -> tuple[str, PartFits, dict[str, Any]]:
    """The kind of head, its fits, and why."""
    ridge = PartFits(data.lent_quality or ridges["quality"], ridges.get("learnability"))
    if head_kind == "ridge":
        return head_kind, ridge, {}
    if head_kind != "auto":
        return head_kind, fit_parts(head_kind, data), {}
    n_prompts = data.design.n_prompts
    if n_prompts < MIN_PROMPTS_FOR_AUTO:
        reason = f"{n_prompts} prompts are too few to compare heads; {MIN_PROMPTS_FOR_AUTO} are needed"
        return "constant", fit_parts("constant", data), {"auto_reason": reason}
    candidates = {"ridge": ridge, **{kind: fit_parts(kind, data) for kind in AUTO_RIVALS}}
    blended = _blend_parts(candidates["ridge"], candidates["knn"])
    if blended is not None:
        candidates["blend"] = blended
    reward_NM = data.mixed(alpha)
    regrets = {}
    for kind, fits in candidates.items():
        held = fits.held_out(alpha)
        if held is not None:
            regrets[kind] = held.regret(reward_NM, data.mask_NM)
    best = min(regrets, key=lambda kind: float(regrets[kind].mean()))
    gain_N = regrets["ridge"] - regrets[best]
    gain, gain_se = float(gain_N.mean()), standard_error(gain_N)
    chosen = best if gain > gain_se else "ridge"
    reason = f"{best} has {gain:.4g} less held-out regret than ridge (standard error {gain_se:.2g})"
    shown = {kind: float(regret_N.mean()) for kind, regret_N in regrets.items()}
    return chosen, candidates[chosen], {"auto_reason": reason, "auto_cv_regret": shown}


def fit_parts(kind: str, data: TrainingData) -> PartFits:
    """Heads of one kind for each part that is known."""
    quality = data.lent_quality or fit_head(kind, data.design, data.quality_NM, data.mask_NM)
    if data.learnability_NM is None:
        return PartFits(quality, None)
    return PartFits(quality, fit_head(kind, data.design, data.learnability_NM, data.mask_NM))


def _blend_parts(ridge: PartFits, knn: PartFits) -> PartFits | None:
    quality = ridge.quality if ridge.quality is knn.quality else blend(ridge.quality, knn.quality)
    if quality is None or ridge.learnability is None or knn.learnability is None:
        return None if quality is None else PartFits(quality, None)
    learnability = blend(ridge.learnability, knn.learnability)
    return None if learnability is None else PartFits(quality, learnability)

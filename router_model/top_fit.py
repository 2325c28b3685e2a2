"""Which teacher is the best one of a prompt: heads on that question, beside those on its reward.

Regression on rewards spends its effort on all teachers of a prompt, and a choice needs the first one only.
A head on the indicator of the best teacher looks there; alone it ignores by how much a teacher is the best.
Each errs on other prompts than the other, so ``auto`` moves the teachers' means by the mean of both
(docs/experiments.md). What is best depends on alpha: there is one such head for each of a few alphas.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_model.design import Design
from router_model.fitting import HeadFit, fit_constant
from router_model.heads import ConstantHead, Head, LinearHead
from router_model.linear_fit import LinearMap
from router_model.outlook import TopDeviations

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

TOP_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Between them the predictions are interpolated."""
_TIE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class TopFit:
    """One linear head for all alphas, of deviations from how often each teacher is the best."""

    alphas: tuple[float, ...]
    head: Head
    out_of_fold: TopDeviations
    """Of each training prompt, by heads that did not see it."""
    members: tuple[Head, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TopTarget:
    """What the head of one alpha is fitted to, NM."""

    alpha: float
    values_NM: FloatArray


def top_alphas(alpha: float, *, any_alpha: bool) -> tuple[float, ...]:
    """The alphas at which the best teacher is predicted, ascending."""
    return tuple(sorted({*TOP_ALPHAS, alpha})) if any_alpha else (alpha,)


def top_targets(rewards_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """1 for the best present teacher of a prompt, and for each of several, else 0; NaN in masked cells.

    One over the number of answers is taken off: among fewer, each is the best one more often. Prompts on
    which all are equal give 0. The scale is that of the rewards, by the mean range of a prompt.
    """
    low_N1 = np.where(mask_NM, rewards_NM, np.inf).min(axis=1, keepdims=True)
    high_N1 = np.where(mask_NM, rewards_NM, -np.inf).max(axis=1, keepdims=True)
    differ_N1 = high_N1 - low_N1 > _TIE
    if not differ_N1.any():
        return np.where(mask_NM, 0.0, np.nan)
    best_NM = rewards_NM >= high_N1 - _TIE
    chance_N1 = 1.0 / np.maximum(mask_NM.sum(axis=1, keepdims=True), 1)
    scale = float((high_N1 - low_N1)[differ_N1].mean())
    return np.where(mask_NM, np.where(differ_N1, scale * (best_NM - chance_N1), 0.0), np.nan)


def join_tops(
    design: Design, fits: Mapping[str, HeadFit], targets: Mapping[str, TopTarget], mask_NM: BoolArray
) -> TopFit | None:
    """Fits of each alpha's targets as one, less the means that a constant would predict.

    Args:
        fits: Ridge fits by the names of the targets.
        targets: By ascending alpha.

    Returns:
        None where nothing can be held out.
    """
    held, heads, members = [], [], []
    for name, target in targets.items():
        fit, constant = fits[name], fit_constant(design, target.values_NM, mask_NM)
        if fit.out_of_fold_NM is None or fit.means_NM is None:
            return None
        held.append(fit.out_of_fold_NM - fit.means_NM)
        heads.append(_deviation(fit.head, constant.head))
        members.append([_deviation(*pair) for pair in zip(fit.members, constant.members, strict=True)])
    alphas = tuple(target.alpha for target in targets.values())
    return TopFit(
        alphas,
        LinearHead(LinearMap.side_by_side(heads)),
        TopDeviations(alphas, np.stack(held, axis=1)),
        tuple(LinearHead(LinearMap.side_by_side(own)) for own in zip(*members, strict=True)),
    )


def _deviation(fitted: Head, constant: Head) -> LinearMap:
    if not (isinstance(fitted, LinearHead) and isinstance(constant, ConstantHead)):
        raise TypeError(f"expected a linear head and a constant one, not {fitted.kind} and {constant.kind}")
    return LinearMap(fitted.linear.weight_DM, fitted.linear.bias_M - constant.mean_M)

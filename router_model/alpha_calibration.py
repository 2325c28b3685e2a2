"""What held-out predictions say of a router: whether it helps, and how sure it may be."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from router_model.bradley_terry import compare, loss_of_pairs
from router_model.outlook import AlphaCalibration
from router_model.reward import regret
from router_model.shrinkage import Moves, near_best

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IndexArray = NDArray[np.int64]

COVERAGE = 0.9
"""Of the conformal sets: how often the best teacher is in them, at least."""
MIN_PROMPTS_TO_ROUTE = 10
"""With fewer, cross-validation says nothing of a gain."""

MIN_GAIN = 1.5
"""Standard errors: one-sided, a router without any use passes once in fifteen times."""
NEIGHBOURHOOD = 0.2
"""Of alpha."""

# Bounds of the spread of strengths, in logits: a noise-free ranking has no finite best temperature.
_MIN_SPREAD, _MAX_SPREAD = 1e-3, 10.0
_PROMPTS_FOR_TEMPERATURE = 1000
_TIE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Held-out predictions at one alpha, and what came of them."""

    moves: Moves
    rewards_NM: FloatArray


def unjudged(alpha: float, *, follow: bool) -> AlphaCalibration:
    """Where nothing was held out, predictions are followed or not as they were asked for."""
    return AlphaCalibration(alpha, follow, float(follow), 0.0, None, None, 1.0, None)


def calibrate(
    alpha: float,
    predicted_NM: FloatArray | None,
    rewards_NM: FloatArray,
    mask_NM: BoolArray,
) -> AlphaCalibration:
    """Judge held-out predictions of a head that somebody chose by name: they are followed as they are.

    Args:
        predicted_NM: Predicted rewards of prompts that the heads did not see; None if nothing was held out.
    """
    if predicted_NM is None:
        return unjudged(alpha, follow=True)
    gain_N = hindsight_regret(rewards_NM, mask_NM) - regret(predicted_NM, rewards_NM, mask_NM)
    return _calibrated(alpha, (1.0, 0.0), predicted_NM, gain_N=gain_N, rewards_NM=rewards_NM, mask_NM=mask_NM)


def calibrate_moves(
    cases: Mapping[float, Case], mask_NM: BoolArray, folds: Sequence[IndexArray]
) -> tuple[AlphaCalibration, ...]:
    """Choose at each alpha how far to follow held-out predictions, down to not at all, and judge the choice.

    Following helps if the regret, with weights chosen on other folds, is below that of the best single
    teacher *in hindsight* on the same prompts, by more than ``MIN_GAIN`` standard errors. Hindsight, because
    the cross-validated constant looks worse than it is: where teachers are close, leaving out the prompts
    that favour one lets the other win the rest. A gain changes little from one alpha to the next, so it is
    the mean over the alphas within ``NEIGHBOURHOOD`` that must be so large; its own must be above 0.

    Args:
        cases: What was held out, by alpha.
        folds: The prompts of each fold, of one or several partitions.
    """
    judged = {alpha: _judge(case, mask_NM, folds) for alpha, case in cases.items()}
    found = []
    for alpha, case in cases.items():
        near = [gain_N for at, (_, gain_N) in judged.items() if abs(at - alpha) <= NEIGHBOURHOOD + _TIE]
        weights, gain_N = judged[alpha]
        enough = len(mask_NM) >= MIN_PROMPTS_TO_ROUTE and gain_N.mean() > 0
        if not (enough and _z(np.mean(near, axis=0)) > MIN_GAIN):
            weights = 0.0, 0.0
        used_NM = case.moves.constant_NM + case.moves.weighed(weights)
        found.append(
            _calibrated(alpha, weights, used_NM, gain_N=gain_N, rewards_NM=case.rewards_NM, mask_NM=mask_NM)
        )
    return tuple(found)


def _judge(
    case: Case, mask_NM: BoolArray, folds: Sequence[IndexArray]
) -> tuple[tuple[float, float], FloatArray]:
    """Weights by all prompts, and each prompt's gain by weights that were chosen without it."""
    regret_PN = case.moves.regrets(case.rewards_NM, mask_NM)
    total_N, n_times_N = np.zeros(len(mask_NM)), np.zeros(len(mask_NM))
    for fold in folds:
        others = np.setdiff1d(np.arange(len(mask_NM)), fold)
        weights = near_best(regret_PN[:, others])
        total_N[fold] += case.moves.regret(weights, case.rewards_NM, mask_NM)[fold]
        n_times_N[fold] += 1
    gain_N = hindsight_regret(case.rewards_NM, mask_NM) - total_N / n_times_N
    return near_best(regret_PN), gain_N


def _z(values_N: FloatArray) -> float:
    """Mean in standard errors; 0 where nothing differs."""
    error = standard_error(values_N)
    return float(values_N.mean()) / error if error > 0 else 0.0


def _calibrated(
    alpha: float,
    weights: tuple[float, float],
    used_NM: FloatArray,
    *,
    gain_N: FloatArray,
    rewards_NM: FloatArray,
    mask_NM: BoolArray,
) -> AlphaCalibration:
    factor = inverse_temperature(used_NM, rewards_NM, mask_NM)
    width = conformal_width(used_NM * factor, rewards_NM, mask_NM)
    gain, gain_se = float(gain_N.mean()), standard_error(gain_N)
    return AlphaCalibration(alpha, any(weights), *weights, gain, gain_se, factor, width)


def hindsight_regret(rewards_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """Regret of each prompt under the one teacher with the highest mean reward on these prompts."""
    total_M = np.where(mask_NM, rewards_NM, 0.0).sum(axis=0) / np.maximum(mask_NM.sum(axis=0), 1)
    ranked_M = np.where(mask_NM.any(axis=0), total_M, -np.inf)
    return regret(np.tile(ranked_M, (len(rewards_NM), 1)), rewards_NM, mask_NM)


def standard_error(values_N: FloatArray) -> float:
    """Standard error of a mean over prompts."""
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else 0.0


def inverse_temperature(predicted_NM: FloatArray, rewards_NM: FloatArray, mask_NM: BoolArray) -> float:
    """The factor that turns predictions into the best calibrated strengths.

    The pairwise log-loss is convex in the factor, so a golden-section search over its logarithm finds the
    minimum. If all predictions are equal there is nothing to fit and the factor is 1.
    """
    if len(predicted_NM) > _PROMPTS_FOR_TEMPERATURE:
        rows = np.linspace(0, len(predicted_NM) - 1, _PROMPTS_FOR_TEMPERATURE).astype(int)
        predicted_NM, rewards_NM, mask_NM = predicted_NM[rows], rewards_NM[rows], mask_NM[rows]
    centred_NM = predicted_NM - predicted_NM.mean(axis=1, keepdims=True)
    spread = float(np.sqrt((centred_NM**2).mean()))
    if spread < _TIE:
        return 1.0
    predicted = torch.from_numpy(centred_NM)
    pairs = compare(
        torch.from_numpy(np.ascontiguousarray(rewards_NM)), torch.from_numpy(np.ascontiguousarray(mask_NM))
    )

    def loss(log_factor: float) -> float:
        with torch.no_grad():
            return float(loss_of_pairs(predicted * math.exp(log_factor), pairs))

    low, high = math.log(_MIN_SPREAD / spread), math.log(_MAX_SPREAD / spread)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(30):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2.0)


def conformal_width(strengths_NM: FloatArray, rewards_NM: FloatArray, mask_NM: BoolArray) -> float | None:
    """Split conformal: the quantile, over held-out prompts, of ``max_m s_m - s_best``.

    The teachers within this width of the strongest hold a best one with a chance of ``COVERAGE`` at least,
    for a prompt that is exchangeable with these. None where there are too few prompts for that.
    """
    present_NM = np.where(mask_NM, strengths_NM, -np.inf)
    rewarded_NM = np.where(mask_NM, rewards_NM, -np.inf)
    best_NM = rewarded_NM >= rewarded_NM.max(axis=1, keepdims=True) - _TIE
    score_N = present_NM.max(axis=1) - np.where(best_NM, present_NM, -np.inf).max(axis=1)
    rank = math.ceil((len(score_N) + 1) * COVERAGE)
    return float(np.sort(score_N)[rank - 1]) if rank <= len(score_N) else None

"""What held-out predictions say of a router: whether it helps, and how sure it may be."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from router_model.bradley_terry import compare, loss_of_pairs
from router_model.linear_fit import column_means
from router_model.outlook import AlphaCalibration
from router_model.reward import regret

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

COVERAGE = 0.9
"""Of the conformal sets: how often the best teacher is in them, at least."""
MIN_PROMPTS_TO_ROUTE = 10
"""With fewer, cross-validation says nothing of a gain."""

MIN_GAIN = 1.28
"""Standard errors: one-sided, a router without any use passes once in ten times."""

# Bounds of the spread of strengths, in logits: a noise-free ranking has no finite best temperature.
_MIN_SPREAD, _MAX_SPREAD = 1e-3, 10.0
_PROMPTS_FOR_TEMPERATURE = 1000
_TIE = 1e-12
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Predictions at one alpha for each training prompt, by heads that did not see it."""

    strengths_NM: FloatArray
    """On the scale of the reward."""
    means_NM: FloatArray
    """The teachers' means over the prompts that those heads saw."""

    def regret(self, rewards_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
        """Regret of each prompt, with the predictions taken as moves from one and the same means.

        The means of the other prompts look worse than they are: where teachers are close, leaving out a
        prompt that favours one lets the other win it.
        """
        moves_NM = self.strengths_NM - self.means_NM
        # Rounding is no prediction: where teachers' means are equal it would choose between them.
        moves_NM = np.where(np.abs(moves_NM) > _ROUNDING, moves_NM, 0.0)
        return regret(column_means(rewards_NM, mask_NM) + moves_NM, rewards_NM, mask_NM)


def calibrate(
    alpha: float, predicted_NM: FloatArray | None, rewards_NM: FloatArray, mask_NM: BoolArray
) -> AlphaCalibration:
    """Judge held-out predictions of a head that somebody chose by name: they are followed as they are.

    Args:
        predicted_NM: Predicted rewards of prompts that the heads did not see; None if nothing was held out.
    """
    if predicted_NM is None:
        return AlphaCalibration(alpha, True, None, None, 1.0, None)
    gain_N = hindsight_regret(rewards_NM, mask_NM) - regret(predicted_NM, rewards_NM, mask_NM)
    return _calibrated(alpha, predicted_NM, helps=True, gain_N=gain_N, rewards_NM=rewards_NM, mask_NM=mask_NM)


def calibrate_gated(
    alpha: float, held: HeldOut | None, rewards_NM: FloatArray, mask_NM: BoolArray
) -> AlphaCalibration:
    """Judge held-out predictions, and fall back to the best single teacher unless they clearly help.

    They help if their regret is below that of the best single teacher *in hindsight* on the same prompts, by
    more than ``MIN_GAIN`` standard errors.

    Args:
        held: None if nothing was held out.
    """
    if held is None:
        return AlphaCalibration(alpha, False, None, None, 1.0, None)
    gain_N = hindsight_regret(rewards_NM, mask_NM) - held.regret(rewards_NM, mask_NM)
    enough = len(rewards_NM) >= MIN_PROMPTS_TO_ROUTE and float(gain_N.mean()) > 0
    helps = enough and float(gain_N.mean()) > MIN_GAIN * standard_error(gain_N)
    used_NM = held.strengths_NM if helps else held.means_NM
    return _calibrated(alpha, used_NM, helps=helps, gain_N=gain_N, rewards_NM=rewards_NM, mask_NM=mask_NM)


def _calibrated(
    alpha: float,
    used_NM: FloatArray,
    *,
    helps: bool,
    gain_N: FloatArray,
    rewards_NM: FloatArray,
    mask_NM: BoolArray,
) -> AlphaCalibration:
    factor = inverse_temperature(used_NM, rewards_NM, mask_NM)
    width = conformal_width(used_NM * factor, rewards_NM, mask_NM)
    return AlphaCalibration(alpha, helps, float(gain_N.mean()), standard_error(gain_N), factor, width)


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

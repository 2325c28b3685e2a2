"""Whether a router's probabilities and conformal sets mean what they say, on prompts it has not seen."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_model.bradley_terry import pairwise_loss
from router_model.choices import is_best

FloatArray = NDArray[np.float64]

N_BINS = 15


def pairwise_calibration(strengths_NM: FloatArray, reward_NM: FloatArray) -> dict[str, Any]:
    """Whether win probabilities mean what they say, over all pairs of responses to a prompt.

    ``pairwise_log_loss`` is the training loss on these prompts. ``pairwise_ece`` is the mean distance of
    predicted from observed over 15 bins of equal size. Each pair counts in both orders, so the curve is
    symmetric; a tie is half a win. Pairs with one prediction stay in one bin: splitting them would compare
    noise. ``pairwise_accuracy`` is the share of the pairs with a winner that the strengths order rightly,
    equal strengths counting half; None if no pair has a winner.

    Args:
        strengths_NM: Bradley-Terry logits.
        reward_NM: NaN in masked cells.
    """
    mask_NM = ~np.isnan(reward_NM)
    log_loss = pairwise_loss(*(torch.from_numpy(array) for array in (strengths_NM, reward_NM, mask_NM)))
    first, second = np.triu_indices(strengths_NM.shape[1], k=1)
    present = mask_NM[:, first] & mask_NM[:, second]
    difference = (strengths_NM[:, first] - strengths_NM[:, second])[present]
    sign = np.sign(reward_NM[:, first] - reward_NM[:, second])[present]
    outcome = (1 + sign) / 2
    observed = np.concatenate([outcome, 1 - outcome])
    predicted = np.exp(-np.logaddexp(0.0, np.concatenate([-difference, difference])))
    order = np.argsort(predicted, kind="stable")
    edges = predicted[order][np.arange(1, N_BINS) * len(order) // N_BINS]
    bin_of = np.searchsorted(edges, predicted, side="right")
    bins = [
        {
            "predicted": float(predicted[own].mean()),
            "observed": float(observed[own].mean()),
            "n": int(own.sum()),
        }
        for own in (bin_of == number for number in np.unique(bin_of))
    ]
    ece = sum(cell["n"] * abs(cell["predicted"] - cell["observed"]) for cell in bins) / len(predicted)
    decided = sign != 0
    right = (1 + np.sign(difference[decided]) * sign[decided]) / 2
    return {
        "pairwise_ece": float(ece),
        "pairwise_log_loss": float(log_loss),
        "pairwise_accuracy": float(right.mean()) if decided.any() else None,
        "bins": bins,
    }


def conformal_coverage(
    strengths_NM: FloatArray, reward_NM: FloatArray, width: float, stated: float
) -> dict[str, float]:
    """How often the conformal set holds a best teacher, next to how often it should.

    The set of a prompt is ``{m : max_j s_j - s_m <= width}``, over the teachers with a response (split
    conformal prediction; Vovk et al., 2005). Coverage holds for prompts like those of the calibration only.

    Args:
        strengths_NM: Bradley-Terry logits.
        reward_NM: NaN in masked cells. Any of several best teachers counts.
        width: In logits, as calibrated in training.
        stated: The coverage that it was calibrated for, in (0, 1).
    """
    mask_NM = ~np.isnan(reward_NM)
    present_NM = np.where(mask_NM, strengths_NM, -np.inf)
    inside_NM = mask_NM & (present_NM.max(axis=1, keepdims=True) - present_NM <= width)
    covered_N = (inside_NM & is_best(reward_NM, mask_NM)).any(axis=1)
    return {
        "coverage_stated": stated,
        "coverage_measured": float(covered_N.mean()),
        "mean_set_size": float(inside_NM.sum(axis=1).mean()),
    }

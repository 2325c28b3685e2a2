"""How sure a router is of its first choice, and what it stands to lose by it."""

import math

import numpy as np
from numpy.typing import NDArray

from router_model.outlook import Outlook

FloatArray = NDArray[np.float64]


def jackknife_error(values_E: FloatArray) -> FloatArray:
    """Standard error over the E ensemble members: ``sqrt((E - 1) / E * sum (d_e - mean d)^2)``.

    Args:
        values_E: By member along the first axis, each trained without one part of the prompts.

    Returns:
        The error along the other axes.
    """
    n_members = len(values_E)
    deviations_E = values_E - values_E.sum(axis=0) / n_members
    squares = (deviations_E * deviations_E).sum(axis=0)
    return np.asarray(np.sqrt((n_members - 1) / n_members * squares))


def expected_loss(outlook: Outlook) -> FloatArray:
    """What the first choice may cost against the second, B logits: ``E max(0, -d)``, d their difference.

    d is taken as normal around the margin with its jackknife error s: ``s phi(m / s) - m Phi(-m / s)``. It is
    great where the two are close *and* the ensemble disagrees. Without an ensemble, or with one teacher only,
    it is 1 for every prompt: none is known to be more doubtful.
    """
    n_prompts, n_teachers = outlook.strengths_BM.shape
    if len(outlook.members_EBM) < 2 or n_teachers < 2:
        return np.ones(n_prompts)
    rows = np.arange(n_prompts)
    order_BM = np.argsort(-outlook.strengths_BM, axis=1, kind="stable")
    first, second = order_BM[:, 0], order_BM[:, 1]
    margin_B = outlook.strengths_BM[rows, first] - outlook.strengths_BM[rows, second]
    error_B = jackknife_error(outlook.members_EBM[:, rows, first] - outlook.members_EBM[:, rows, second])
    ratio_B = margin_B / np.maximum(error_B, 1e-12)
    density_B = np.exp(-0.5 * ratio_B**2) / math.sqrt(2 * math.pi)
    below_B = np.array([0.5 * math.erfc(ratio / math.sqrt(2)) for ratio in ratio_B])
    return np.asarray(np.maximum(error_B * density_B - margin_B * below_B, 0.0))

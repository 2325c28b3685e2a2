"""How far to move the teachers' means by what is predicted of a prompt: from not at all to fully."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_model.linear_fit import column_means
from router_model.reward import regret

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS = tuple(itertools.product(_WEIGHTS, _WEIGHTS))
"""Weights of the two moves, to choose from."""
_LEAST_ERROR = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Where held-out predictions would move the strengths of each training prompt."""

    constant_NM: FloatArray
    """From where: the teachers' means over the other folds' prompts."""
    reward_NM: FloatArray
    """By the predicted reward."""
    top_NM: FloatArray
    """By which teacher is predicted to be the best; zero without heads for it."""

    def weighed(self, weights: tuple[float, float]) -> FloatArray:
        """The sum of both moves."""
        return weights[0] * self.reward_NM + weights[1] * self.top_NM

    def regret(self, weights: tuple[float, float], rewards_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
        """Regret of each prompt. All are moved from the same means: what is judged is the move."""
        return regret(column_means(rewards_NM, mask_NM) + self.weighed(weights), rewards_NM, mask_NM)

    def regrets(self, rewards_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
        """The same for all of ``PAIRS``, PN."""
        return np.stack([self.regret(pair, rewards_NM, mask_NM) for pair in PAIRS])


def near_best(regret_PN: FloatArray) -> tuple[float, float]:
    """Weights by held-out regrets of ``PAIRS``: the mean of all, as the pair of the least is noisy.

    Each counts by ``exp(-z^2 / 2)`` with z the excess of its regret in standard errors of the difference.
    """
    least = int(regret_PN.mean(axis=1).argmin())
    excess_PN = regret_PN - regret_PN[least]
    error_P = np.maximum(excess_PN.std(axis=1) / math.sqrt(excess_PN.shape[1]), _LEAST_ERROR)
    nearness_P = np.exp(-0.5 * (excess_PN.mean(axis=1) / error_P) ** 2)
    first, second = nearness_P @ np.array(PAIRS) / nearness_P.sum()
    return float(first), float(second)

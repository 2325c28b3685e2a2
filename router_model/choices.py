"""What each method would choose for held-out prompts, and the plain facts about those choices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from clients.types import Strategy
from router_model.checkpoint import Manifest
from router_model.errors import StrategyError
from router_model.evaluation_set import EvaluationSet
from router_model.strategies import RouteOptions, chances, ranking

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

TIE = 1e-12
"""Rewards closer than this are equal: they come from sums in another order."""


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """What a method would do: its odds of each teacher, and its ranking of them, prompt by prompt."""

    odds_NM: FloatArray
    """Rows sum to 1; 0 where a teacher has no response."""
    ranking_NM: FloatArray
    """Higher is better; minus infinity where a teacher has no response."""


def all_choices(
    strengths_NM: FloatArray,
    baselines_NM: Mapping[str, FloatArray],
    held: EvaluationSet,
    manifest: Manifest,
) -> tuple[dict[str, Choices], list[str]]:
    """All strategies, the baseline heads and the oracle.

    A method that would choose a teacher without a response takes the next one of its own ranking.

    Args:
        strengths_NM: The router's strengths, in the columns of the table.
        baselines_NM: Strengths of each baseline head, in the same columns.

    Returns:
        The methods by name, and a note for each that cannot be applied here and is left out.
    """
    methods: dict[str, Choices] = {}
    notes: list[str] = []
    for strategy in get_args(Strategy):
        try:
            methods[strategy] = _strategy(strategy, strengths_NM, held, manifest)
        except StrategyError as error:
            notes.append(f"{strategy} is left out: {error.message.removeprefix(f'{strategy}: ')}")
    for name, baseline_NM in baselines_NM.items():
        methods[name] = highest(baseline_NM, held.table.mask_NM)
    methods["oracle"] = highest(held.reward_NM, held.table.mask_NM)
    return methods, notes


def highest(values_NM: FloatArray, mask_NM: BoolArray) -> Choices:
    """The present teacher of the highest value for each prompt; the first of equals."""
    ranking_NM = np.where(mask_NM, values_NM, -np.inf)
    odds_NM = np.zeros_like(ranking_NM)
    odds_NM[np.arange(len(odds_NM)), ranking_NM.argmax(axis=1)] = 1.0
    return Choices(odds_NM, ranking_NM)


def _strategy(
    strategy: Strategy, strengths_NM: FloatArray, held: EvaluationSet, manifest: Manifest
) -> Choices:
    options = RouteOptions(strategy=strategy)
    everyone = [manifest.teachers[column] for column in held.columns]
    # Raises if the strategy cannot be applied to this checkpoint at all.
    ranking(manifest, everyone, np.zeros(len(everyone)), options)
    odds_NM = np.zeros_like(strengths_NM)
    ranking_NM = np.full_like(strengths_NM, -np.inf)
    for row, present_M in enumerate(held.table.mask_NM):
        here = np.flatnonzero(present_M)
        teachers = [manifest.teachers[held.columns[column]] for column in here]
        chosen = options
        if strategy == "family_strong" and not any(t.family == manifest.student.family for t in teachers):
            # Nobody of the family answered this prompt: the next of its ranking is the strongest other.
            chosen = RouteOptions(strategy="strong")
        odds_NM[row, here] = chances(manifest, teachers, strengths_NM[row, here], chosen)
        ranking_NM[row, here] = ranking(manifest, teachers, strengths_NM[row, here], chosen)
    return Choices(odds_NM, ranking_NM)


def expected(odds_NM: FloatArray, values_NM: FloatArray) -> FloatArray:
    """Expected value of each prompt's choice, N, exact rather than sampled. NaN cells must have no odds."""
    return np.asarray((odds_NM * np.where(np.isnan(values_NM), 0.0, values_NM)).sum(axis=1))


def mean_expected(choices: Choices, values_NM: FloatArray | None) -> float | None:
    """Mean over the prompts of the chosen responses' values; None if they are not known."""
    return None if values_NM is None else float(expected(choices.odds_NM, values_NM).mean())


def facts(choices: Choices, held: EvaluationSet) -> dict[str, Any]:
    """Means, hit rates and shares per teacher of a method's choices, ready for JSON."""
    table = held.table
    best_NM = is_best(held.reward_NM, table.mask_NM)
    return {
        "mean_reward": mean_expected(choices, held.reward_NM),
        "mean_quality": mean_expected(choices, table.quality_NM),
        "mean_learnability": mean_expected(choices, table.learnability_NM),
        "hit_at_1": mean_expected(choices, best_NM.astype(np.float64)),
        "hit_at_3": float(np.mean(_hit_at_3(choices, best_NM, table.mask_NM))),
        "share": dict(zip(table.teachers, map(float, choices.odds_NM.mean(axis=0)), strict=True)),
    }


def versus(choices: Choices, rival: Choices, reward_NM: FloatArray) -> dict[str, float]:
    """Shares of the prompts on which a method's reward is above, equal to and below its rival's.

    Where one of the two draws its teacher, its odds count: both draw independently.
    """
    # NaN cells have no odds on either side.
    filled_NM = np.where(np.isnan(reward_NM), 0.0, reward_NM)
    win = loss = 0.0
    for rival_column in np.flatnonzero(rival.odds_NM.any(axis=0)):
        difference_NM = filled_NM - filled_NM[:, [rival_column]]
        weight_NM = choices.odds_NM * rival.odds_NM[:, [rival_column]]
        win += float(weight_NM[difference_NM > TIE].sum())
        loss += float(weight_NM[difference_NM < -TIE].sum())
    n_prompts = len(reward_NM)
    return {
        "win": win / n_prompts,
        "tie": max(0.0, 1.0 - (win + loss) / n_prompts),
        "loss": loss / n_prompts,
    }


def is_best(reward_NM: FloatArray, mask_NM: BoolArray) -> BoolArray:
    """Cells with the greatest reward of their prompt, NM; ties are all credited."""
    filled_NM = np.where(mask_NM, reward_NM, -np.inf)
    return np.asarray(filled_NM >= filled_NM.max(axis=1, keepdims=True) - TIE)


def _hit_at_3(choices: Choices, best_NM: BoolArray, mask_NM: BoolArray) -> list[float]:
    """Chance that one of the three teachers ranked first is a best one; ties in the ranking are drawn."""
    hits = []
    for ranking_M, best_M, present_M in zip(choices.ranking_NM, best_NM, mask_NM, strict=True):
        values, best = ranking_M[present_M], best_M[present_M]
        third = np.sort(values)[::-1][min(2, len(values) - 1)]
        above, level = values > third, values == third
        n_drawn = min(3, len(values)) - int(above.sum())
        n_level, n_good = int(level.sum()), int((level & best).sum())
        miss = math.comb(n_level - n_good, n_drawn) / math.comb(n_level, n_drawn)
        hits.append(1.0 if (above & best).any() else 1.0 - miss)
    return hits

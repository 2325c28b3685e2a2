"""What the router does at other weights of learnability than the one it was trained for."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from router_model.checkpoint import Manifest
from router_model.choices import Choices, expected, highest, mean_expected
from router_model.evaluation_set import EvaluationSet
from router_model.gap import Contest
from router_model.outlook import ALPHAS, Outlook, RouterOutput


@dataclass(frozen=True, slots=True, eq=False)
class AlphaPoint:
    """Router and best single teacher at one alpha, before the gap's interval is known."""

    facts: dict[str, Any]
    contest: Contest


def alpha_points(output: RouterOutput, held: EvaluationSet, manifest: Manifest) -> list[AlphaPoint]:
    """The router at alpha = 0, 0.1, ..., 1, each judged by the reward of that alpha.

    Empty if the router or the table knows one alpha only. The best single teacher at each alpha is the one
    that the training table says; where it has no response, the next by the checkpoint's own alpha answers.
    """
    if not output.any_alpha or held.table.learnability_NM is None:
        return []
    return [_point(alpha, output.at(alpha), held, manifest) for alpha in ALPHAS]


def _point(alpha: float, outlook: Outlook, held: EvaluationSet, manifest: Manifest) -> AlphaPoint:
    table = held.table
    reward_NM = table.rewards(alpha, manifest.normalization)
    single_column = manifest.best_single(alpha)
    single = _single(single_column, held, manifest)
    # A router that has fallen back is the best single teacher, also in what it does where that is missing.
    router = highest(outlook.strengths_BM[:, held.columns], table.mask_NM) if outlook.helps else single
    oracle = highest(reward_NM, table.mask_NM)
    facts = {
        "alpha": alpha,
        "mean_quality": mean_expected(router, table.quality_NM),
        "mean_learnability": mean_expected(router, table.learnability_NM),
        "helps": outlook.helps,
        "best_single": {
            "teacher": manifest.teachers[single_column].id,
            "mean_quality": mean_expected(single, table.quality_NM),
            "mean_learnability": mean_expected(single, table.learnability_NM),
        },
    }
    values = (expected(choices.odds_NM, reward_NM) for choices in (router, single, oracle))
    return AlphaPoint(facts, Contest(*values))


def _single(column: int, held: EvaluationSet, manifest: Manifest) -> Choices:
    """One teacher of the checkpoint for all prompts, and the next by mean reward where it has no response."""
    ranking_M = np.array([teacher.mean_reward for teacher in manifest.teachers])
    ranking_M[column] = np.inf
    ranking_NM = np.tile(ranking_M[list(held.columns)], (held.table.n_prompts, 1))
    return highest(ranking_NM, held.table.mask_NM)

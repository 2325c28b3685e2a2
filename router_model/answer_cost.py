"""What an answer of each teacher is expected to cost."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from clients.types import Price
from router_model.errors import StrategyError
from router_model.model import TeacherSummary
from router_model.strategies import refusal

FloatArray = NDArray[np.float64]


def expected_cost_usd(
    teachers: Sequence[TeacherSummary], prices: Mapping[str, Price], n_input_tokens: int
) -> FloatArray:
    """Expected cost of one answer: input tokens times input price plus predicted tokens times output price.

    The predicted length is the teacher's mean over its answers in the score table. A cost that is not known,
    for want of a price or of a length, counts as the highest known one: a teacher must not win by what nobody
    knows of it.

    Args:
        teachers: All of the checkpoint, so that the highest cost does not depend on which are allowed.
        prices: By teacher id; a teacher that is not named has no known price.
        n_input_tokens: Of the prompt, as the router counts them.

    Returns:
        M, US dollars. NaN where the cost is not known and no known one is above 0 to stand for it.
    """
    known_M = np.array([_known_cost_usd(teacher, prices, n_input_tokens) for teacher in teachers])
    highest = max((cost for cost in known_M.tolist() if not math.isnan(cost)), default=0.0)
    return np.where(np.isnan(known_M), highest if highest > 0 else np.nan, known_M)


def teachers_of_unknown_cost(teachers: Sequence[TeacherSummary], prices: Mapping[str, Price]) -> list[str]:
    """Ids of the teachers for whose cost the highest known one stands."""
    return [teacher.id for teacher in teachers if math.isnan(_known_cost_usd(teacher, prices, 1))]


def unknown_cost(name: str, teacher_ids: Sequence[str]) -> StrategyError:
    """Why the option ``name``, which needs costs, cannot be served: those of these teachers are not known."""
    return refusal(
        name,
        f"{name} cannot be served: the cost of an answer of {', '.join(teacher_ids)} is not known, and no "
        "known cost is above 0 to stand for it; give every teacher a price, and train on a score table with "
        "n_tokens",
    )


def _known_cost_usd(teacher: TeacherSummary, prices: Mapping[str, Price], n_input_tokens: int) -> float:
    """US dollars, NaN if not known. A teacher that takes nothing for its output may write at any length."""
    price = prices.get(teacher.id)
    if price is None or (teacher.mean_n_tokens is None and price.output_usd_per_mtok > 0):
        return math.nan
    output_usd = (teacher.mean_n_tokens or 0.0) * price.output_usd_per_mtok
    return (n_input_tokens * price.input_usd_per_mtok + output_usd) / 1e6

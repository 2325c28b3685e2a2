"""Expected cost of an answer, worked out by hand."""

import numpy as np
import pytest

from clients.types import Price
from router_model.answer_cost import expected_cost_usd
from router_model.model import TeacherSummary


def teacher(name: str, n_tokens: float | None) -> TeacherSummary:
    return TeacherSummary(name, None, None, 0.5, -1.0, 0.5, 0.5, 0.5, n_tokens)


def test_input_and_predicted_output_are_priced_apart() -> None:
    """100 input tokens at 2 and 500 output tokens at 8 dollars per million: 0.0002 + 0.004."""
    cost_usd = expected_cost_usd([teacher("a", 500.0)], {"a": Price(2.0, 8.0)}, 100)
    assert cost_usd == pytest.approx([0.0042])


def test_what_is_not_known_counts_as_the_highest_known() -> None:
    """No price, or a price per output token without a known length; a free teacher is known to be free."""
    teachers = [
        teacher("a", 500.0),
        teacher("b", 500.0),
        teacher("c", None),
        teacher("d", None),
        teacher("e", 1.0),
    ]
    prices = {"a": Price(0.0, 8.0), "c": Price(0.0, 1.0), "d": Price(), "e": Price(0.0, 1.0)}
    cost_usd = expected_cost_usd(teachers, prices, 100)
    assert cost_usd == pytest.approx([0.004, 0.004, 0.004, 0.0, 1e-6])


@pytest.mark.parametrize("prices", [{}, {"a": Price()}])
def test_nothing_stands_for_an_unknown_cost_if_none_is_above_zero(prices: dict[str, Price]) -> None:
    """It stays unknown rather than free."""
    cost_usd = expected_cost_usd([teacher("a", 500.0), teacher("b", 500.0)], prices, 100)
    assert np.isnan(cost_usd).tolist() == [not prices, True]

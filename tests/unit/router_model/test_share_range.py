"""Shares as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_model.errors import StrategyError
from router_model.share_range import ShareRange, parse_share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("big=10%..30%", ShareRange("big", 0.1, 0.3)),
        ("big=0.1..0.3", ShareRange("big", 0.1, 0.3)),
        ("big=..20%", ShareRange("big", 0.0, 0.2)),
        ("big=5%..", ShareRange("big", 0.05, 1.0)),
        ("big=.5..", ShareRange("big", 0.5, 1.0)),
        ("a=b=0..0.5", ShareRange("a=b", 0.0, 0.5)),
        ("big= 10% .. 0.3 ", ShareRange("big", 0.1, 0.3)),
    ],
)
def test_the_grammar(text: str, expected: ShareRange) -> None:
    """Percentages or fractions, either end open."""
    assert parse_share(text) == expected


@pytest.mark.parametrize(
    "text",
    ["big", "big=", "big=20%", "big=..", "=1%..2%", "big=20..30", "big=a..b", "big=nan..1", "big=30%..10%"],
)
def test_anything_else_is_refused(text: str) -> None:
    """One number alone, no end at all, numbers above 1 without %, an empty range."""
    with pytest.raises(StrategyError, match="is no share"):
        parse_share(text)


@given(st.integers(1, 10_000), st.integers(0, 100))
def test_a_whole_share_is_counted_exactly(n_prompts: int, percent: int) -> None:
    """p percent of 100 n prompts are p n, as a least and as a greatest share."""
    assert ShareRange("x", percent / 100, percent / 100).counts(100 * n_prompts) == (percent * n_prompts,) * 2

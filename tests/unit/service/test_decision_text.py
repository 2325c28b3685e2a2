"""A decision as a person reads it in a terminal."""

from typing import Any

from clients.types import RoutingDecision
from service.decision_text import by_share, decision_lines


def decision(**facts: Any) -> RoutingDecision:
    return RoutingDecision(
        prompt_id="p",
        teacher="long name",
        distribution={"a": 0.25, "long name": 0.75},
        strengths={},
        quality={},
        learnability={},
        expected_reward={},
        propensity=1.0,
        margin=1.1,
        input_tokens=3,
        truncated=False,
        **{"uncertain": False, **facts},
    )


def test_bars_are_as_long_as_the_shares() -> None:
    """The largest share first, names in one column, 40 characters for a share of 1; then the choice."""
    assert by_share(decision()) == [("long name", 0.75), ("a", 0.25)]
    first, second, choice = decision_lines(decision())
    assert first == f"long name  {'█' * 30}{' ' * 10}  75.0%"
    assert second == f"a          {'█' * 10}{' ' * 30}  25.0%"
    assert choice == "teacher: long name"


def test_doubts_are_told() -> None:
    """Too close, several candidates, or an unusual prompt: one line each."""
    doubtful = decision(uncertain=True, conformal_set=("long name", "a"), out_of_distribution=True)
    close, several, foreign = decision_lines(doubtful)[3:]
    assert close.startswith("uncertain")
    assert several.endswith("long name, a")
    assert foreign.startswith("out of distribution")
    assert len(decision_lines(decision(conformal_set=("a",)))) == 3

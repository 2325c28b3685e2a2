"""The decision for one prompt: alpha, cost, candidates, and how sure the router is."""

import math
from typing import Any

import pytest

from clients.types import Price, RoutingDecision
from router_model.errors import StrategyError
from router_model.model import TeacherSummary
from tests.unit.planted import decided, planted_manifest, planted_output

MANIFEST = planted_manifest(
    [TeacherSummary(name, None, None, 0.5, -1.0, 0.5, 0.5, 0.5, 1000.0) for name in "abcd"]
)
EDGE = math.log(0.55 / 0.45)


def choose(strengths: Any = (0.5, 0.3, 0.0, -0.8), *, facts: Any = None, **options: Any) -> RoutingDecision:
    return decided(MANIFEST, planted_output(strengths, **(facts or {})), **options)


def test_alpha_changes_the_choice_and_all_that_is_reported() -> None:
    """Teacher, strengths, distribution, reward and margin are those of the alpha asked for."""
    by_alpha = {None: (0.5, 0.3, 0, 0), 0.0: (2.0, 1.0, 0, 0), 0.5: (0.5, 1.5, 1.0, 0), 1.0: (0, 0, 0, 3.0)}
    decisions = {alpha: choose(by_alpha, alpha=alpha) for alpha in by_alpha}
    assert [decision.teacher for decision in decisions.values()] == ["a", "a", "b", "d"]
    margins = [decision.margin for decision in decisions.values()]
    assert margins == pytest.approx([0.2, 1.0, 0.5, 3.0])
    half = decisions[0.5]
    assert half.strengths == {"a": 0.5, "b": 1.5, "c": 1.0, "d": 0.0}
    assert half.expected_reward == pytest.approx({"a": 0.05, "b": 0.15, "c": 0.1, "d": 0.0})
    total = math.exp(0.5) + math.exp(1.5) + math.exp(1.0) + 1
    assert half.distribution["b"] == pytest.approx(math.exp(1.5) / total)


def test_an_alpha_that_the_router_cannot_serve_is_named() -> None:
    """The router's reason is passed on, and the field is in the details."""
    with pytest.raises(StrategyError, match=r"alpha = 0\.9 cannot be served") as refused:
        choose(alpha=0.9)
    assert refused.value.details == {"field": "alpha"}


@pytest.mark.parametrize(
    ("top_k", "options", "kept"),
    [
        (2, {}, {"a", "b"}),
        (1, {"exclude": ["a"]}, {"b"}),
        (2, {"teachers": ["b", "c", "d"]}, {"b", "c"}),
        (9, {}, {"a", "b", "c", "d"}),
    ],
)
def test_top_k_keeps_the_strongest_allowed(top_k: int, options: dict[str, Any], kept: set[str]) -> None:
    """By strength at the alpha used, among the allowed; ties go to the first by name."""
    decision = choose(top_k=top_k, **options)
    assert set(decision.distribution) == set(decision.strengths) == kept
    assert choose((1, 2, 2, 2), top_k=2).strengths == {"b": 2.0, "c": 2.0}


def test_cost_moves_the_choice_and_not_the_report() -> None:
    """Strength less cost_weight times cost decides; distribution and strengths stay those of the router."""
    # 1,000 tokens at 100 dollars per million and 7 at 1,000: 0.107 dollars for a.
    prices = {"a": Price(1000.0, 100.0), "b": Price(), "c": Price(), "d": Price()}
    free = choose(prices=prices)
    below, above = (choose(prices=prices, cost_weight=0.2 / 0.107 + step) for step in (-0.01, 0.01))
    assert (free.teacher, below.teacher, above.teacher) == ("a", "a", "b")
    assert free.distribution == above.distribution
    assert free.strengths == above.strengths
    assert free.margin == above.margin


def test_an_unknown_cost_is_never_the_cheapest() -> None:
    """It counts as the highest known one; where none above 0 is known, cost cannot be served."""
    # b has no price, so it costs what a does, and c is the best of the cheaper two.
    prices = {"a": Price(0.0, 100.0), "c": Price(0.0, 1.0), "d": Price(0.0, 1.0)}
    assert choose(prices=prices, cost_weight=10.0).teacher == "c"
    for known in ({}, {"a": Price(), "c": Price()}):
        with pytest.raises(
            StrategyError, match=r"cost_weight cannot be served: .* of .*b, .*d is not"
        ) as refused:
            choose(prices=known, cost_weight=10.0)
        assert refused.value.details == {"field": "cost_weight"}
    assert choose(prices={"a": Price(), "c": Price()}, teachers=["a", "c"], cost_weight=10.0).teacher == "a"


def test_temperature_samples_from_strengths_less_cost() -> None:
    """The propensity is softmax((strength - cost_weight x cost) / temperature)."""
    prices = {name: Price(0.0, 100.0 if name == "a" else 0.0) for name in "abcd"}
    decision = choose((0, 0, 0, 0), prices=prices, cost_weight=10.0, temperature=2.0)
    odds = {"a": math.exp(-0.5), "b": 1.0, "c": 1.0, "d": 1.0}
    assert decision.propensity == pytest.approx(odds[decision.teacher] / sum(odds.values()))


# Three members put the lead of the first teacher over the second at 0.1, 0.2 and 0.6. Squared distances from
# their mean sum to 0.14, so the standard error is sqrt(2/3 * 0.14) = 0.3055.
MEMBERS = ((0.1, 0.0, 0, 0), (0.2, 0.0, 0, 0), (0.6, 0.0, 0, 0))


@pytest.mark.parametrize(("lead", "uncertain"), [(0.0, True), (0.305, True), (0.306, False), (1.0, False)])
def test_doubt_is_a_lead_within_one_jackknife_error(lead: float, uncertain: bool) -> None:
    """The members decide, however likely the win; a lead beyond the error is no doubt."""
    decision = choose((lead, 0, -9, -9), facts={"members": MEMBERS})
    assert decision.margin == pytest.approx(lead)
    assert decision.uncertain is uncertain


def test_doubt_is_about_the_two_best_that_are_allowed() -> None:
    """Members that disagree on a teacher which may not be chosen do not count."""
    facts = {"members": ((5.0, 1, 0, 0), (-5.0, 1, 0, 0), (0, 1, 0, 0))}
    assert choose((2.0, 1.5, 1.0, 0), facts=facts).uncertain is True
    assert choose((2.0, 1.5, 1.0, 0), facts=facts, exclude=["a"]).uncertain is False


@pytest.mark.parametrize("members", [(), ((0.0, 9.0, 0, 0),)])
def test_without_an_ensemble_the_win_probability_tells(members: Any) -> None:
    """Uncertain if the best beats the second less than 55 times in 100; never with one teacher."""
    facts = {"members": members}
    assert choose((0, EDGE - 0.01, -9, -9), facts=facts).uncertain is True
    assert choose((0, EDGE + 0.01, -9, -9), facts=facts).uncertain is False


def test_one_teacher_alone_is_certain() -> None:
    """There is no second to lose against."""
    alone = choose(teachers=["c"], facts={"members": MEMBERS, "width": 0.1})
    assert (alone.margin, alone.uncertain, alone.distribution) == (0.0, False, {"c": 1.0})
    assert alone.conformal_set == ("c",)


@pytest.mark.parametrize(
    ("width", "options", "expected"),
    [
        (None, {}, ()),
        (0.0, {}, ("a",)),
        (0.25, {}, ("a", "b")),
        (0.75, {}, ("a", "b", "c")),
        (2.0, {}, ("a", "b", "c", "d")),
        (0.25, {"exclude": ["a"]}, ("b",)),
        (0.5, {"teachers": ["b", "c", "d"]}, ("b", "c")),
        (0.25, {"strategy": "best_single"}, ("a", "b")),
    ],
)
def test_the_conformal_set_is_all_within_the_width(
    width: float | None, options: dict[str, Any], expected: tuple[str, ...]
) -> None:
    """Strengths 0.5, 0.3, 0, -0.8: those at most the width below the best allowed, best first."""
    assert choose(facts={"width": width}, **options).conformal_set == expected


def test_the_conformal_set_is_ordered_by_strength_then_name() -> None:
    """Best first, whatever the column; ties by name."""
    assert choose((0, 2, 1, 1), facts={"width": 9.0}).conformal_set == ("b", "c", "d", "a")


def test_what_is_known_of_the_prompt_is_passed_on() -> None:
    """Length and out-of-distribution flag are the router's; NaN never reaches JSON."""
    decision = choose(facts={"n_input_tokens": 11, "is_foreign": True})
    assert (decision.input_tokens, decision.truncated, decision.out_of_distribution) == (11, False, True)
    assert decision.learnability == {}
    assert choose().out_of_distribution is False

"""A plan as a person reads it."""

from typing import Any

from service.plan_text import plan_lines

FACTS: dict[str, Any] = {
    "n_prompts": 4,
    "teachers": {"small": 3, "big": 1},
    "teacher_costs_usd": {"small": 0.3, "big": 1.0},
    "expected_cost_usd": 1.3,
    "cost_not_known": [],
    "mean_expected_reward": 0.5,
    "budget_usd": None,
    "value": None,
    "shadow_prices": None,
}


def test_a_plan_without_limits_is_a_table_with_totals() -> None:
    """One row per teacher, aligned; no shadow prices, as nothing binds."""
    assert plan_lines(FACTS) == [
        "teacher  prompts   share  expected cost",
        "small          3   75.0%        $0.3000",
        "big            1   25.0%        $1.0000",
        "total          4  100.0%        $1.3000",
        "mean expected reward: 0.5000",
    ]


def test_limits_are_told_in_words() -> None:
    """What one more dollar and one more prompt are worth, and how far the plan may be from the best."""
    limits = {
        "budget_usd": 1.5,
        "cost_not_known": ["small"],
        "value": {"of": "expected reward", "total": 2.0, "upper_bound": 2.02, "gap": 0.02},
        "shadow_prices": {"usd": 0.25, "teachers": {"big": 0.125, "small": 0.0, "tiny": -0.5}},
    }
    assert plan_lines({**FACTS, **limits}) == [
        "teacher  prompts   share  expected cost  shadow price",
        "small          3   75.0%        $0.3000",
        "big            1   25.0%        $1.0000        +0.125",
        "tiny           0    0.0%        $0.0000          -0.5",
        "total          4  100.0%        $1.3000",
        "mean expected reward: 0.5000",
        "budget $1.5: one more US dollar is worth 0.25 of expected reward, summed over the prompts",
        "big is at its greatest share: one more prompt is worth 0.125 of expected reward",
        "tiny is at its least share: its last prompt costs 0.5 of expected reward",
        "no plan within the limits is better by more than 0.02 of expected reward in all",
        "the cost of small is not known: the highest known one stands for it",
    ]


def test_what_is_not_known_or_does_not_bind_is_said() -> None:
    """Unknown costs, and a budget that is more than enough."""
    facts = {
        **FACTS,
        "teacher_costs_usd": {"small": None, "big": None},
        "expected_cost_usd": None,
        "mean_expected_reward": None,
        "cost_not_known": ["small", "big"],
    }
    assert plan_lines(facts)[-1].split() == ["total", "4", "100.0%", "unknown"]
    ample = {
        "budget_usd": 9.0,
        "value": {"of": "mean quality", "total": 2.0, "upper_bound": 2.0, "gap": 0.0},
        "shadow_prices": {"usd": 0.0, "teachers": {"big": 0.0, "small": 0.0}},
    }
    assert "budget $9: not binding" in plan_lines({**FACTS, **ample})

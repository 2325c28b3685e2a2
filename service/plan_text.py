"""A plan for a corpus as lines for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_UNKNOWN = "unknown"
_NO_GAP = 1e-6
"""What the solver's tolerances leave between a plan and its bound."""


def plan_lines(facts: Mapping[str, Any]) -> list[str]:
    """A row per teacher, the totals, and in words what a little more of each limit would be worth.

    Args:
        facts: What ``plan.json`` says.
    """
    header = ("teacher", "prompts", "share", "expected cost", "shadow price")
    rows = [header, *(_row(facts, teacher) for teacher in _shown(facts)), _total_row(facts)]
    lines = _aligned(rows if facts["shadow_prices"] else [row[:-1] for row in rows])
    reward = facts["mean_expected_reward"]
    if reward is not None:
        lines.append(f"mean expected reward: {reward:.4f}")
    lines += _limit_lines(facts)
    if facts["cost_not_known"] and facts["expected_cost_usd"] is not None:
        unknown = ", ".join(facts["cost_not_known"])
        lines.append(f"the cost of {unknown} is not known: the highest known one stands for it")
    return lines


def _shown(facts: Mapping[str, Any]) -> list[str]:
    """Teachers that answer, most prompts first, then those that a limit keeps from it."""
    prices = (facts["shadow_prices"] or {"teachers": {}})["teachers"]
    return [
        *facts["teachers"],
        *(name for name, price in prices.items() if price and name not in facts["teachers"]),
    ]


def _row(facts: Mapping[str, Any], teacher: str) -> tuple[str, ...]:
    n_prompts = facts["teachers"].get(teacher, 0)
    cost_usd = facts["teacher_costs_usd"].get(teacher, 0.0)
    price = facts["shadow_prices"]["teachers"][teacher] if facts["shadow_prices"] else 0.0
    return (
        teacher,
        str(n_prompts),
        f"{n_prompts / facts['n_prompts']:.1%}",
        _usd(cost_usd),
        f"{price:+.4g}" if price else "",
    )


def _total_row(facts: Mapping[str, Any]) -> tuple[str, ...]:
    return ("total", str(facts["n_prompts"]), "100.0%", _usd(facts["expected_cost_usd"]), "")


def _usd(cost_usd: float | None) -> str:
    return _UNKNOWN if cost_usd is None else f"${cost_usd:.4f}"


def _limit_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the limits cost, in the unit of what the plan makes the most of."""
    if not facts["shadow_prices"]:
        return []
    unit, prices = facts["value"]["of"], facts["shadow_prices"]
    lines = []
    if facts["budget_usd"] is not None:
        worth = f"one more US dollar is worth {prices['usd']:.4g} of {unit}, summed over the prompts"
        lines.append(f"budget ${facts['budget_usd']:g}: {worth if prices['usd'] else 'not binding'}")
    for teacher, price in prices["teachers"].items():
        if price > 0:
            lines.append(
                f"{teacher} is at its greatest share: one more prompt is worth {price:.4g} of {unit}"
            )
        elif price < 0:
            lines.append(f"{teacher} is at its least share: its last prompt costs {-price:.4g} of {unit}")
    gap = facts["value"]["gap"]
    better = f" by more than {gap:.2g} of {unit} in all" if gap > _NO_GAP else ""
    lines.append(f"no plan within the limits is better{better}")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    ]

"""A routing decision as lines for a terminal."""

from collections.abc import Sequence

from clients.types import RoutingDecision


def by_share(decision: RoutingDecision) -> list[tuple[str, float]]:
    """Teachers with their shares of the distribution, the largest first."""
    return sorted(decision.distribution.items(), key=lambda pair: -pair[1])


def decision_lines(decision: RoutingDecision) -> list[str]:
    """The distribution as a bar chart, the teacher, and what speaks against trusting the choice."""
    lines = [*bar_chart(by_share(decision)), f"teacher: {decision.teacher}"]
    if decision.uncertain:
        lines.append("uncertain: the two strongest teachers are too close to tell apart")
    if len(decision.conformal_set) > 1:
        lines.append(f"any of these may be the best: {', '.join(decision.conformal_set)}")
    if decision.out_of_distribution:
        lines.append("out of distribution: the prompt is unlike those that the router was trained on")
    return lines


def bar_chart(shares: Sequence[tuple[str, float]], width: int = 40) -> list[str]:
    """One line per teacher: its name, a bar, its share."""
    label_width = max(len(name) for name, _ in shares)
    return [
        f"{name:<{label_width}}  {'█' * round(width * share):<{width}} {share:6.1%}" for name, share in shares
    ]

"""Curves of a report: the router over alpha, and over the number of labelled prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter, NullLocator

from router_model.learning_curve import FACTORS, PowerLaw
from router_model.picture import GRID, LOSS, OTHER, ROUTER, new_figure, tidy

_Z95 = 1.96
_APART = 0.07
"""Share of an axis that two labels must be apart."""


def alpha_figure(report: Mapping[str, Any]) -> Figure:
    """Gap closed at each alpha with its interval, beside the quality and learnability it buys."""
    curve = report["curves"]["alpha"]
    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    gap_axes, trade_axes = (tidy(axes) for axes in figure.subplots(1, 2))
    _draw_gap(gap_axes, curve, report["alpha"])
    _draw_trade(trade_axes, curve)
    return figure


def _draw_gap(axes: Axes, curve: Sequence[Mapping[str, Any]], trained: float) -> None:
    alphas = [point["alpha"] for point in curve]
    # Where there is no gap to close, the curve has a hole.
    gaps = [point["gap_closed"] for point in curve]
    values = [math.nan if gap["value"] is None else gap["value"] for gap in gaps]
    low, high = ([math.nan if gap["ci95"] is None else gap["ci95"][end] for gap in gaps] for end in (0, 1))
    axes.axhline(0, color=OTHER, linestyle="--", label="best single teacher")
    axes.axvline(trained, color=GRID, linewidth=4, label=f"the checkpoint's alpha, {trained:g}")
    axes.fill_between(alphas, low, high, color=ROUTER, alpha=0.18, linewidth=0, label="95 % interval")
    axes.plot(alphas, values, color=ROUTER, marker="o", label="router")
    fallen = [(a, v) for a, v, point in zip(alphas, values, curve, strict=True) if not point["helps"]]
    if fallen:
        axes.plot(*zip(*fallen, strict=True), "o", color="white", markeredgecolor=ROUTER, label="fallen back")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set(xlim=(-0.03, 1.03), xlabel="alpha: weight of learnability", ylabel="gap to the oracle closed")
    axes.grid(color=GRID)
    axes.set_title("Gap closed, by the reward of each alpha", loc="left")
    # Below the axes: the curve may run anywhere.
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_trade(axes: Axes, curve: Sequence[Mapping[str, Any]]) -> None:
    for facts, colour, marker, label in (
        # The router last: where it falls back, it stands on the same points.
        ([point["best_single"] for point in curve], OTHER, "s", "best single teacher"),
        (curve, ROUTER, "o", "router"),
    ):
        axes.plot(
            [fact["mean_quality"] for fact in facts],
            [fact["mean_learnability"] for fact in facts],
            color=colour,
            marker=marker,
            # Smaller than the square, which shows below it.
            markersize=8 if marker == "s" else 5,
            label=label,
        )
    axes.margins(0.15)
    for text, quality, learnability in alpha_labels(curve):
        axes.annotate(
            text,
            (quality, learnability),
            (6, 6),
            textcoords="offset points",
            color=ROUTER,
            # The line may run through the text.
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axes.set(xlabel="mean quality", ylabel="mean learnability")
    axes.grid(color=GRID)
    axes.set_title("What each alpha buys", loc="left")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def alpha_labels(curve: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Texts for the points of the trade-off and where they stand; neighbours that would overlap share one."""
    places = np.array([[point["mean_quality"], point["mean_learnability"]] for point in curve])
    spread = np.maximum(np.ptp(places, axis=0), 1e-12)
    groups: list[list[int]] = []
    for number, place in enumerate(places):
        near = bool(groups) and bool((np.abs(place - places[groups[-1][0]]) < _APART * spread).all())
        if near:
            groups[-1].append(number)
        else:
            groups.append([number])
    labels = []
    for own in groups:
        first, last = curve[own[0]], curve[own[-1]]
        text = f"{first['alpha']:g}" + (f" to {last['alpha']:g}" if len(own) > 1 else "")
        labels.append((text, float(places[own[0], 0]), float(places[own[0], 1])))
    return labels


def label_figure(report: Mapping[str, Any]) -> Figure:
    """Cross-validated regret against the number of labelled prompts, and the fitted power law beyond."""
    rows = sorted(report["curves"]["labels"], key=lambda row: int(row["n_prompts"]))
    n_prompts, regret, error, rival = (
        np.array([row[name] for row in rows], dtype=np.float64)
        for name in ("n_prompts", "regret", "regret_se", "best_single_regret")
    )
    figure, axes = new_figure(7.4, 4.6)
    axes.plot(
        n_prompts, rival, color=LOSS, linestyle="--", marker="s", markersize=4, label="best single teacher"
    )
    axes.fill_between(
        n_prompts,
        regret - _Z95 * error,
        regret + _Z95 * error,
        color=ROUTER,
        alpha=0.18,
        linewidth=0,
        label="95 % interval",
    )
    axes.plot(n_prompts, regret, color=ROUTER, marker="o", label="router, cross-validated")
    ticks = list(n_prompts)
    if report["label_advice"]["fit"] is not None:
        law = PowerLaw(**report["label_advice"]["fit"])
        ahead = np.geomspace(n_prompts[0], max(FACTORS) * n_prompts[-1], 60)
        axes.plot(ahead, [law.at(n) for n in ahead], color=OTHER, label="fitted power law")
        ticks += [factor * n_prompts[-1] for factor in FACTORS]
    axes.set_xscale("log")
    axes.set_xticks(_spaced(ticks), [f"{round(tick):,}" for tick in _spaced(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="labelled prompts (log scale)", ylabel="regret")
    axes.grid(color=GRID)
    axes.set_title(
        {"falling": "More labels would pay", "flat": "More labels would hardly pay"}.get(
            report["label_advice"]["state"], "Regret and labelled prompts"
        ),
        loc="left",
    )
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def _spaced(ticks: Sequence[float]) -> list[float]:
    """Ticks of a log axis that leave room for their numbers, from the right."""
    kept: list[float] = []
    for tick in sorted(ticks, reverse=True):
        if not kept or kept[-1] / tick > 1.25:
            kept.append(tick)
    return kept

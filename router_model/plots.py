"""The pictures of a report, as PNG files: one bar chart or diagram each; curves are in ``curve_plots``."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from router_model.curve_plots import alpha_figure, label_figure
from router_model.errors import RouterError
from router_model.picture import GRID, LOSS, OTHER, ROUTER, new_figure, save, tick_name

_NARROWEST_LABELLED = 0.06
"""Share of a bar below which its number would not fit."""


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures into ``folder``; those of a curve that the report lacks are taken away.

    Returns:
        The files that were drawn.

    Raises:
        RouterError: A file cannot be written; an older picture of that name stays whole.
    """
    curves = report["curves"]
    figures = {
        "methods.png": _methods(report),
        "win_tie_loss.png": _win_tie_loss(report),
        "shares.png": _shares(report),
        "alpha.png": alpha_figure(report) if curves["alpha"] else None,
        "labels.png": label_figure(report) if curves["labels"] else None,
        "reliability.png": _reliability(report),
    }
    for name, figure in figures.items():
        if figure is None:
            # A picture of an earlier report would be taken for this one's.
            _remove(folder / name)
    return [save(figure, folder / name) for name, figure in figures.items() if figure is not None]


def _remove(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    except OSError as error:
        raise RouterError(f"{path}: cannot be removed: {error.strerror}") from error


def _methods(report: Mapping[str, Any]) -> Figure:
    methods = sorted(report["methods"].items(), key=lambda pair: pair[1]["mean_reward"])
    figure, axes = new_figure(8, 0.42 * len(methods) + 1.4)
    names = [name for name, _ in methods]
    rewards = [facts["mean_reward"] for _, facts in methods]
    axes.barh(names, rewards, color=[ROUTER if name == "persyn" else OTHER for name in names])
    for row, (_, facts) in enumerate(methods):
        gap = facts["gap_closed"]
        text = f"{facts['mean_reward']:.3f}"
        if gap["value"] is not None:
            text += f"   gap closed {gap['value']:.0%} [{gap['ci95'][0]:.0%}, {gap['ci95'][1]:.0%}]"
        # Right of zero, where no bar of a negative (z-scored) reward stands.
        axes.annotate(
            text, (max(0.0, facts["mean_reward"]), row), (6, 0), textcoords="offset points", va="center"
        )
    low, high = min(0.0, *rewards), max(0.0, *rewards)
    axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high])
    axes.set_xlim(low, high + 0.85 * (high - low))
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel("mean reward (normalised within the prompt)")
    axes.set_title(f"{report['n_prompts']} held-out prompts: {report['verdict']}", loc="left")
    return figure


def _win_tie_loss(report: Mapping[str, Any]) -> Figure:
    duels = [
        (name, facts["versus_best_single"])
        for name, facts in sorted(report["methods"].items(), key=lambda pair: pair[1]["mean_reward"])
        if name != "best_single"
    ]
    figure, axes = new_figure(8, 0.42 * len(duels) + 1.8)
    left = [0.0] * len(duels)
    for outcome, colour in (("win", ROUTER), ("tie", GRID), ("loss", LOSS)):
        shares = [duel[outcome] for _, duel in duels]
        bars = axes.barh([name for name, _ in duels], shares, left=left, color=colour, label=outcome)
        labels = [f"{share:.0%}" if share >= _NARROWEST_LABELLED else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", color="black" if outcome == "tie" else "white")
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("share of the prompts")
    axes.set_title("Reward against the best single teacher's", loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def _shares(report: Mapping[str, Any]) -> Figure:
    routed, ideal = (report["methods"][method]["share"] for method in ("persyn", "oracle"))
    names = sorted(routed, key=lambda name: (routed[name], ideal[name]))
    figure, axes = new_figure(8, 0.42 * len(names) + 1.8)
    rows = range(len(names))
    for share_of, offset, colour, label in ((routed, 0.2, ROUTER, "router"), (ideal, -0.2, OTHER, "oracle")):
        shares = [share_of[name] for name in names]
        bars = axes.barh([row + offset for row in rows], shares, 0.36, color=colour, label=label)
        axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3, fontsize=8)
    axes.set_yticks(list(rows), [tick_name(name) for name in names], fontsize=9)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel("share of the prompts")
    axes.set_title("Who answers", loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def _reliability(report: Mapping[str, Any]) -> Figure:
    bins = report["reliability"]
    figure, axes = new_figure(5.4, 5)
    axes.plot([0, 1], [0, 1], color=OTHER, linestyle="--", label="perfect")
    predicted, observed = [cell["predicted"] for cell in bins], [cell["observed"] for cell in bins]
    axes.plot(predicted, observed, color=ROUTER, marker="o", label="router")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted win probability", ylabel="observed win rate")
    axes.grid(color=GRID)
    axes.set_title(f"Calibration error {report['calibration']['pairwise_ece']:.3f}", loc="left")
    axes.legend(frameon=False, loc="upper left")
    return figure

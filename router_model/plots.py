"""The three pictures of a report, as PNG files."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from router_model.errors import RouterError

_ROUTER, _OTHER, _GRID = "#1b6ca8", "#9aa5b1", "#dde1e6"


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw ``methods.png``, ``shares.png`` and ``reliability.png`` into ``folder``.

    Raises:
        RouterError: A file cannot be written; an older picture of that name stays whole.
    """
    return [
        _save(_methods(report), folder / "methods.png"),
        _save(_shares(report), folder / "shares.png"),
        _save(_reliability(report), folder / "reliability.png"),
    ]


def _save(figure: Figure, path: Path) -> Path:
    # No pyplot: nothing is shared with the caller's plots.
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_bytes(picture.getvalue())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise RouterError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _methods(report: Mapping[str, Any]) -> Figure:
    methods = sorted(report["methods"].items(), key=lambda pair: pair[1]["mean_reward"])
    figure, axes = _figure(8, 0.5 * len(methods) + 1.4)
    names = [name for name, _ in methods]
    rewards = [facts["mean_reward"] for _, facts in methods]
    axes.barh(names, rewards, color=[_ROUTER if name == "persyn" else _OTHER for name in names])
    for row, (_, facts) in enumerate(methods):
        gap = facts["gap_closed"]
        text = f"{facts['mean_reward']:.3f}"
        if gap["value"] is not None:
            text += f"   gap closed {gap['value']:.0%} [{gap['ci95'][0]:.0%}, {gap['ci95'][1]:.0%}]"
        axes.annotate(text, (facts["mean_reward"], row), (6, 0), textcoords="offset points", va="center")
    # Room for the text; z-scored rewards may be negative.
    axes.set_xlim(min(0.0, *rewards), max(0.0, *rewards) + 0.75 * (max(0.0, *rewards) - min(0.0, *rewards)))
    axes.grid(axis="x", color=_GRID)
    axes.set_xlabel("mean reward (normalised within the prompt)")
    axes.set_title(f"{report['n_prompts']} held-out prompts: {report['verdict']}", loc="left")
    return figure


def _shares(report: Mapping[str, Any]) -> Figure:
    shares = sorted(report["methods"]["persyn"]["share"].items(), key=lambda pair: pair[1])
    ideal = report["methods"]["oracle"]["share"]
    figure, axes = _figure(8, 0.6 * len(shares) + 1.4)
    rows = range(len(shares))
    axes.barh(
        [row + 0.2 for row in rows], [share for _, share in shares], 0.36, color=_ROUTER, label="router"
    )
    axes.barh(
        [row - 0.2 for row in rows], [ideal[name] for name, _ in shares], 0.36, color=_OTHER, label="oracle"
    )
    axes.set_yticks(list(rows), [name for name, _ in shares])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", color=_GRID)
    axes.set_xlabel("share of the prompts")
    axes.set_title("Who answers", loc="left")
    axes.legend(frameon=False, loc="lower right")
    return figure


def _reliability(report: Mapping[str, Any]) -> Figure:
    bins = report["reliability"]
    figure, axes = _figure(5.4, 5)
    axes.plot([0, 1], [0, 1], color=_OTHER, linestyle="--", label="perfect")
    predicted, observed = [cell["predicted"] for cell in bins], [cell["observed"] for cell in bins]
    axes.plot(predicted, observed, color=_ROUTER, marker="o", label="router")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted win probability", ylabel="observed win rate")
    axes.grid(color=_GRID)
    axes.set_title(f"Calibration error {report['calibration']['pairwise_ece']:.3f}", loc="left")
    axes.legend(frameon=False, loc="upper left")
    return figure

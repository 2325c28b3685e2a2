"""How every picture of a report looks, and how it becomes a file."""

import contextlib
import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from router_model.errors import RouterError

ROUTER, OTHER, GRID, LOSS = "#1b6ca8", "#9aa5b1", "#dde1e6", "#b5532a"
_LONGEST_LINE = 36


def new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """An empty figure of one diagram; sizes in inches."""
    # No pyplot: nothing is shared with the caller's plots.
    figure = Figure(figsize=(width_in, height_in), dpi=120, layout="constrained")
    return figure, tidy(figure.add_subplot())


def tidy(axes: Axes) -> Axes:
    """Take off what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return axes


def tick_name(name: str) -> str:
    """A name as it stands beside a bar: on two lines if it is long, without its middle if it is longer."""
    if len(name) <= _LONGEST_LINE:
        return name
    if len(name) > 2 * _LONGEST_LINE:
        name = f"{name[:_LONGEST_LINE]}…{name[1 - _LONGEST_LINE :]}"
    # After a separator where there is one, but never so early that the rest is longer than a line.
    earliest = len(name) - _LONGEST_LINE
    cuts = [
        n + 1 for n, letter in enumerate(name[:_LONGEST_LINE]) if letter in "-_/.: " and n + 1 >= earliest
    ]
    cut = cuts[-1] if cuts else _LONGEST_LINE
    return f"{name[:cut]}\n{name[cut:]}"


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG whole or not at all.

    Raises:
        RouterError: The file cannot be written; an older picture of that name stays whole.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png")
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_bytes(png.getvalue())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise RouterError(f"{path}: cannot be written: {error.strerror}") from error
    return path

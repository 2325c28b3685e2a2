"""Progress on a terminal as a bar with rate, ETA, errors and cost; elsewhere one JSON line per interval."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_INTERVAL_S = 5.0


class BarProgress:
    """A bar on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._n_errors = 0
        self._cost_usd = 0.0
        self._n_done = 0
        self._started_s = 0.0

    def start(self, stage: str, *, total: int, done: int = 0) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        self._n_errors, self._cost_usd, self._n_done, self._started_s = 0, 0.0, 0, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(stage, total=total, completed=done, facts="")
        self._bar.start()

    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        if self._bar is None:
            return
        self._n_errors += n_errors
        self._cost_usd += cost_usd
        self._n_done += n_items
        rate = self._n_done / max(time.monotonic() - self._started_s, 1e-3)
        facts = f"{rate:.1f}/s  errors {self._n_errors}  ${self._cost_usd:.4f}"
        self._bar.update(self._task, advance=n_items, facts=facts)

    def finish(self) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, message: str) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        (self._bar.console if self._bar else self._console).print(message, highlight=False, markup=False)


class JsonProgress:
    """One JSON line per interval, and one at the end of each stage, for logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._stage = ""
        self._total = self._done = self._n_new = self._n_errors = 0
        self._cost_usd = self._started_s = self._said_s = 0.0

    def start(self, stage: str, *, total: int, done: int = 0) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        self._stage, self._total, self._done = stage, total, done
        self._n_new = self._n_errors = 0
        self._cost_usd = 0.0
        self._started_s = self._said_s = time.monotonic()

    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        self._done += n_items
        self._n_new += n_items
        self._n_errors += n_errors
        self._cost_usd += cost_usd
        if time.monotonic() - self._said_s >= _INTERVAL_S:
            self._say()

    def finish(self) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        self._say()

    def note(self, message: str) -> None:
        """See ``router_model.pipeline.progress.Progress``."""
        self._write({"note": message})

    def _say(self) -> None:
        now_s = self._said_s = time.monotonic()
        rate = self._n_new / max(now_s - self._started_s, 1e-3)
        remaining = self._total - self._done
        self._write(
            {
                "stage": self._stage,
                "done": self._done,
                "total": self._total,
                "errors": self._n_errors,
                "cost_usd": round(self._cost_usd, 6),
                "rate_per_s": round(rate, 2),
                "eta_s": round(remaining / rate, 1) if rate > 0 else None,
            }
        )

    def _write(self, line: dict[str, object]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


@contextmanager
def progress_for(stream: TextIO | None = None) -> Iterator[BarProgress | JsonProgress]:
    """A bar where a person looks, JSON lines elsewhere.

    When the block ends, by an error too, the bar is closed: a live one hides the cursor.
    """
    if not (stream or sys.stderr).isatty():
        yield JsonProgress(stream)
        return
    bar = BarProgress()
    try:
        yield bar
    finally:
        bar.finish()

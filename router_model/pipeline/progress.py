"""What a stage tells of its progress; the command line shows it."""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one stage after another."""

    def start(self, stage: str, *, total: int, done: int = 0) -> None:
        """A stage begins with ``done`` of ``total`` items finished by an earlier call."""

    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None:
        """Items were finished, some of them in error."""

    def finish(self) -> None:
        """The stage has ended."""

    def note(self, message: str) -> None:
        """One line that the user should see."""

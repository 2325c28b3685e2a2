"""Admission: what cannot be served soon is refused at once, so that what was admitted stays fast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import OverloadedError

_SMOOTHING = 0.2
_MIN_RETRY_AFTER_S, _MAX_RETRY_AFTER_S = 1.0, 60.0


class Admission:
    """A bound on work in progress. Nobody waits here: a caller is admitted or refused.

    Args:
        capacity: Permits that may be held at one time.
        unit: What a permit stands for, for the message to the caller.
        clock: Monotonic seconds.
    """

    def __init__(self, capacity: int, *, unit: str, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._unit = unit
        self._clock = clock
        self._held_s: float | None = None
        self.n_held = 0

    @contextmanager
    def permits(self, n_permits: int = 1) -> Iterator[None]:
        """Hold permits while the block runs. A caller that wants more than all is admitted when none is held.

        Raises:
            OverloadedError: Too few permits are free.
        """
        if self.n_held and self.n_held + n_permits > self._capacity:
            raise OverloadedError(
                f"{self.n_held} of {self._capacity} {self._unit} are being served; try again later",
                retry_after_s=self._retry_after_s(),
            )
        self.n_held += n_permits
        started_s = self._clock()
        try:
            yield
        finally:
            self.n_held -= n_permits
            held_s = self._clock() - started_s
            known_s = held_s if self._held_s is None else self._held_s
            self._held_s = known_s + _SMOOTHING * (held_s - known_s)

    def _retry_after_s(self) -> float:
        """How long permits were held of late: by then some of those held now have been returned."""
        return min(max(self._held_s or 0.0, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)

"""A circuit breaker: a teacher that is down is not asked again for every prompt."""

from collections.abc import Callable
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


class Breaker:
    """Opens after consecutive failures; after a pause one call may probe whether the teacher is back.

    Only failures that speak about the teacher's health count: it cannot be reached, answers 5xx, times
    out or breaks the protocol. A refusal of one request (4xx) says nothing about the next one.

    Args:
        clock: Monotonic seconds.
        threshold: Consecutive failed calls that open the breaker.
        pause_s: Seconds for which an open breaker refuses every call.
    """

    def __init__(self, clock: Callable[[], float], *, threshold: int = 8, pause_s: float = 10.0) -> None:
        self._clock = clock
        self._threshold = threshold
        self._pause_s = pause_s
        self._n_failures = 0
        self._opened_s: float | None = None
        self._down_since_s: float | None = None
        self._probing = False

    @property
    def down_s(self) -> float:
        """Seconds since the breaker first opened without having closed again."""
        return 0.0 if self._down_since_s is None else self._clock() - self._down_since_s

    @property
    def state(self) -> BreakerState:
        """``half_open`` once the pause is over, until a probe has succeeded."""
        if self._opened_s is None:
            return "closed"
        return "half_open" if self._clock() - self._opened_s >= self._pause_s else "open"

    @property
    def retry_after_s(self) -> float:
        """Seconds until a probe may be sent; 0 if calls are allowed."""
        if self._opened_s is None:
            return 0.0
        return max(0.0, self._opened_s + self._pause_s - self._clock())

    def allow(self) -> bool:
        """Whether a call may be made now. In ``half_open`` only one call at a time may."""
        state = self.state
        if state == "half_open" and not self._probing:
            self._probing = True
            return True
        return state == "closed"

    def succeeded(self) -> None:
        """Record an answer: the breaker closes."""
        self._n_failures = 0
        self._opened_s = self._down_since_s = None
        self._probing = False

    def failed(self) -> None:
        """Record a failure of the teacher: the breaker opens at the threshold, or again after a probe."""
        self._n_failures += 1
        if self._probing or self._n_failures >= self._threshold:
            self._opened_s = self._clock()
            if self._down_since_s is None:
                self._down_since_s = self._opened_s
        self._probing = False

    def released(self) -> None:
        """Record a call that ended without a verdict (cancelled, refused): a probe may be sent again."""
        self._probing = False

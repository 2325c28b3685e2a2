"""Admission: what cannot be served soon is refused at once, so that what was admitted stays fast.

Only a stream waits for its turn: it has no end in sight, and whoever sends it is slowed down by that.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

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


class PatientAdmission:
    """A bound on work in progress whose callers wait, first come, first served.

    Args:
        capacity: Permits that may be held at one time. Who wants more has its turn when none is held.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.n_held = 0

    @asynccontextmanager
    async def permits(self, n_permits: int) -> AsyncIterator[None]:
        """Hold permits while the block runs, as soon as they are free."""
        await self.take(n_permits)
        try:
            yield
        finally:
            self.give_back(n_permits)

    async def take(self, n_permits: int) -> None:
        """Wait until permits are free, and hold them until ``give_back``."""
        if self._waiting or not self._fits(n_permits):
            await self._turn(n_permits)
        else:
            self.n_held += n_permits

    def give_back(self, n_permits: int) -> None:
        """Let others have permits that are held."""
        self.n_held -= n_permits
        self._admit_waiting()

    async def _turn(self, n_permits: int) -> None:
        """Wait until the permits are held."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((n_permits, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # The turn came in the moment in which the caller left.
                self.n_held -= n_permits
            self._admit_waiting()
            raise

    def _fits(self, n_permits: int) -> bool:
        return not self.n_held or self.n_held + n_permits <= self._capacity

    def _admit_waiting(self) -> None:
        while self._waiting:
            n_permits, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(n_permits):
                    return
                self.n_held += n_permits
                turn.set_result(None)
            self._waiting.popleft()

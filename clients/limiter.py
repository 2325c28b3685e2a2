"""How much one teacher may be asked: calls in flight, requests per minute, tokens per minute."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from clients.types import Limits


class _Bucket:
    """A token bucket that lends: a caller takes at once and waits until its share has been earned.

    So a call that is larger than the bucket waits long, but not for ever.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._rate_per_s = per_minute / 60.0
        # One second's worth may go out at once, so that the rate holds over any minute.
        self._burst = max(1.0, self._rate_per_s)
        self._clock = clock
        self._level = self._burst
        self._updated_s = clock()

    def take(self, amount: float) -> float:
        """Take ``amount`` and return the seconds to wait for it. A negative amount gives back."""
        now_s = self._clock()
        self._level = min(self._burst, self._level + (now_s - self._updated_s) * self._rate_per_s)
        self._updated_s = now_s
        self._level -= amount
        return max(0.0, -self._level / self._rate_per_s)


class TokenReservation:
    """Tokens reserved for one call, settled by what the teacher says it used."""

    def __init__(self, bucket: _Bucket | None, reserved_tokens: int) -> None:
        self._bucket = bucket
        self._reserved_tokens = reserved_tokens

    def settle(self, used_tokens: int) -> None:
        """Replace the estimate by the real usage."""
        if self._bucket is not None:
            self._bucket.take(used_tokens - self._reserved_tokens)
            self._reserved_tokens = used_tokens


class Limiter:
    """The limits of one teacher within this process.

    Args:
        limits: From ``persyn.yaml``.
        clock: Monotonic seconds.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] | None = None) -> None:
        clock = clock or asyncio.get_running_loop().time
        self.limits = limits
        self.n_in_flight = 0
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._turn = asyncio.Lock()
        self._requests = _Bucket(limits.requests_per_min, clock) if limits.requests_per_min else None
        self._tokens = _Bucket(limits.tokens_per_min, clock) if limits.tokens_per_min else None

    @asynccontextmanager
    async def slot(self, estimated_tokens: int) -> AsyncIterator[TokenReservation]:
        """Wait for a free slot within all limits; hold it while the block runs."""
        async with self._slots:
            await self._wait_for_share(estimated_tokens)
            self.n_in_flight += 1
            try:
                yield TokenReservation(self._tokens, estimated_tokens)
            finally:
                self.n_in_flight -= 1

    async def _wait_for_share(self, estimated_tokens: int) -> None:
        """Take a call's share of both rates and wait until it is earned.

        One caller at a time, so that one who leaves while waiting gives back what no other counts on.
        """
        wanted = ((self._requests, 1), (self._tokens, estimated_tokens))
        shares = [(bucket, amount) for bucket, amount in wanted if bucket is not None]
        if not shares:
            return
        async with self._turn:
            try:
                await asyncio.sleep(max([bucket.take(amount) for bucket, amount in shares]))
            except asyncio.CancelledError:
                for bucket, amount in shares:
                    bucket.take(-amount)
                raise

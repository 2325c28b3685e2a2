"""Concurrency and rates of one teacher, in virtual time."""

import asyncio
import selectors

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.limiter import Limiter
from clients.types import Limits


class _JumpingSelector(selectors.DefaultSelector):
    """Never blocks: where the loop would wait, its clock moves on."""

    now_s = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise AssertionError("the loop would wait for ever")
        self.now_s += timeout
        return super().select(0)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self):
        return self._virtual.now_s


def _run(main):
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(main())


def _admissions(limits, tokens, hold_s=0.0, gaps=None):
    """Virtual times at which calls of ``tokens`` are admitted, ``gaps`` seconds apart."""

    async def main():
        limiter, times = Limiter(limits), []

        async def call(amount):
            async with limiter.slot(amount):
                times.append(asyncio.get_running_loop().time())
                await asyncio.sleep(hold_s)

        async with asyncio.TaskGroup() as group:
            for amount, gap in zip(tokens, gaps or [0.0] * len(tokens), strict=True):
                await asyncio.sleep(gap)
                group.create_task(call(amount))
        return times

    return _run(main)


@given(concurrency=st.integers(1, 5), n_calls=st.integers(1, 30))
@settings(max_examples=30)
def test_never_more_in_flight_than_the_limit(concurrency, n_calls):
    """Calls in flight reach the concurrency limit and never pass it."""

    async def main():
        limiter, seen = Limiter(Limits(concurrency=concurrency)), []

        async def call():
            async with limiter.slot(0):
                seen.append(limiter.n_in_flight)
                await asyncio.sleep(1.0)

        async with asyncio.TaskGroup() as group:
            for _ in range(n_calls):
                group.create_task(call())
        assert limiter.n_in_flight == 0
        return max(seen)

    assert _run(main) == min(concurrency, n_calls)


@given(
    per_minute=st.integers(1, 600),
    gaps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=25),
)
@settings(max_examples=60)
def test_any_window_holds_burst_plus_rate_requests_at_most(per_minute, gaps):
    """Over any window of t seconds no more than burst + rate * t requests go out."""
    times = _admissions(Limits(concurrency=100, requests_per_min=per_minute), [0] * len(gaps), gaps=gaps)
    rate_per_s = per_minute / 60.0
    burst = max(1.0, rate_per_s)
    assert len(times) == len(gaps)
    for first, start_s in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + rate_per_s * (times[last] - start_s) + 1e-6


@given(tokens=st.lists(st.integers(0, 400), min_size=1, max_size=20))
@settings(max_examples=60)
def test_any_window_holds_burst_plus_rate_tokens_at_most(tokens):
    """Over any window the tokens of all calls but the first stay within burst + rate * t."""
    times = _admissions(Limits(concurrency=100, tokens_per_min=600), tokens)
    for first in range(len(times)):
        for last in range(first, len(times)):
            # The first call may have been saved up for before the window began.
            spent = sum(tokens[first + 1 : last + 1])
            assert spent <= 10.0 + 10.0 * (times[last] - times[first]) + 1e-6


def test_rate_is_reached():
    """A limit of 60 per minute lets one request out at once and one more each second."""
    times = _admissions(Limits(concurrency=100, requests_per_min=60), [0] * 4)
    assert times == pytest.approx([0.0, 1.0, 2.0, 3.0])


def test_unlimited_rates_do_not_wait():
    """Without rates only the concurrency holds a call back."""
    assert _admissions(Limits(concurrency=2), [10**9] * 4, hold_s=1.0) == pytest.approx([0.0, 0.0, 1.0, 1.0])


def test_call_larger_than_a_minute_of_tokens_is_not_starved():
    """A call of more tokens than the bucket ever holds waits until they are earned, not for ever."""
    times = _admissions(Limits(concurrency=4, tokens_per_min=60), [1, 600, 1])
    assert times == pytest.approx([0.0, 600.0, 601.0])


@pytest.mark.parametrize(("used", "next_at_s"), [(1, 0.0), (100, 1.0), (200, 101.0)])
def test_settling_replaces_the_estimate(used, next_at_s):
    """The next call waits for what the last one used, not for what had been reserved."""

    async def main():
        limiter = Limiter(Limits(concurrency=1, tokens_per_min=60))
        async with limiter.slot(100) as reservation:
            began_s = asyncio.get_running_loop().time()
            reservation.settle(used)
        async with limiter.slot(1):
            return asyncio.get_running_loop().time() - began_s

    assert _run(main) == pytest.approx(next_at_s)


@pytest.mark.parametrize("wait_s", [0.0, 0.5])
def test_caller_that_leaves_the_queue_is_not_charged(wait_s):
    """Callers cancelled while they wait for the rate cost the others nothing."""

    async def main():
        limiter, loop = Limiter(Limits(concurrency=50, requests_per_min=60)), asyncio.get_running_loop()

        async def call():
            async with limiter.slot(0):
                return loop.time()

        first = asyncio.create_task(call())
        leavers = [asyncio.create_task(call()) for _ in range(30)]
        stayer = asyncio.create_task(call())
        await asyncio.sleep(wait_s)
        for task in leavers:
            task.cancel()
        await asyncio.gather(*leavers, return_exceptions=True)
        assert all(task.cancelled() for task in leavers)
        return await first, await stayer

    assert _run(main) == pytest.approx((0.0, 1.0))


def test_cancelled_or_failed_calls_free_their_slot():
    """A slot is free again however its call ended."""

    async def main():
        limiter = Limiter(Limits(concurrency=1))

        async def call():
            async with limiter.slot(0):
                await asyncio.sleep(1000.0)

        task = asyncio.create_task(call())
        await asyncio.sleep(1.0)
        assert limiter.n_in_flight == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(RuntimeError, match="boom"):
            async with limiter.slot(0):
                raise RuntimeError("boom")
        async with asyncio.timeout(1.0), limiter.slot(0):
            return limiter.n_in_flight

    assert _run(main) == 1

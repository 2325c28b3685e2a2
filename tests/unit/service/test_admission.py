"""Admission: a bound that refuses at once, and one that lets callers wait."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Admission, PatientAdmission
from service.errors import OverloadedError


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_bound_is_exact() -> None:
    """As many permits as the capacity are given; one more is refused; a returned one is given again."""
    admission = Admission(3, unit="calls", clock=Clock())
    with admission.permits(2), admission.permits(1):
        with pytest.raises(OverloadedError), admission.permits(1):
            pytest.fail("admitted above the capacity")
        assert admission.n_held == 3
    with admission.permits(3):
        assert admission.n_held == 3
    assert admission.n_held == 0


def test_a_call_larger_than_the_bound_is_admitted_alone() -> None:
    """One call above the capacity is served when nothing else is, else it could never be."""
    admission = Admission(3, unit="prompts", clock=Clock())
    with admission.permits(10), pytest.raises(OverloadedError), admission.permits(1):
        pytest.fail("admitted beside a call that fills the queue")
    with admission.permits(1), pytest.raises(OverloadedError), admission.permits(10):
        pytest.fail("admitted above the capacity")


def test_permits_come_back_after_a_failure() -> None:
    """An exception inside the block returns its permits: no leak, no self-made 429."""
    admission = Admission(1, unit="calls", clock=Clock())
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.permits():
            _ = 1 / 0
    assert admission.n_held == 0


def test_retry_after_follows_how_long_permits_were_held() -> None:
    """The hint is how long callers held permits of late, within a second and a minute."""
    clock = Clock()
    admission = Admission(1, unit="calls", clock=clock)

    def hint_s() -> float:
        with admission.permits(), pytest.raises(OverloadedError) as refusal, admission.permits():
            pytest.fail("admitted")
        return refusal.value.retry_after_s

    assert hint_s() == 1.0
    for _ in range(50):
        with admission.permits():
            clock.now_s += 12.0
    assert hint_s() == pytest.approx(12.0, rel=0.01)
    for _ in range(50):
        with admission.permits():
            clock.now_s += 900.0
    assert hint_s() == 60.0


class TestPatience:
    """Permits that are waited for."""

    async def test_turns_come_in_order(self) -> None:
        """Who asked first is served first, also where a later one would fit already."""
        admission = PatientAdmission(4)
        turns: list[str] = []

        async def ask(name: str, n_permits: int) -> None:
            async with admission.permits(n_permits):
                turns.append(name)
                assert admission.n_held <= 4
                await asyncio.sleep(0)

        await admission.take(3)
        async with asyncio.TaskGroup() as group:
            for name, n_permits in (("a", 2), ("b", 1), ("c", 4), ("d", 1)):
                group.create_task(ask(name, n_permits))
            await asyncio.sleep(0)
            assert turns == []
            admission.give_back(3)
        assert turns == ["a", "b", "c", "d"]
        assert admission.n_held == 0

    async def test_more_than_all_has_its_turn_alone(self) -> None:
        """A caller that wants more than there is waits until none is held, and then has them."""
        admission = PatientAdmission(2)
        await admission.take(1)
        waiting = asyncio.ensure_future(admission.take(5))
        await asyncio.sleep(0)
        assert not waiting.done()
        admission.give_back(1)
        await waiting
        assert admission.n_held == 5

    @given(
        capacity=st.integers(1, 5),
        steps=st.lists(st.tuples(st.sampled_from(["ask", "leave", "turn"]), st.integers(1, 7)), max_size=40),
    )
    def test_callers_that_leave_at_any_moment_lose_no_permit(
        self, capacity: int, steps: list[tuple[str, int]]
    ) -> None:
        """Cancelled while waiting, in the moment of its turn, or while holding: all comes back."""

        async def run() -> None:
            admission = PatientAdmission(capacity)
            holding: dict[int, int] = {}

            async def hold(name: int, n_permits: int) -> None:
                async with admission.permits(n_permits):
                    holding[name] = n_permits
                    try:
                        await asyncio.Event().wait()
                    finally:
                        del holding[name]

            tasks: list[asyncio.Task[None]] = []
            for step, number in steps:
                if step == "ask":
                    tasks.append(asyncio.ensure_future(hold(len(tasks), number)))
                elif step == "leave" and tasks:
                    tasks[number % len(tasks)].cancel()
                else:
                    for _ in range(number):
                        await asyncio.sleep(0)
                assert len(holding) <= 1 or sum(holding.values()) <= capacity
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert admission.n_held == 0
            # Nobody who left stands in the way.
            async with asyncio.timeout(1):
                await admission.take(capacity)

        asyncio.run(run())

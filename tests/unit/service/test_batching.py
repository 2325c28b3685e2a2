"""Batcher: many awaiting callers, one call per batch on the model thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching import Batcher, running
from service.errors import NotReadyError


class Counts:
    """A BatchObserver that remembers."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.n_failures = 0

    def batch_done(self, n_items: int, duration_s: float) -> None:
        assert duration_s >= 0
        self.sizes.append(n_items)

    def batch_failed(self) -> None:
        self.n_failures += 1


class Model:
    """Doubles its inputs; can be held at its first batch, and raises for poison."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.entered = threading.Event()
        self._gate = threading.Event()
        if not held:
            self._gate.set()

    def release(self) -> None:
        self._gate.set()

    async def until_busy(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.threads.add(threading.get_ident())
        self.batches.append(list(items))
        self.entered.set()
        assert self._gate.wait(10)
        if any(item < 0 for item in items):
            raise ValueError("poison")
        return [2 * item for item in items]


@asynccontextmanager
async def batching(
    work: Callable[[Sequence[int]], Sequence[int]], *, budget: int = 100, observer: Counts | None = None
) -> AsyncIterator[Batcher[int, int]]:
    """A running batcher in which each item costs its absolute value, at least 1."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        batcher: Batcher[int, int] = Batcher(
            work,
            cost=lambda item: max(1, abs(item)),
            budget=budget,
            thread=thread,
            observer=observer or Counts(),
        )
        async with running(batcher):
            yield batcher


async def test_callers_that_wait_share_one_call() -> None:
    """All that arrives while the model is busy goes into the next call together, on one thread."""
    model = Model(held=True)
    async with batching(model) as batcher, asyncio.TaskGroup() as group:
        first = group.create_task(batcher.submit([1]))
        await model.until_busy()
        others = [group.create_task(batcher.submit([n])) for n in range(2, 7)]
        await asyncio.sleep(0)
        model.release()
    assert first.result() == [2]
    assert [other.result() for other in others] == [[2 * n] for n in range(2, 7)]
    assert model.batches == [[1], [2, 3, 4, 5, 6]]
    assert len(model.threads) == 1


async def test_a_large_call_does_not_hold_up_a_small_one() -> None:
    """Callers take turns item by item: the small call is in the very next batch."""
    model = Model(held=True)
    async with batching(model, budget=4) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.submit([1]))
        await model.until_busy()
        group.create_task(batcher.submit([1] * 40))
        await asyncio.sleep(0)
        group.create_task(batcher.submit([3]))
        await asyncio.sleep(0)
        model.release()
    assert 3 in model.batches[1]


async def test_a_cancelled_caller_is_dropped_before_the_work() -> None:
    """A caller that leaves while it waits costs no forward pass, and its neighbours are answered."""
    model = Model(held=True)
    async with batching(model) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.submit([1]))
        await model.until_busy()
        leaving = group.create_task(batcher.submit([50, 51]))
        staying = group.create_task(batcher.submit([7]))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        model.release()
    assert leaving.cancelled()
    assert staying.result() == [14]
    assert model.batches == [[1], [7]]


async def test_only_the_guilty_item_fails() -> None:
    """One item that makes a batch raise gets the error; all others get their outputs."""
    model, counts = Model(held=True), Counts()
    async with batching(model, observer=counts) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.submit([1]))
        await model.until_busy()
        mixed = group.create_task(batcher.submit([2, -3, 4]))
        other = group.create_task(batcher.submit([5]))
        await asyncio.sleep(0)
        model.release()
    outputs = mixed.result()
    assert [outputs[0], outputs[2]] == [4, 8]
    assert isinstance(outputs[1], ValueError)
    assert other.result() == [10]
    assert counts.n_failures == 2  # the batch, then the guilty item alone


async def test_the_loop_outlives_failures() -> None:
    """After a hundred failed calls the next one is served: no failure ends the loop."""
    async with batching(Model()) as batcher:
        for _ in range(100):
            (outcome,) = await batcher.submit([-1])
            assert isinstance(outcome, ValueError)
        assert await batcher.submit([21]) == [42]


async def test_a_wrong_number_of_outputs_is_a_failure() -> None:
    """Outputs that cannot be assigned to items are never handed out."""
    async with batching(lambda items: [1] * (len(items) + 1)) as batcher:
        (outcome,) = await batcher.submit([1])
    assert isinstance(outcome, RuntimeError)


async def test_an_item_above_the_budget_goes_alone() -> None:
    """An item that costs more than a whole batch is served by itself, not for ever put off."""
    model = Model(held=True)
    async with batching(model, budget=5) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.submit([1]))
        await model.until_busy()
        group.create_task(batcher.submit([2, 1000, 2]))
        await asyncio.sleep(0)
        model.release()
    assert [1000] in model.batches


async def test_closing_answers_what_was_admitted_and_refuses_the_rest() -> None:
    """On the way out open calls are finished; a new call is told that the service stops."""
    model = Model(held=True)
    async with asyncio.TaskGroup() as group, batching(model, budget=1) as batcher:
        open_call = group.create_task(batcher.submit([1, 2, 3]))
        await model.until_busy()
        batcher.close()
        with pytest.raises(NotReadyError):
            await batcher.submit([9])
        model.release()
    assert open_call.result() == [2, 4, 6]
    assert not batcher.running


async def test_a_batcher_that_does_not_run_refuses() -> None:
    """A call to a batcher without its loop would wait for ever, so it is refused."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        idle: Batcher[int, int] = Batcher(
            Model(), cost=lambda _: 1, budget=1, thread=thread, observer=Counts()
        )
        with pytest.raises(NotReadyError):
            await idle.submit([1])


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.lists(st.integers(-3, 30), max_size=6), min_size=1, max_size=8),
    budget=st.integers(1, 40),
)
def test_every_item_gets_its_own_output(calls: list[list[int]], budget: int) -> None:
    """For any mix of callers, poison and budgets: right outputs in place, no batch above the budget."""

    async def scenario() -> None:
        model = Model()
        async with batching(model, budget=budget) as batcher, asyncio.TaskGroup() as group:
            tasks = [group.create_task(batcher.submit(items)) for items in calls]
        for items, task in zip(calls, tasks, strict=True):
            for item, output in zip(items, task.result(), strict=True):
                assert isinstance(output, ValueError) if item < 0 else output == 2 * item
        for batch in model.batches:
            assert len(batch) == 1 or sum(max(1, abs(item)) for item in batch) <= budget

    asyncio.run(scenario())

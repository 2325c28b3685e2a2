"""Batcher: many awaiting callers, one call per batch on a lane."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching import Batcher, running
from service.errors import DeadlineExceededError, NotReadyError
from service.lanes import Lanes


class Counts:
    """A BatchObserver that remembers."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.n_failures = 0
        self.n_dropped = 0

    def batch_done(self, n_items: int, n_tokens: int, duration_s: float) -> None:
        assert duration_s >= 0
        assert n_tokens >= n_items
        self.sizes.append(n_items)

    def batch_failed(self) -> None:
        self.n_failures += 1

    def items_dropped(self, n_items: int) -> None:
        self.n_dropped += n_items


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
    work: Callable[[Sequence[int]], Sequence[int]],
    *,
    budget: int = 100,
    observer: Counts | None = None,
    n_lanes: int = 1,
) -> AsyncIterator[Batcher[int, int]]:
    """A running batcher in which each item costs its absolute value, at least 1."""
    with closing(Lanes(n_lanes, n_lanes, use_cores=lambda _: None)) as lanes:
        batcher: Batcher[int, int] = Batcher(
            work,
            cost=lambda item: max(1, abs(item)),
            budget=budget,
            lanes=lanes,
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
    assert first.result().outputs == [2]
    assert [other.result().outputs for other in others] == [[2 * n] for n in range(2, 7)]
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
    assert staying.result().outputs == [14]
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
    outputs = mixed.result().outputs
    assert [outputs[0], outputs[2]] == [4, 8]
    assert isinstance(outputs[1], ValueError)
    assert other.result().outputs == [10]
    # Four items in which one is guilty: the batch, the half with it, and the item alone.
    assert counts.n_failures == 3


async def test_the_loop_outlives_failures() -> None:
    """After a hundred failed calls the next one is served: no failure ends the loop."""
    async with batching(Model()) as batcher:
        for _ in range(100):
            (outcome,) = (await batcher.submit([-1])).outputs
            assert isinstance(outcome, ValueError)
        assert (await batcher.submit([21])).outputs == [42]


async def test_a_wrong_number_of_outputs_is_a_failure() -> None:
    """Outputs that cannot be assigned to items are never handed out."""
    async with batching(lambda items: [1] * (len(items) + 1)) as batcher:
        (outcome,) = (await batcher.submit([1])).outputs
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


async def test_a_failed_batch_is_halved() -> None:
    """Finding one guilty item among 64 takes about two calls per halving, not one per item."""
    model, counts = Model(held=True), Counts()
    async with batching(model, budget=10_000, observer=counts) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.submit([1]))
        await model.until_busy()
        call = group.create_task(batcher.submit([*range(1, 41), -7, *range(1, 24)]))
        await asyncio.sleep(0)
        model.release()
    outputs = call.result().outputs
    assert [index for index, output in enumerate(outputs) if isinstance(output, Exception)] == [40]
    assert counts.n_failures == 7
    assert len(model.batches) == 1 + 1 + 2 * 6


async def test_an_expired_call_is_dropped_before_the_work() -> None:
    """What has not begun at its deadline costs no work and says so; what has begun is finished."""
    model, counts = Model(held=True), Counts()
    async with batching(model, observer=counts) as batcher, asyncio.TaskGroup() as group:
        now_s = asyncio.get_running_loop().time()
        first = group.create_task(batcher.submit([1], deadline_s=now_s + 60))
        await model.until_busy()
        late = group.create_task(batcher.submit([5, 6], deadline_s=now_s))
        in_time = group.create_task(batcher.submit([7], deadline_s=now_s + 60))
        await asyncio.sleep(0)
        model.release()
    assert first.result().outputs == [2]
    assert in_time.result().outputs == [14]
    assert [type(output) for output in late.result().outputs] == [DeadlineExceededError] * 2
    assert model.batches == [[1], [7]]
    assert counts.n_dropped == 2


async def test_interactive_items_go_before_bulk_ones() -> None:
    """A bulk call that came first gives way; it gets the room left over, and a fourth of the batches."""
    model = Model(held=True)
    async with batching(model, budget=3) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.submit([1]))
        await model.until_busy()
        group.create_task(batcher.submit([3] * 4, priority="bulk"))
        await asyncio.sleep(0)
        group.create_task(batcher.submit([2] * 6))
        group.create_task(batcher.submit([1], priority="bulk"))
        await asyncio.sleep(0)
        model.release()
    # 2 leaves room for the small bulk item; of four batches that both could fill one belongs to bulk.
    assert model.batches[:6] == [[1], [2, 1], [2], [2], [3], [2]]
    assert sorted(item for batch in model.batches for item in batch) == [1, 1, *[2] * 6, *[3] * 4]


async def test_a_large_item_is_passed_over_once() -> None:
    """Smaller items use the room that a large one cannot, and the large one begins the next batch."""
    model = Model(held=True)
    async with batching(model, budget=10) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.submit([1]))
        await model.until_busy()
        for items in ([6], [9], [2], [2]):
            group.create_task(batcher.submit(items))
            await asyncio.sleep(0)
        model.release()
    assert model.batches == [[1], [6, 2, 2], [9]]


async def test_out_of_memory_is_survived() -> None:
    """A batch that is too large for the memory is served in parts."""

    def work(items: Sequence[int]) -> list[int]:
        if len(items) > 4:
            raise MemoryError
        return [2 * item for item in items]

    async with batching(work) as batcher:
        assert (await batcher.submit([1] * 20)).outputs == [2] * 20
        assert batcher.n_failures_in_row == 0


async def test_what_is_no_exception_does_not_end_the_loop() -> None:
    """A SystemExit in the work is that item's failure, and the next call is served."""

    def work(items: Sequence[int]) -> list[int]:
        if items == [1]:
            raise SystemExit(3)
        return list(items)

    async with batching(work) as batcher:
        (outcome,) = (await batcher.submit([1])).outputs
        assert isinstance(outcome, RuntimeError)
        assert batcher.n_failures_in_row == 1
        assert (await batcher.submit([2])).outputs == [2]
        assert batcher.n_failures_in_row == 0


async def test_a_batch_that_hangs_is_seen() -> None:
    """While a batch is worked on its age is known: a hung one can be told from an idle batcher."""
    model = Model(held=True)
    async with batching(model) as batcher:
        assert batcher.busy_s == 0
        call = asyncio.ensure_future(batcher.submit([1]))
        await model.until_busy()
        assert batcher.busy_s > 0
        model.release()
        served = await call
        assert batcher.busy_s == 0
    assert served.work_s > 0
    assert served.queue_s >= 0


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
    assert open_call.result().outputs == [2, 4, 6]
    assert not batcher.running


async def test_a_batcher_that_does_not_run_refuses() -> None:
    """A call to a batcher without its loop would wait for ever, so it is refused."""
    with closing(Lanes(1, 1, use_cores=lambda _: None)) as lanes:
        idle: Batcher[int, int] = Batcher(Model(), cost=lambda _: 1, budget=1, lanes=lanes, observer=Counts())
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
            tasks = [
                group.create_task(batcher.submit(items, priority="bulk" if number % 2 else "interactive"))
                for number, items in enumerate(calls)
            ]
        for items, task in zip(calls, tasks, strict=True):
            for item, output in zip(items, task.result().outputs, strict=True):
                assert isinstance(output, ValueError) if item < 0 else output == 2 * item
        for batch in model.batches:
            assert len(batch) == 1 or sum(max(1, abs(item)) for item in batch) <= budget

    asyncio.run(scenario())


async def test_free_lanes_share_what_waits() -> None:
    """What comes at one time is halved between two free lanes, not taken by the first one."""
    model = Model()
    async with batching(model, n_lanes=2) as batcher:
        await asyncio.gather(*(batcher.submit([2]) for _ in range(20)))
    assert sorted(map(len, model.batches)) == [10, 10]
    assert len(model.threads) == 2


async def test_a_single_item_has_all_lanes() -> None:
    """Fewer items than lanes: one batch on all cores, and no other beside it."""
    model = Model(held=True)
    async with asyncio.TaskGroup() as group, batching(model, n_lanes=3) as batcher:
        group.create_task(batcher.submit([1, 2]))
        await model.until_busy()
        other = group.create_task(batcher.submit([3]))
        await asyncio.sleep(0.05)
        assert model.batches == [[1, 2]]
        model.release()
        assert (await other).outputs == [6]


async def test_small_batches_wait_for_what_is_about_to_come() -> None:
    """Beside a lane that works: at the end of the wait all of it goes together."""
    model = Model(held=True)
    quiet = asyncio.Event()
    with closing(Lanes(2, 2, use_cores=lambda _: None)) as lanes:
        batcher: Batcher[int, int] = Batcher(
            model, cost=lambda _: 1, budget=9, lanes=lanes, observer=Counts(), coming=quiet.wait
        )
        async with asyncio.TaskGroup() as group, running(batcher):
            group.create_task(batcher.submit([1, 1]))
            await model.until_busy()
            while lanes.n_free or batcher.busy_s == 0:
                group.create_task(batcher.submit([1]))
                await asyncio.sleep(0)
            coming = [group.create_task(batcher.submit([5])) for _ in range(4)]
            quiet.set()
            model.release()
            await asyncio.gather(*coming)
    assert sum(batch.count(5) for batch in model.batches) == 4
    assert max(batch.count(5) for batch in model.batches) >= 2

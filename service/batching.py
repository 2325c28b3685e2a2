"""Many awaiting callers, one call per batch on the one model thread."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Literal, Protocol, TypeVar

from service.errors import DeadlineExceededError, NotReadyError

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")
Priority = Literal["interactive", "bulk"]

_BULK_TURN = 4
"""Of so many batches in a row one begins with bulk items that wait: they are slowed, never stopped."""
_LOOK_AHEAD = 64
"""Calls whose next item is too large for the room left, and that are passed over for smaller ones. Each is
first in its queue then, and the first of the next batch is taken whatever its size."""


class BatchObserver(Protocol):
    """Told of each batch; the service counts them."""

    def batch_done(self, n_items: int, n_tokens: int, duration_s: float) -> None:
        """One call on the model thread succeeded; ``n_tokens`` is what its items cost."""

    def batch_failed(self) -> None:
        """One call on the model thread raised; its halves are tried, down to the guilty item."""

    def items_dropped(self, n_items: int) -> None:
        """Items were dropped before the work: their caller had left, or its deadline had passed."""


@dataclass(frozen=True, slots=True)
class Batched(Generic[OutputT]):
    """What a caller gets: an output for each of its items or the exception that it alone raised."""

    outputs: list[OutputT | Exception]
    queue_s: float
    """Of the time that the call took, what was not spent on its own batches."""
    work_s: float
    """Duration of the batches that held its items."""


@dataclass(slots=True, eq=False)
class _Call(Generic[ItemT, OutputT]):
    """What one caller waits for."""

    items: Sequence[ItemT]
    outputs: list[OutputT | Exception | None]
    finished: "asyncio.Future[None]"
    deadline_s: float | None
    n_taken: int = 0
    n_done: int = 0
    work_s: float = 0.0

    def settle(self, index: int, output: OutputT | Exception) -> None:
        if self.outputs[index] is None:
            self.n_done += 1
        self.outputs[index] = output
        if self.n_done == len(self.items) and not self.finished.done():
            self.finished.set_result(None)

    def fail_untaken(self, error: Exception) -> int:
        """Settle all items that are in no batch yet; returns how many."""
        untaken = range(self.n_taken, len(self.items))
        self.n_taken = len(self.items)
        for index in untaken:
            self.settle(index, error)
        return len(untaken)


@dataclass(frozen=True, slots=True)
class _Slot(Generic[ItemT, OutputT]):
    """One item of one call, taken into a batch."""

    call: _Call[ItemT, OutputT]
    index: int
    cost: int

    @property
    def item(self) -> ItemT:
        return self.call.items[self.index]

    @property
    def wanted(self) -> bool:
        return not self.call.finished.done()


class Batcher(Generic[ItemT, OutputT]):
    """Collects items while the thread is busy and hands them over together: no timer, no added latency.

    A batch is bounded by the cost of its items, not by their number. Interactive items go before bulk ones,
    which get the room that is left and every fourth batch. Callers of one priority take turns item by item,
    so that one call of ten thousand does not hold up a call of one. An item whose caller has left or whose
    deadline has passed is dropped before the work. A failed batch is halved until the guilty item is alone.

    Items are not sorted by length: the engine packs rows, so neighbours of other lengths cost nothing; an
    item that does not fit in the room left is passed over once, for smaller ones.

    Args:
        work: Blocking; one output per item, in order.
        cost: What one item takes of the budget. An item above the budget goes alone.
        budget: Largest cost of one batch.
        thread: Runs one call at a time; several batchers may share it.
    """

    def __init__(
        self,
        work: Callable[[Sequence[ItemT]], Sequence[OutputT]],
        *,
        cost: Callable[[ItemT], int],
        budget: int,
        thread: Executor,
        observer: BatchObserver,
    ) -> None:
        self._work = work
        self._cost = cost
        self._budget = budget
        self._thread = thread
        self._observer = observer
        self._waiting: dict[Priority, deque[_Call[ItemT, OutputT]]] = {
            "interactive": deque(),
            "bulk": deque(),
        }
        self._arrived = asyncio.Event()
        self._closing = False
        self._n_batches = 0
        self._busy_since_s: float | None = None
        self.running = False
        self.n_failures_in_row = 0
        """Batches that raised since the last one that did not."""

    @property
    def busy_s(self) -> float:
        """For how long the batch that is being worked on has been so; 0 if none is."""
        if self._busy_since_s is None:
            return 0.0
        return perf_counter() - self._busy_since_s

    async def submit(
        self,
        items: Sequence[ItemT],
        *,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Batched[OutputT]:
        """The output of each item, or the exception that it alone raised.

        Args:
            deadline_s: Absolute event-loop time. Items that have not begun by then get a
                ``DeadlineExceededError`` and cost no work.

        Raises:
            NotReadyError: The batcher is not running.
        """
        if self._closing or not self.running:
            raise NotReadyError("the service is starting or shutting down")
        if not items:
            return Batched([], 0.0, 0.0)
        loop = asyncio.get_running_loop()
        started_s = perf_counter()
        call: _Call[ItemT, OutputT] = _Call(items, [None] * len(items), loop.create_future(), deadline_s)
        self._waiting[priority].append(call)
        self._arrived.set()
        # Cancelling the caller cancels the future, and that is how its items are dropped.
        await call.finished
        outputs = [output for output in call.outputs if output is not None]
        return Batched(outputs, max(0.0, perf_counter() - started_s - call.work_s), call.work_s)

    async def run(self) -> None:
        """Serve until ``close`` and until nothing is left to do."""
        self.running = True
        try:
            while not (self._closing and not self._has_waiting()):
                await self._arrived.wait()
                batch = self._take_batch()
                if batch:
                    await self._serve(batch)
        finally:
            self.running = False
            self._refuse_waiting()

    def close(self) -> None:
        """Refuse new calls; ``run`` returns when those admitted are answered."""
        self._closing = True
        self._arrived.set()

    def _has_waiting(self) -> bool:
        return any(self._waiting.values())

    def _refuse_waiting(self) -> None:
        """Nobody waits for a loop that has ended."""
        for queue in self._waiting.values():
            for call in queue:
                call.fail_untaken(NotReadyError("the service is shutting down"))
            queue.clear()

    def _take_batch(self) -> list[_Slot[ItemT, OutputT]]:
        """The next items within the budget, one of each waiting call in turn."""
        self._n_batches += 1
        order: tuple[Priority, Priority] = ("interactive", "bulk")
        if self._n_batches % _BULK_TURN == 0:
            order = ("bulk", "interactive")
        batch: list[_Slot[ItemT, OutputT]] = []
        room = self._budget
        for priority in order:
            room = self._fill(batch, self._waiting[priority], room)
        if not self._has_waiting() and not self._closing:
            self._arrived.clear()
        return batch

    def _fill(
        self, batch: list[_Slot[ItemT, OutputT]], waiting: deque[_Call[ItemT, OutputT]], room: int
    ) -> int:
        """Take items of one queue; returns the room left."""
        now_s = asyncio.get_running_loop().time()
        passed_over: list[_Call[ItemT, OutputT]] = []
        while waiting and room > 0 and len(passed_over) < _LOOK_AHEAD:
            call = waiting.popleft()
            if call.finished.done():
                self._observer.items_dropped(len(call.items) - call.n_taken)
                continue
            if call.deadline_s is not None and now_s >= call.deadline_s:
                late = DeadlineExceededError("the deadline passed before the prompt's turn came")
                self._observer.items_dropped(call.fail_untaken(late))
                continue
            cost = self._cost(call.items[call.n_taken])
            if batch and cost > room:
                passed_over.append(call)
                continue
            batch.append(_Slot(call, call.n_taken, cost))
            room -= cost
            call.n_taken += 1
            if call.n_taken < len(call.items):
                waiting.append(call)
        waiting.extendleft(reversed(passed_over))
        return room

    async def _serve(self, batch: Sequence[_Slot[ItemT, OutputT]]) -> None:
        outputs = await self._call_thread(batch)
        if isinstance(outputs, Exception) and len(batch) > 1:
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                wanted = [slot for slot in half if slot.wanted]
                if wanted:
                    await self._serve(wanted)
        elif isinstance(outputs, Exception):
            batch[0].call.settle(batch[0].index, outputs)
        else:
            for slot, output in zip(batch, outputs, strict=True):
                slot.call.settle(slot.index, output)

    async def _call_thread(self, batch: Sequence[_Slot[ItemT, OutputT]]) -> Sequence[OutputT] | Exception:
        """The outputs of a batch, or whatever its work raised: the loop outlives every failure."""
        loop = asyncio.get_running_loop()
        items = [slot.item for slot in batch]
        self._busy_since_s = started_s = perf_counter()
        working = loop.run_in_executor(self._thread, self._work, items)
        await asyncio.wait([working])
        self._busy_since_s = None
        duration_s = perf_counter() - started_s
        for call in {id(slot.call): slot.call for slot in batch}.values():
            call.work_s += duration_s
        failure = working.exception()
        if failure is None and len(working.result()) != len(items):
            failure = RuntimeError(f"{len(working.result())} outputs for {len(items)} items")
        if failure is not None:
            self.n_failures_in_row += 1
            self._observer.batch_failed()
            # What is no Exception (a SystemExit in the work) must not end the loop either.
            return failure if isinstance(failure, Exception) else RuntimeError(repr(failure))
        self.n_failures_in_row = 0
        self._observer.batch_done(len(items), sum(slot.cost for slot in batch), duration_s)
        return working.result()


@asynccontextmanager
async def running(batcher: Batcher[ItemT, OutputT]) -> AsyncIterator[Batcher[ItemT, OutputT]]:
    """Run a batcher while the block runs; on the way out, what was admitted is answered first."""
    async with asyncio.TaskGroup() as group:
        group.create_task(batcher.run())
        # One turn of the loop, so that the first caller finds it running.
        await asyncio.sleep(0)
        try:
            yield batcher
        finally:
            batcher.close()

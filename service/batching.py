"""Many awaiting callers, one call per batch on a lane."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Protocol

from service.batch_queue import BatchQueue, ItemT, OutputT, Priority, Slot
from service.errors import NotReadyError
from service.lanes import Lane, Lanes

_GATHER_S = 0.002
"""A lane waits so long at most for items that are about to come, and only if another lane is working."""
_TURNS = 3


class BatchObserver(Protocol):
    """Told of each batch; the service counts them."""

    def batch_done(self, n_items: int, n_tokens: int, duration_s: float) -> None:
        """One batch succeeded; ``n_tokens`` is what its items cost."""

    def batch_failed(self) -> None:
        """One batch raised; its halves are tried, down to the guilty item."""

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


@dataclass(frozen=True, slots=True, eq=False)
class _Work(Generic[ItemT, OutputT]):
    """A batch that is being worked on."""

    batch: Sequence[Slot[ItemT, OutputT]]
    started_s: float
    done: "asyncio.Future[Sequence[OutputT]]"

    @property
    def cost(self) -> int:
        return sum(slot.cost for slot in self.batch)


class Batcher(Generic[ItemT, OutputT]):
    """Collects items while the lanes are busy and hands them over together; what finds them free never waits.

    Where several lanes are free, what waits is shared out among them; fewer items than lanes are worked on by
    all cores together.

    A batch is bounded by the cost of its items, not by their number; who is in it, the queue says. A failed
    batch is halved until the guilty item is alone.

    Args:
        work: Blocking; one output per item, in order.
        cost: What one item takes of the budget. An item above the budget goes alone.
        budget: Largest cost of one batch.
        lanes: Where work is done; several batchers may share them.
        alone: Whether the work is never done twice at one time, and always on all cores.
        coming: Returns when no item is about to be submitted.
    """

    def __init__(
        self,
        work: Callable[[Sequence[ItemT]], Sequence[OutputT]],
        *,
        cost: Callable[[ItemT], int],
        budget: int,
        lanes: Lanes,
        observer: BatchObserver,
        alone: bool = False,
        coming: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._work = work
        self._budget = budget
        self._lanes = lanes
        self._alone = alone
        self._coming = coming
        self._observer = observer
        self._queue: BatchQueue[ItemT, OutputT] = BatchQueue(cost=cost, on_dropped=observer.items_dropped)
        self._arrived = asyncio.Event()
        self._closing = False
        self._begun: set[_Work[ItemT, OutputT]] = set()
        self.running = False
        self.n_failures_in_row = 0
        """Batches that raised since the last one that did not."""

    @property
    def busy_s(self) -> float:
        """For how long the oldest batch that is being worked on has been so; 0 if none is."""
        now_s = perf_counter()
        return max((now_s - work.started_s for work in self._begun), default=0.0)

    @property
    def is_empty(self) -> bool:
        """Whether no item waits for a lane."""
        return not self._queue

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
        started_s = perf_counter()
        call = self._queue.put(items, priority, deadline_s)
        self._arrived.set()
        # Cancelling the caller cancels the future, and that is how its items are dropped.
        await call.finished
        outputs = [output for output in call.outputs if output is not None]
        return Batched(outputs, max(0.0, perf_counter() - started_s - call.work_s), call.work_s)

    async def run(self) -> None:
        """Serve until ``close`` and until nothing is left to do."""
        self.running = True
        try:
            async with asyncio.TaskGroup() as group:
                while not (self._closing and not self._queue):
                    await self._arrived.wait()
                    lane = await self._lanes.take(self, alone=self._alone)
                    await self._gather()
                    group.create_task(self._use(lane, self._begin_next(lane)))
        finally:
            self.running = False
            # Nobody waits for a loop that has ended.
            self._queue.fail(NotReadyError("the service is shutting down"))

    def close(self) -> None:
        """Refuse new calls; ``run`` returns when those admitted are answered."""
        self._closing = True
        self._arrived.set()

    async def _gather(self) -> None:
        """Beside a lane that works, wait for what is about to come: another small batch would cost more."""
        if self._coming is None or self._lanes.n_free == self._lanes.n_lanes - 1:
            return
        # Those who were just answered may have sent more: it is read in the next turns of the event loop.
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        with suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_S):
                await self._coming()

    def _room(self, lane: Lane) -> int:
        """This lane's share of what waits. Fewer items than lanes are worked on by all cores together."""
        if self._queue.n_items < self._lanes.n_lanes and self._lanes.widen(lane):
            return self._budget
        return min(self._budget, max(1, math.ceil(self._queue.cost / (self._lanes.n_free + 1))))

    async def _use(self, lane: Lane, work: "_Work[ItemT, OutputT] | None") -> None:
        """See a batch through and those that follow it, then give the lane back."""
        try:
            while work is not None:
                outputs = await self._end(work)
                # Begun before the answers of the last one are written: the lane need not wait for that.
                following = self._begin_next(lane) if self._goes_on(lane, work) else None
                await self._conclude(lane, work.batch, outputs)
                work = following
        finally:
            self._lanes.release(lane)

    def _goes_on(self, lane: Lane, last: "_Work[ItemT, OutputT]") -> bool:
        """Whether enough waits for another batch of this lane; with less, it is better to see what comes."""
        on_all_cores = len(lane.numbers) > 1 and not self._alone
        return (
            2 * self._queue.cost >= last.cost and not on_all_cores and not self._lanes.wanted_by_others(self)
        )

    def _begin_next(self, lane: Lane) -> "_Work[ItemT, OutputT] | None":
        """Begin this lane's share of what waits, if anything does."""
        batch = self._queue.take(self._room(lane))
        if not self._queue and not self._closing:
            self._arrived.clear()
        return self._begin(lane, batch) if batch else None

    def _begin(self, lane: Lane, batch: Sequence[Slot[ItemT, OutputT]]) -> "_Work[ItemT, OutputT]":
        done = self._lanes.run(lane, self._work, [slot.item for slot in batch])
        work = _Work(batch, perf_counter(), done)
        self._begun.add(work)
        return work

    async def _end(self, work: "_Work[ItemT, OutputT]") -> Sequence[OutputT] | Exception:
        """The outputs of a batch, or whatever its work raised: the loop outlives every failure."""
        await asyncio.wait([work.done])
        self._begun.discard(work)
        duration_s = perf_counter() - work.started_s
        for call in {id(slot.call): slot.call for slot in work.batch}.values():
            call.work_s += duration_s
        failure = work.done.exception()
        if failure is None and len(work.done.result()) != len(work.batch):
            failure = RuntimeError(f"{len(work.done.result())} outputs for {len(work.batch)} items")
        if failure is not None:
            self.n_failures_in_row += 1
            self._observer.batch_failed()
            # What is no Exception (a SystemExit in the work) must not end the loop either.
            return failure if isinstance(failure, Exception) else RuntimeError(repr(failure))
        self.n_failures_in_row = 0
        self._observer.batch_done(len(work.batch), work.cost, duration_s)
        return work.done.result()

    async def _conclude(
        self,
        lane: Lane,
        batch: Sequence[Slot[ItemT, OutputT]],
        outputs: Sequence[OutputT] | Exception,
    ) -> None:
        """Tell the callers; the halves of a failed batch are tried first, down to the guilty item."""
        if isinstance(outputs, Exception) and len(batch) > 1:
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                wanted = [slot for slot in half if slot.wanted]
                if wanted:
                    await self._conclude(lane, wanted, await self._end(self._begin(lane, wanted)))
        elif isinstance(outputs, Exception):
            batch[0].call.settle(batch[0].index, outputs)
        else:
            for slot, output in zip(batch, outputs, strict=True):
                slot.call.settle(slot.index, output)


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

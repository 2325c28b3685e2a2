"""Many awaiting callers, one call per batch on the model threads."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Literal, Protocol, TypeVar

from service.errors import DeadlineExceededError, NotReadyError
from service.lanes import Lane, Lanes

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")
Priority = Literal["interactive", "bulk"]

_BULK_TURN = 4
"""Of so many batches that both could fill one begins with bulk items: they are slowed, never stopped."""
_GATHER_S = 0.002
"""A lane waits so long at most for items that are about to come, and only if another lane is working."""
_TURNS = 3
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
    cost_left: int
    """Of the items that are in no batch yet."""
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
        self.n_taken, self.cost_left = len(self.items), 0
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


@dataclass(frozen=True, slots=True, eq=False)
class _Work(Generic[ItemT, OutputT]):
    """A batch that is being worked on."""

    batch: Sequence[_Slot[ItemT, OutputT]]
    started_s: float
    done: "asyncio.Future[Sequence[OutputT]]"

    @property
    def cost(self) -> int:
        return sum(slot.cost for slot in self.batch)


class Batcher(Generic[ItemT, OutputT]):
    """Collects items while the lanes are busy and hands them over together; what finds them free never waits.

    Where several lanes are free, what waits is shared out among them; fewer items than lanes are worked on by
    all cores together.

    A batch is bounded by the cost of its items, not by their number. Interactive items go before bulk ones,
    which get the room that is left and one of four batches that both could fill. Callers of one priority take
    turns item by item, so that one call of ten thousand does not hold up a call of one. An item whose caller has left or whose
    deadline has passed is dropped before the work. A failed batch is halved until the guilty item is alone.

    Items are not sorted by length: the engine packs rows, so neighbours of other lengths cost nothing; an
    item that does not fit in the room left is passed over once, for smaller ones.

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
        self._cost = cost
        self._budget = budget
        self._lanes = lanes
        self._alone = alone
        self._coming = coming
        self._observer = observer
        self._waiting: dict[Priority, deque[_Call[ItemT, OutputT]]] = {
            "interactive": deque(),
            "bulk": deque(),
        }
        self._arrived = asyncio.Event()
        self._closing = False
        self._n_contested = 0
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
        return not self._has_waiting()

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
        cost = sum(map(self._cost, items))
        call: _Call[ItemT, OutputT] = _Call(
            items, [None] * len(items), loop.create_future(), deadline_s, cost
        )
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
            async with asyncio.TaskGroup() as group:
                while not (self._closing and not self._has_waiting()):
                    await self._arrived.wait()
                    lane = await self._lanes.take(self, alone=self._alone)
                    await self._gather()
                    group.create_task(self._use(lane, self._take_batch(self._room(lane))))
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
        calls = [call for queue in self._waiting.values() for call in queue]
        n_items = sum(len(call.items) - call.n_taken for call in calls)
        if n_items < self._lanes.n_lanes and self._lanes.widen(lane):
            return self._budget
        cost = sum(call.cost_left for call in calls)
        return min(self._budget, max(1, math.ceil(cost / (self._lanes.n_free + 1))))

    def _take_batch(self, room: int) -> list[_Slot[ItemT, OutputT]]:
        """The next items within the room, one of each waiting call in turn."""
        order: tuple[Priority, Priority] = ("interactive", "bulk")
        if all(self._waiting.values()):
            self._n_contested += 1
            if self._n_contested % _BULK_TURN == 0:
                order = ("bulk", "interactive")
        batch: list[_Slot[ItemT, OutputT]] = []
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
            call.cost_left -= cost
            if call.n_taken < len(call.items):
                waiting.append(call)
        waiting.extendleft(reversed(passed_over))
        return room

    async def _use(self, lane: Lane, batch: Sequence[_Slot[ItemT, OutputT]]) -> None:
        """Work on a batch and on those that follow it, then give the lane back."""
        try:
            work = self._begin(lane, batch) if batch else None
            while work is not None:
                outputs = await self._end(work)
                # Begun before the answers of the last one are written: the lane need not wait for that.
                following = self._following(lane, work)
                if isinstance(outputs, Exception):
                    await self._halve(lane, work.batch, outputs)
                else:
                    _settle(work.batch, outputs)
                work = following
        finally:
            self._lanes.release(lane)

    def _following(self, lane: Lane, last: "_Work[ItemT, OutputT]") -> "_Work[ItemT, OutputT] | None":
        """The next batch of this lane if enough waits for it; with less, it is better to see what comes."""
        waiting = sum(call.cost_left for queue in self._waiting.values() for call in queue)
        on_all_cores = len(lane.numbers) > 1 and not self._alone
        if 2 * waiting < last.cost or on_all_cores or self._lanes.wanted_by_others(self):
            return None
        batch = self._take_batch(self._room(lane))
        return self._begin(lane, batch) if batch else None

    def _begin(self, lane: Lane, batch: Sequence[_Slot[ItemT, OutputT]]) -> "_Work[ItemT, OutputT]":
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

    async def _halve(self, lane: Lane, batch: Sequence[_Slot[ItemT, OutputT]], failure: Exception) -> None:
        """Try the halves of a failed batch, down to the guilty item."""
        if len(batch) == 1:
            batch[0].call.settle(batch[0].index, failure)
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            wanted = [slot for slot in half if slot.wanted]
            if not wanted:
                continue
            outputs = await self._end(self._begin(lane, wanted))
            if isinstance(outputs, Exception):
                await self._halve(lane, wanted, outputs)
            else:
                _settle(wanted, outputs)


def _settle(batch: Sequence[_Slot[ItemT, OutputT]], outputs: Sequence[OutputT]) -> None:
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

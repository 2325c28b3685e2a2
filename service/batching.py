"""Many awaiting callers, one call per batch on the one model thread."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from service.errors import NotReadyError

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")


class BatchObserver(Protocol):
    """Told of each batch; the service counts them."""

    def batch_done(self, n_items: int, duration_s: float) -> None:
        """One call on the model thread succeeded."""

    def batch_failed(self) -> None:
        """One call on the model thread raised; its items are tried one by one."""


@dataclass(slots=True, eq=False)
class _Call(Generic[ItemT, OutputT]):
    """What one caller waits for: an output or an error for each of its items."""

    items: Sequence[ItemT]
    outputs: list[OutputT | Exception | None]
    finished: "asyncio.Future[None]"
    n_taken: int = 0
    n_done: int = 0

    def settle(self, index: int, output: OutputT | Exception) -> None:
        self.outputs[index] = output
        self.n_done += 1
        if self.n_done == len(self.items) and not self.finished.done():
            self.finished.set_result(None)


@dataclass(frozen=True, slots=True)
class _Slot(Generic[ItemT, OutputT]):
    """One item of one call, taken into a batch."""

    call: _Call[ItemT, OutputT]
    index: int

    @property
    def item(self) -> ItemT:
        return self.call.items[self.index]

    @property
    def wanted(self) -> bool:
        return not self.call.finished.done()


class Batcher(Generic[ItemT, OutputT]):
    """Collects items while the thread is busy and hands them over together: no timer, no added latency.

    Callers take turns item by item, so that one call of ten thousand does not hold up a call of one. An item
    whose caller has left is dropped before the work. A failed batch is done again item by item, so that only
    the guilty item fails.

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
        self._waiting: deque[_Call[ItemT, OutputT]] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self.running = False

    async def submit(self, items: Sequence[ItemT]) -> list[OutputT | Exception]:
        """The output of each item, or the exception that it alone raised.

        Raises:
            NotReadyError: The batcher is not running.
        """
        if self._closing or not self.running:
            raise NotReadyError("the service is starting or shutting down")
        if not items:
            return []
        outputs: list[OutputT | Exception | None] = [None] * len(items)
        call = _Call(items, outputs, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._arrived.set()
        # Cancelling the caller cancels the future, and that is how its items are dropped.
        await call.finished
        return [output for output in call.outputs if output is not None]

    async def run(self) -> None:
        """Serve until ``close`` and until nothing is left to do."""
        self.running = True
        try:
            while not (self._closing and not self._waiting):
                await self._arrived.wait()
                batch = self._take_batch()
                if batch:
                    await self._serve(batch)
        finally:
            self.running = False

    def close(self) -> None:
        """Refuse new calls; ``run`` returns when those admitted are answered."""
        self._closing = True
        self._arrived.set()

    def _take_batch(self) -> list[_Slot[ItemT, OutputT]]:
        """The next items within the budget, one of each waiting call in turn."""
        batch: list[_Slot[ItemT, OutputT]] = []
        room = self._budget
        while self._waiting:
            call = self._waiting[0]
            if call.finished.done():
                self._waiting.popleft()
                continue
            cost = self._cost(call.items[call.n_taken])
            if batch and cost > room:
                break
            batch.append(_Slot(call, call.n_taken))
            room -= cost
            call.n_taken += 1
            self._waiting.popleft()
            if call.n_taken < len(call.items):
                self._waiting.append(call)
        if not self._waiting and not self._closing:
            self._arrived.clear()
        return batch

    async def _serve(self, batch: Sequence[_Slot[ItemT, OutputT]]) -> None:
        outputs = await self._call_thread(batch)
        if isinstance(outputs, Exception) and len(batch) > 1:
            for slot in batch:
                if slot.wanted:
                    await self._serve([slot])
        elif isinstance(outputs, Exception):
            batch[0].call.settle(batch[0].index, outputs)
        else:
            for slot, output in zip(batch, outputs, strict=True):
                slot.call.settle(slot.index, output)

    async def _call_thread(self, batch: Sequence[_Slot[ItemT, OutputT]]) -> Sequence[OutputT] | Exception:
        """The outputs of a batch, or whatever its work raised: the loop outlives every failure."""
        loop = asyncio.get_running_loop()
        items = [slot.item for slot in batch]
        started_s = loop.time()
        working = loop.run_in_executor(self._thread, self._work, items)
        await asyncio.wait([working])
        error = working.exception()
        if isinstance(error, Exception):
            self._observer.batch_failed()
            return error
        outputs = working.result()
        if len(outputs) != len(items):
            self._observer.batch_failed()
            return RuntimeError(f"{len(outputs)} outputs for {len(items)} items")
        self._observer.batch_done(len(items), loop.time() - started_s)
        return outputs


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

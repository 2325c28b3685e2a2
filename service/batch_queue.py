"""Who waits for the model, and who is in the next batch."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from service.errors import DeadlineExceededError

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")
Priority = Literal["interactive", "bulk"]

_BULK_TURN = 4
"""Of so many batches that both could fill one begins with bulk items: they are slowed, never stopped."""
_LOOK_AHEAD = 64
"""Calls whose next item is too large for the room left, and that are passed over for smaller ones. Each is
first in its queue then, and the first of the next batch is taken whatever its size."""


@dataclass(slots=True, eq=False)
class Call(Generic[ItemT, OutputT]):
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
class Slot(Generic[ItemT, OutputT]):
    """One item of one call, taken into a batch."""

    call: Call[ItemT, OutputT]
    index: int
    cost: int

    @property
    def item(self) -> ItemT:
        return self.call.items[self.index]

    @property
    def wanted(self) -> bool:
        return not self.call.finished.done()


class BatchQueue(Generic[ItemT, OutputT]):
    """Calls that wait, by priority; batches are taken from it.

    Interactive items go before bulk ones, which get the room that is left and one of four batches that both
    could fill. Callers of one priority take turns item by item, so that one call of ten thousand does not
    hold up a call of one. An item whose caller has left or whose deadline has passed is dropped.

    Items are not sorted by length: the engine packs rows, so neighbours of other lengths cost nothing; an
    item that does not fit in the room left is passed over once, for smaller ones.

    Args:
        cost: What one item takes of a batch's room.
        on_dropped: Told how many items were dropped.
    """

    def __init__(self, *, cost: Callable[[ItemT], int], on_dropped: Callable[[int], None]) -> None:
        self._cost = cost
        self._on_dropped = on_dropped
        self._calls: dict[Priority, deque[Call[ItemT, OutputT]]] = {"interactive": deque(), "bulk": deque()}
        self._n_contested = 0

    def __bool__(self) -> bool:
        return any(self._calls.values())

    @property
    def n_items(self) -> int:
        """Items that are in no batch yet."""
        return sum(len(call.items) - call.n_taken for calls in self._calls.values() for call in calls)

    @property
    def cost(self) -> int:
        """What they cost together."""
        return sum(call.cost_left for calls in self._calls.values() for call in calls)

    def n_calls(self, priority: Priority) -> int:
        """Calls of a priority that wait."""
        return len(self._calls[priority])

    def put(
        self, items: Sequence[ItemT], priority: Priority, deadline_s: float | None
    ) -> Call[ItemT, OutputT]:
        """A new call.

        Args:
            deadline_s: Absolute event-loop time after which no item is begun.
        """
        finished = asyncio.get_running_loop().create_future()
        call = Call[ItemT, OutputT](
            items, [None] * len(items), finished, deadline_s, sum(map(self._cost, items))
        )
        self._calls[priority].append(call)
        return call

    def take(self, room: int) -> list[Slot[ItemT, OutputT]]:
        """The next items within the room, one of each waiting call in turn; the first one at any cost."""
        order: tuple[Priority, Priority] = ("interactive", "bulk")
        if all(self._calls.values()):
            self._n_contested += 1
            if self._n_contested % _BULK_TURN == 0:
                order = ("bulk", "interactive")
        batch: list[Slot[ItemT, OutputT]] = []
        for priority in order:
            room = self._fill(batch, self._calls[priority], room)
        return batch

    def fail(self, error: Exception) -> None:
        """Settle all that waits with an error."""
        for calls in self._calls.values():
            for call in calls:
                call.fail_untaken(error)
            calls.clear()

    def _fill(
        self, batch: list[Slot[ItemT, OutputT]], waiting: deque[Call[ItemT, OutputT]], room: int
    ) -> int:
        """Take items of one queue; returns the room left."""
        now_s = asyncio.get_running_loop().time()
        passed_over: list[Call[ItemT, OutputT]] = []
        while waiting and room > 0 and len(passed_over) < _LOOK_AHEAD:
            call = waiting.popleft()
            if call.finished.done():
                self._on_dropped(len(call.items) - call.n_taken)
                continue
            if call.deadline_s is not None and now_s >= call.deadline_s:
                late = DeadlineExceededError("the deadline passed before the prompt's turn came")
                self._on_dropped(call.fail_untaken(late))
                continue
            cost = self._cost(call.items[call.n_taken])
            if batch and cost > room:
                passed_over.append(call)
                continue
            batch.append(Slot(call, call.n_taken, cost))
            room -= cost
            call.n_taken += 1
            call.cost_left -= cost
            if call.n_taken < len(call.items):
                waiting.append(call)
        waiting.extendleft(reversed(passed_over))
        return room

"""Lanes: threads that run models, side by side on one core each, or one of them alone on all cores."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")
Work = Callable[[Sequence[ItemT]], Sequence[OutputT]]


class Lanes:
    """So many threads as cores, shared by all batchers of the process.

    Batches side by side, one core each, get more done than one batch on all cores: the threads of one batch
    wait for each other after each operation, for the slowest one each time, and any other thread that needs a
    moment of one core stops them all. A single prompt is sooner done by all cores.

    Args:
        n_cores: For all lanes together.
        n_lanes: Batches at one time; as many as cores, or 1 where the work is done elsewhere (on a GPU).
        use_cores: Called on a lane's thread before work that is to use another number of cores than the last.
    """

    def __init__(self, n_cores: int, n_lanes: int, *, use_cores: Callable[[int], None]) -> None:
        self.n_lanes = n_lanes
        self._n_cores = n_cores
        self._use_cores = use_cores
        self._own = threading.local()
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"persyn-model-{number}") for number in range(n_lanes)
        ]
        self._free = list(range(n_lanes))
        self._waiting: deque[tuple[asyncio.Future[Lane], object, bool]] = deque()

    @property
    def n_free(self) -> int:
        """Lanes that nobody has."""
        return len(self._free)

    def wanted_by_others(self, owner: object) -> bool:
        """Whether somebody else waits for a lane."""
        return any(other is not owner for _, other, _ in self._waiting)

    async def take(self, owner: object, *, alone: bool = False) -> "Lane":
        """Wait for a lane, first come first served. Whoever has it releases it.

        Args:
            owner: Who takes it.
            alone: Wait for all of them, and use all cores.
        """
        granted: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        self._waiting.append((granted, owner, alone))
        self._grant()
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release(granted.result())
            raise

    def widen(self, lane: "Lane") -> bool:
        """Give a lane all the others, and so all cores; says whether they were all free."""
        if len(self._free) + len(lane.numbers) < self.n_lanes:
            return False
        # It works on the first thread then, always: if several threads had helpers on all cores, those would
        # be more than cores.
        lane.numbers = sorted(lane.numbers + self._free)
        self._free = []
        return True

    def run(
        self, lane: "Lane", work: Work[ItemT, OutputT], items: Sequence[ItemT]
    ) -> "asyncio.Future[Sequence[OutputT]]":
        """Do a piece of work on a lane's thread."""
        n_cores = self._n_cores * len(lane.numbers) // self.n_lanes

        def done() -> Sequence[OutputT]:
            if getattr(self._own, "n_cores", None) != n_cores:
                self._use_cores(n_cores)
                self._own.n_cores = n_cores
            return work(items)

        return asyncio.get_running_loop().run_in_executor(self._threads[lane.numbers[0]], done)

    def release(self, lane: "Lane") -> None:
        """Let others have a lane."""
        self._free = sorted(self._free + lane.numbers)
        lane.numbers = []
        self._grant()

    def close(self) -> None:
        """Wait for what runs, and end the threads."""
        for thread in self._threads:
            thread.shutdown()

    def _grant(self) -> None:
        while self._waiting:
            granted, _, alone = self._waiting[0]
            if not granted.done():
                if not self._free or (alone and len(self._free) < self.n_lanes):
                    return
                lane = Lane([self._free.pop(0)])
                if alone:
                    self.widen(lane)
                granted.set_result(lane)
            self._waiting.popleft()


@dataclass(slots=True, eq=False)
class Lane:
    """The right to run one piece of work after the other, until it is released."""

    numbers: list[int]
    """Of the threads it has; it works on the first."""

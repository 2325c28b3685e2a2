"""Lanes: side by side on one core each, or one alone on all cores."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.lanes import Lane, Lanes

ME, OTHER = object(), object()


class Cores:
    """Remembers how many cores which thread was told to use."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def __call__(self, n_cores: int) -> None:
        self.told.append((threading.current_thread().name, n_cores))


@asynccontextmanager
async def lanes_of(n_cores: int, n_lanes: int) -> AsyncIterator[tuple[Lanes, Cores]]:
    """Lanes that are closed at the end, whatever happens."""
    cores = Cores()
    lanes = Lanes(n_cores, n_lanes, use_cores=cores)
    try:
        yield lanes, cores
    finally:
        lanes.close()


async def run_on(lanes: Lanes, lane: Lane) -> str:
    """The name of the thread that a lane's work runs on."""
    (name,) = await lanes.run(lane, lambda _: [threading.current_thread().name], [0])
    return name


async def test_lanes_work_side_by_side_on_one_core_each() -> None:
    """Two pieces of work that wait for each other end, on two threads."""
    barrier = threading.Barrier(2)
    async with lanes_of(2, 2) as (lanes, cores):
        one, two = await lanes.take(ME), await lanes.take(ME)
        assert lanes.n_free == 0
        await asyncio.gather(*(lanes.run(lane, lambda _: [barrier.wait(10)], [0]) for lane in (one, two)))
        assert sorted(cores.told) == [("persyn-model-0_0", 1), ("persyn-model-1_0", 1)]
        lanes.release(one)
        lanes.release(two)
        assert lanes.n_free == 2


async def test_one_alone_has_all_cores_and_the_first_thread() -> None:
    """Whichever lane it had; it is told only when the number changes."""
    async with lanes_of(4, 4) as (lanes, cores):
        first, second = await lanes.take(ME), await lanes.take(ME)
        assert not lanes.widen(second)
        await run_on(lanes, second)
        lanes.release(first)
        assert lanes.widen(second)
        assert lanes.n_free == 0
        names = {await run_on(lanes, second) for _ in range(3)}
        assert names == {"persyn-model-0_0"}
        assert cores.told == [("persyn-model-1_0", 1), ("persyn-model-0_0", 4)]
        lanes.release(second)
        assert lanes.n_free == 4


async def test_one_lane_beside_a_gpu_has_all_cores() -> None:
    """There is nobody to share with."""
    async with lanes_of(6, 1) as (lanes, cores):
        lane = await lanes.take(ME)
        await run_on(lanes, lane)
        assert cores.told == [("persyn-model-0_0", 6)]
        assert lanes.widen(lane)
        lanes.release(lane)


async def test_who_wants_all_lanes_is_not_passed_by() -> None:
    """First come, first served, also where the first needs more than is free."""
    async with lanes_of(2, 2) as (lanes, _):
        one, two = await lanes.take(ME), await lanes.take(ME)
        alone = asyncio.ensure_future(lanes.take(OTHER, alone=True))
        later = asyncio.ensure_future(lanes.take(ME))
        await asyncio.sleep(0)
        assert lanes.wanted_by_others(ME)
        lanes.release(one)
        await asyncio.sleep(0)
        assert not alone.done()
        assert not later.done()
        lanes.release(two)
        lanes.release(await alone)
        lanes.release(await later)
        assert not lanes.wanted_by_others(ME)
        assert lanes.n_free == 2


async def test_who_leaves_while_waiting_takes_nothing_along() -> None:
    """Before a lane is granted, and in the turn in which it is."""
    async with lanes_of(1, 1) as (lanes, _):
        lane = await lanes.take(ME)
        early, late = asyncio.ensure_future(lanes.take(ME)), asyncio.ensure_future(lanes.take(ME))
        await asyncio.sleep(0)
        early.cancel()
        lanes.release(lane)
        late.cancel()
        await asyncio.gather(early, late, return_exceptions=True)
        assert lanes.n_free == 1

"""BulkRouting on a scripted router: order, bounds, and what ends a stream."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from clients.schemas import RouteParameters
from clients.types import RoutingDecision
from service.batching import Batched
from service.bulk_routing import BulkRouting, BulkTotals, LineOutcome
from service.errors import InvalidRequestError, NotReadyError, PayloadTooLargeError, StreamStalledError
from service.ndjson import Line
from service.routing import RoutePlan
from tests.unit.service.test_routing import ScriptedBatcher, service_of


class Counts:
    """A BulkObserver that adds up."""

    def __init__(self) -> None:
        self.n_routed = self.n_failed = 0

    def lines_answered(self, n_routed: int, n_failed: int) -> None:
        self.n_routed += n_routed
        self.n_failed += n_failed


class Stream:
    """A stream of prompts: what was asked for, and what came back."""

    def __init__(self, batcher: ScriptedBatcher, *, window: int = 4) -> None:
        self.counts = Counts()
        self.routing = service_of(batcher)
        self.bulk = BulkRouting(self.routing, window=window, observer=self.counts)
        self.n_read = 0
        self.outcomes: list[LineOutcome] = []
        self.readable = asyncio.Event()
        """Whether the client takes answers."""
        self.readable.set()

    @property
    def plan(self) -> RoutePlan:
        return self.routing.plan(RouteParameters())

    async def lines(
        self, chunks: Sequence[Sequence[Any]], error: Exception | None = None
    ) -> AsyncGenerator[list[Line], None]:
        number = 0
        for chunk in chunks:
            lines = []
            for prompt in chunk:
                number += 1
                content = prompt if isinstance(prompt, bytes | None) else json.dumps(prompt).encode()
                lines.append(Line(number, content))
            self.n_read = number
            yield lines
        if error is not None:
            raise error

    async def deliver(self, outcomes: Sequence[LineOutcome]) -> None:
        await self.readable.wait()
        self.outcomes += outcomes

    async def run(self, *chunks: Sequence[Any], error: Exception | None = None) -> BulkTotals:
        # As the handler does it.
        plan = self.plan
        with plan.student.served.in_use():
            return await self.bulk.run(plan, self.lines(chunks, error), self.deliver)


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(200):
        await asyncio.sleep(0)


class BatcherOutOfOrder(ScriptedBatcher):
    """Answers the calls that wait in the reverse of their order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[asyncio.Event] = []

    async def submit(self, jobs: Sequence[Any], *, priority: str, deadline_s: float | None) -> Batched[Any]:
        done = asyncio.Event()
        self.calls.append(done)
        await done.wait()
        return await super().submit(jobs, priority=priority, deadline_s=deadline_s)


async def test_answers_come_in_the_order_of_the_lines() -> None:
    """Also where later ones are ready first; each goes to the router with low priority."""
    batcher = BatcherOutOfOrder()
    stream = Stream(batcher)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(stream.run(["a"], ["b", "c"], ["d"]))
        await settle()
        for done in reversed(batcher.calls):
            assert stream.outcomes == []
            done.set()
            await settle()
    assert batcher.texts == ["d", "b", "c", "a"]
    assert [outcome.line for outcome in stream.outcomes] == [1, 2, 3, 4]
    assert set(batcher.priorities) == {"bulk"}
    totals = running.result()
    assert (totals.n_routed, totals.n_failed, totals.last_line, totals.failure) == (4, 0, 4, None)
    assert (stream.counts.n_routed, stream.counts.n_failed) == (4, 0)


async def test_lines_that_fail_stand_in_their_place() -> None:
    """A line that is too long, is no prompt, has no text or breaks the model; the others are decided."""
    batcher = ScriptedBatcher()
    stream = Stream(batcher)
    totals = await stream.run(["a", None, b"{", {"id": "i", "prompt": " "}], ["poison", "b"])
    kinds = [type(outcome.decision) for outcome in stream.outcomes]
    assert kinds == [
        RoutingDecision,
        PayloadTooLargeError,
        InvalidRequestError,
        InvalidRequestError,
        RuntimeError,
        RoutingDecision,
    ]
    assert batcher.texts == ["a", "poison", "b"]
    assert stream.outcomes[3].prompt_id == "i"
    assert (totals.n_routed, totals.n_failed, totals.last_line) == (2, 4, 6)
    assert (stream.counts.n_routed, stream.counts.n_failed) == (2, 4)


async def test_one_id_for_two_prompts_is_allowed() -> None:
    """What a call refuses a stream cannot know: ids are not remembered."""
    stream = Stream(ScriptedBatcher())
    await stream.run([{"id": "i", "prompt": "a"}, {"id": "i", "prompt": "b"}])
    assert all(isinstance(outcome.decision, RoutingDecision) for outcome in stream.outcomes)


async def test_the_window_bounds_what_is_read() -> None:
    """While answers are not taken, lines are read up to the window and one chunk; then all are answered."""
    batcher = ScriptedBatcher()
    stream = Stream(batcher, window=6)
    stream.readable.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(stream.run(*([f"p{n}", f"q{n}"] for n in range(50))))
        await settle()
        assert len(batcher.texts) == 6
        assert stream.n_read == 8
        # Routed long ago: another stream may have the router.
        assert stream.bulk.n_in_work == 0
        stream.readable.set()
    assert len(stream.outcomes) == 100


async def test_the_window_has_a_bound_in_bytes_too() -> None:
    """A few long lines fill it as many short ones do."""
    batcher = ScriptedBatcher()
    stream = Stream(batcher, window=100)
    stream.readable.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(stream.run(*([f"{n}" + "x" * 2**20] for n in range(20))))
        await settle()
        assert len(batcher.texts) == 7
        assert stream.n_read == 8
        stream.readable.set()
    assert len(stream.outcomes) == 20


async def test_streams_share_one_window_before_the_router() -> None:
    """Of two streams together no more prompts wait for the router than the window; both are answered."""
    batcher = ScriptedBatcher()
    batcher.gate = asyncio.Event()
    first = Stream(batcher, window=3)
    second = Stream(batcher)
    second.bulk = first.bulk
    async with asyncio.TaskGroup() as group:
        for stream in (first, second):
            group.create_task(stream.run(*(["a", "b"] for _ in range(10))))
        await settle()
        assert first.bulk.n_in_work == 2
        batcher.gate.set()
    assert len(first.outcomes) == len(second.outcomes) == 20
    assert first.bulk.n_in_work == 0


@pytest.mark.parametrize("error", [StreamStalledError("nothing came"), NotReadyError("we stop")])
async def test_lines_that_end_in_an_error_are_answered_first(error: Exception) -> None:
    """Why there are no more lines stands in the totals, after the answers of all that came."""
    stream = Stream(ScriptedBatcher())
    totals = await stream.run(["a"], ["b"], error=error)
    assert [outcome.line for outcome in stream.outcomes] == [1, 2]
    assert (totals.failure, totals.last_line) == (error, 2)


async def test_a_router_that_takes_no_more_prompts_ends_the_stream() -> None:
    """What was answered before is delivered; the rest is neither read nor routed, and the totals say why."""

    class Closing(ScriptedBatcher):
        async def submit(
            self, jobs: Sequence[Any], *, priority: str, deadline_s: float | None
        ) -> Batched[Any]:
            if len(self.texts) >= 2:
                raise NotReadyError("the service is shutting down")
            return await super().submit(jobs, priority=priority, deadline_s=deadline_s)

    stream = Stream(Closing())
    totals = await stream.run(*([f"p{n}"] for n in range(50)))
    assert [outcome.line for outcome in stream.outcomes] == [1, 2]
    assert isinstance(totals.failure, NotReadyError)
    assert (totals.n_routed, totals.n_failed, totals.last_line) == (2, 0, 2)
    assert stream.n_read < 20
    assert stream.bulk.n_in_work == 0


async def test_a_stream_that_is_cancelled_holds_nothing() -> None:
    """Cancelled with prompts in work and others waiting: permits and router come back."""
    batcher = ScriptedBatcher()
    batcher.gate = asyncio.Event()
    stream = Stream(batcher, window=2)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(stream.run(*(["a", "b"] for _ in range(10))))
        await settle()
        assert (stream.bulk.n_in_work, batcher.n_users) == (2, 2)
        running.cancel()
    assert (stream.bulk.n_in_work, batcher.n_users) == (0, 0)

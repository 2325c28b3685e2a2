"""Many assignments: concurrency per teacher, outcomes, stopping."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest

from clients.dispatcher import Dispatcher, DispatchOptions
from clients.registry import Registry
from clients.teacher import TeacherClient
from clients.testing import FakeTeacher, Reply
from clients.types import Answered, Limits
from tests.unit.clients.dispatching import AT_ONCE, assign, in_turn, spec_of


class Gate:
    """An HTTP transport whose answers wait, to see how many calls a teacher gets at once."""

    def __init__(self):
        self.open = asyncio.Event()
        self.n_now = self.n_peak = self.n_total = 0

    async def __call__(self, request):
        self.n_now, self.n_total = self.n_now + 1, self.n_total + 1
        self.n_peak = max(self.n_peak, self.n_now)
        await self.open.wait()
        self.n_now -= 1
        text = json.loads(request.content)["messages"][-1]["content"]
        choice = {"message": {"role": "assistant", "content": text.upper()}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})

    def guard(self, registry, teacher_id):
        """Put this gate before a teacher of the registry."""
        endpoint = registry.get(teacher_id)
        client = TeacherClient(endpoint.spec, transport=httpx.MockTransport(self))
        registry._endpoints[teacher_id] = replace(endpoint, client=client)
        return self


async def test_run_asks_each_teacher_at_its_own_concurrency(until):
    """A slow teacher does not hold up another, and none is asked beyond its limit."""
    specs = [spec_of(teacher_id=name, limits=Limits(concurrency=n)) for name, n in (("a", 3), ("b", 2))]
    outcomes = {}
    async with Registry(specs) as registry:
        gate_a, gate_b = Gate().guard(registry, "a"), Gate().guard(registry, "b")
        assignments = [assign(f"x{n}", "ab"[n % 2]) for n in range(20)]
        run = Dispatcher(registry).run(assignments, DispatchOptions(), outcomes.__setitem__)
        task = asyncio.create_task(run)
        await until(lambda: (gate_a.n_now, gate_b.n_now) == (3, 2))
        gate_b.open.set()
        await until(lambda: gate_b.n_total == 10 and gate_b.n_now == 0)
        assert sorted(outcomes) == list(range(1, 20, 2))
        gate_a.open.set()
        await task
    assert (gate_a.n_peak, gate_b.n_peak) == (3, 2)
    assert [outcomes[n].completion.content for n in range(20)] == [f"X{n}" for n in range(20)]


async def test_run_reports_each_index_once_whatever_happens():
    """Answers, failures and unknown teachers: every index gets one outcome, its own prompt's."""

    def script(body, _n_call):
        return Reply(status=400) if "bad" in body["messages"][-1]["content"] else Reply("fine")

    seen = []
    with FakeTeacher(script) as teacher:
        async with Registry([spec_of(teacher.base_url), spec_of(teacher_id="dead")]) as registry:
            assignments = [
                assign(f"{word}{n}", name)
                for n in range(5)
                for word, name in (("ok", "a"), ("bad", "a"), ("x", "dead"), ("y", "unknown"))
            ]
            await Dispatcher(registry, retry=AT_ONCE).run(
                assignments, DispatchOptions(), lambda index, outcome: seen.append((index, outcome))
            )
    assert sorted(index for index, _ in seen) == list(range(20))
    assert all(outcome.prompt is assignments[index].prompt for index, outcome in seen)
    errors = {index % 4: type(getattr(outcome, "error", None)).__name__ for index, outcome in seen}
    assert errors == {
        0: "NoneType",
        1: "TeacherRejectedError",
        2: "TeacherUnavailableError",
        3: "UnknownTeacherError",
    }


async def test_run_of_nothing_ends():
    """No assignments, no calls."""
    async with Registry([spec_of()]) as registry:
        await Dispatcher(registry).run([], DispatchOptions(), lambda *_: pytest.fail("called"))


async def test_stopping_finishes_what_is_in_flight(until):
    """After the signal no new prompt is taken up, and those under way are answered and reported."""
    stop, outcomes = asyncio.Event(), {}
    async with Registry([spec_of(limits=Limits(concurrency=3))]) as registry:
        gate = Gate().guard(registry, "a")
        run = Dispatcher(registry).run(
            [assign(str(n)) for n in range(20)],
            DispatchOptions(),
            outcomes.__setitem__,
            should_stop=stop.is_set,
        )
        task = asyncio.create_task(run)
        await until(lambda: gate.n_now == 3)
        stop.set()
        gate.open.set()
        await task
    assert sorted(outcomes) == [0, 1, 2]
    assert all(isinstance(outcome, Answered) for outcome in outcomes.values())
    assert gate.n_total == 3


async def test_cancelling_a_run_leaves_nothing_running(until):
    """When a run is cancelled all its calls end."""
    with FakeTeacher(in_turn(Reply(delay_s=30.0))) as teacher:
        async with Registry([spec_of(teacher.base_url, limits=Limits(concurrency=4))]) as registry:
            run = Dispatcher(registry).run(
                [assign(str(n)) for n in range(10)], DispatchOptions(), lambda *_: None
            )
            task = asyncio.create_task(run)
            await until(lambda: len(teacher.requests) == 4)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: teacher.n_aborted == 4)
            assert registry.get("a").limiter.n_in_flight == 0
    assert len(teacher.requests) == 4

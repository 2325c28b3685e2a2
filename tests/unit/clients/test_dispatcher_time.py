"""Time-outs, deadlines and cancellation of a dispatched call."""

import asyncio
import contextlib
import json
from dataclasses import replace

import pytest

from clients.dispatcher import Dispatcher, DispatchOptions
from clients.errors import (
    TeacherTimeoutError,
)
from clients.registry import Registry
from clients.testing import FakeTeacher, Reply
from clients.types import Answered, Limits
from tests.unit.clients.dispatching import AT_ONCE, Recorder, answer_one, assign, in_turn, spec_of


async def test_each_attempt_has_the_teachers_time_out(until):
    """A silent first attempt is given up and closed; the second one answers."""
    with FakeTeacher(in_turn(Reply(delay_s=30.0), Reply("fine"))) as teacher:
        outcome = await answer_one(spec_of(teacher.base_url, timeout_s=0.3))
        await until(lambda: teacher.n_aborted == 1)
    assert (outcome.completion.content, outcome.provenance.attempts) == ("fine", 2)


async def test_slow_drip_ends_at_the_time_out():
    """A body that keeps dripping, so that no single read is late, does not hold a call for ever."""
    n_drops = 0

    async def drip(reader, writer):
        nonlocal n_drops
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            for _ in range(1000):
                writer.write(b" ")
                await writer.drain()
                n_drops += 1
                await asyncio.sleep(0.02)

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        spec = spec_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", timeout_s=0.3)
        began_s = asyncio.get_running_loop().time()
        outcome = await answer_one(spec, retry=replace(AT_ONCE, max_attempts=1))
    assert isinstance(outcome.error, TeacherTimeoutError)
    assert asyncio.get_running_loop().time() - began_s < 3.0
    assert n_drops > 2


async def test_deadline_ends_the_whole_chain(until):
    """At the deadline the attempt under way is closed, and neither retry nor fallback starts."""
    with FakeTeacher(in_turn(Reply(delay_s=30.0))) as slow, FakeTeacher() as spare:
        began_s = asyncio.get_running_loop().time()
        outcome = await answer_one(
            [spec_of(slow.base_url, timeout_s=30.0), spec_of(spare.base_url, "b")],
            assign(fallbacks=("b",)),
            DispatchOptions(deadline_s=began_s + 0.3),
        )
        took_s = asyncio.get_running_loop().time() - began_s
        await until(lambda: slow.n_aborted == 1)
    assert isinstance(outcome.error, TeacherTimeoutError)
    assert "before the deadline" in outcome.error.message
    assert 0.3 <= took_s < 3.0
    assert (len(slow.requests), spare.requests) == (1, [])


async def test_deadline_also_ends_the_wait_for_a_slot():
    """A call that waits for the teacher's limits fails at the deadline without having been made."""
    with FakeTeacher(in_turn(Reply(delay_s=30.0))) as teacher:
        async with Registry([spec_of(teacher.base_url, limits=Limits(concurrency=1))]) as registry:
            dispatcher = Dispatcher(registry, retry=AT_ONCE)
            async with registry.get("a").limiter.slot(0):
                deadline_s = asyncio.get_running_loop().time() + 0.1
                outcome = await dispatcher.answer(assign(), DispatchOptions(deadline_s=deadline_s))
    assert isinstance(outcome.error, TeacherTimeoutError)
    assert teacher.requests == []


async def test_deadlines_do_not_open_the_breaker():
    """A caller in a hurry says nothing about the teacher's health."""
    with FakeTeacher(lambda _body, _n_call: Reply(delay_s=30.0)) as teacher:
        async with Registry([spec_of(teacher.base_url)]) as registry:
            dispatcher = Dispatcher(registry, retry=AT_ONCE)
            for _ in range(10):
                deadline_s = asyncio.get_running_loop().time() + 0.05
                await dispatcher.answer(assign(), DispatchOptions(deadline_s=deadline_s))
            # Not by the number of the call: on a busy machine a deadline may come before its call went out.
            teacher.script = lambda _body, _n_call: Reply("fine")
            outcome = await dispatcher.answer(assign(), DispatchOptions())
    assert isinstance(outcome, Answered)


async def test_cancellation_reaches_the_teacher_and_frees_the_slot(until):
    """Cancelling an answer aborts the upstream call; the only slot serves the next one at once."""
    observer = Recorder()
    with FakeTeacher(in_turn(Reply(delay_s=30.0), Reply("fine"))) as teacher:
        async with Registry([spec_of(teacher.base_url, limits=Limits(concurrency=1))]) as registry:
            dispatcher = Dispatcher(registry, retry=AT_ONCE, observer=observer)
            task = asyncio.create_task(dispatcher.answer(assign(), DispatchOptions()))
            await until(lambda: len(teacher.requests) == 1)
            assert registry.get("a").limiter.n_in_flight == 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            await until(lambda: teacher.n_aborted == 1)
            assert registry.get("a").limiter.n_in_flight == 0
            outcome = await dispatcher.answer(assign(), DispatchOptions())
    assert outcome.completion.content == "fine"
    assert observer.calls == [("a", "cancelled"), ("a", "ok")]


@pytest.mark.parametrize(
    ("usage", "waits"), [({"total_tokens": 5}, False), (None, True)], ids=["counted", "not"]
)
async def test_tokens_per_minute_are_charged_as_used(usage, waits):
    """Calls are charged what the teacher counted; where it counts nothing, what they may use at most."""
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    raw = json.dumps({"choices": [choice], "usage": usage}).encode()
    limits = Limits(tokens_per_min=60_000)  # 1000 may go out at once
    with FakeTeacher(in_turn(Reply(raw=raw))) as teacher:
        async with Registry([spec_of(teacher.base_url, limits=limits)]) as registry:
            dispatcher, loop = Dispatcher(registry, retry=AT_ONCE), asyncio.get_running_loop()
            options = DispatchOptions(sampling={"max_tokens": 900})
            began_s = loop.time()
            for _ in range(3):
                assert isinstance(await dispatcher.answer(assign(), options), Answered)
    assert (loop.time() - began_s > 1.5) is waits

"""A dead teacher: the breaker in the dispatcher, and fallback to other teachers."""

import asyncio
from dataclasses import replace

from clients.breaker import Breaker
from clients.dispatcher import Dispatcher, DispatchOptions
from clients.errors import (
    TeacherRejectedError,
    TeacherUnavailableError,
    UnknownTeacherError,
)
from clients.registry import Registry
from clients.testing import FakeTeacher, Reply
from clients.types import Failed, Limits, Price
from tests.unit.clients.dispatching import AT_ONCE, Recorder, answer_one, assign, in_turn, spec_of


async def test_dead_teacher_is_not_called_per_prompt():
    """After eight failed calls the rest of the prompts fail at once, without a call."""
    observer = Recorder()
    with FakeTeacher(in_turn(Reply(status=500))) as teacher:
        async with Registry([spec_of(teacher.base_url)]) as registry:
            dispatcher = Dispatcher(registry, retry=AT_ONCE, observer=observer)
            outcomes = [await dispatcher.answer(assign(str(n)), DispatchOptions()) for n in range(50)]
    assert len(teacher.requests) == 8
    assert observer.calls == [("a", "TeacherUnavailableError")] * 8
    assert all(isinstance(outcome.error, TeacherUnavailableError) for outcome in outcomes)
    assert "not asked again for" in outcomes[-1].error.message
    assert outcomes[-1].error.details == {"breaker": "open"}


async def test_open_breaker_is_noticed_before_the_rate_limit():
    """Prompts for a dead teacher do not queue for its requests per minute."""
    async with Registry([spec_of(limits=Limits(requests_per_min=1))]) as registry:
        for _ in range(8):
            registry.get("a").breaker.failed()
        dispatcher = Dispatcher(registry, retry=AT_ONCE)
        async with asyncio.timeout(5.0):
            outcomes = [await dispatcher.answer(assign(str(n)), DispatchOptions()) for n in range(5)]
    assert all(outcome.error.details == {"breaker": "open"} for outcome in outcomes)


async def test_breaker_probes_with_one_call_and_closes():
    """After the pause one call probes; its success lets all calls through."""
    now_s = 0.0
    with FakeTeacher(in_turn(*[Reply(status=500)] * 2, Reply("back"))) as teacher:
        async with Registry([spec_of(teacher.base_url)]) as registry:
            breaker = Breaker(lambda: now_s, threshold=2, pause_s=10.0)
            registry._endpoints["a"] = replace(registry.get("a"), breaker=breaker)
            dispatcher = Dispatcher(registry, retry=AT_ONCE)
            refused = await dispatcher.answer(assign(), DispatchOptions())
            assert (breaker.state, len(teacher.requests)) == ("open", 2)
            now_s = 10.0
            probe = await dispatcher.answer(assign(), DispatchOptions())
            assert breaker.state == "closed"
            after = await asyncio.gather(
                *(dispatcher.answer(assign(str(n)), DispatchOptions()) for n in range(5))
            )
    assert isinstance(refused, Failed)
    assert [outcome.completion.content for outcome in (probe, *after)] == ["back"] * 6


async def test_half_open_breaker_sends_one_probe_and_reopens():
    """Many calls after the pause make one upstream call; its failure refuses the others."""
    now_s = 0.0
    with FakeTeacher(in_turn(Reply(status=500))) as teacher:
        async with Registry([spec_of(teacher.base_url)]) as registry:
            breaker = Breaker(lambda: now_s, threshold=2, pause_s=10.0)
            registry._endpoints["a"] = replace(registry.get("a"), breaker=breaker)
            dispatcher = Dispatcher(registry, retry=replace(AT_ONCE, max_attempts=2))
            await dispatcher.answer(assign(), DispatchOptions())
            now_s = 10.0
            outcomes = await asyncio.gather(
                *(dispatcher.answer(assign(str(n)), DispatchOptions()) for n in range(10))
            )
    assert len(teacher.requests) == 3
    assert all(isinstance(outcome, Failed) for outcome in outcomes)
    assert breaker.state == "open"


async def test_cancelled_probe_does_not_lock_the_teacher_out(until):
    """When the probing call is cancelled the next call may probe."""
    now_s = 0.0
    with FakeTeacher(in_turn(Reply(delay_s=30.0), Reply("back"))) as teacher:
        async with Registry([spec_of(teacher.base_url)]) as registry:
            breaker = Breaker(lambda: now_s, threshold=1, pause_s=10.0)
            registry._endpoints["a"] = replace(registry.get("a"), breaker=breaker)
            breaker.failed()
            now_s = 10.0
            dispatcher = Dispatcher(registry, retry=AT_ONCE)
            task = asyncio.create_task(dispatcher.answer(assign(), DispatchOptions()))
            await until(lambda: len(teacher.requests) == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            outcome = await dispatcher.answer(assign(), DispatchOptions())
    assert outcome.completion.content == "back"


async def test_call_from_before_does_not_free_anothers_probe(until):
    """A call that began before the breaker opened ends without letting a second probe through."""
    now_s = 0.0
    with FakeTeacher(in_turn(Reply(delay_s=30.0))) as teacher:
        async with Registry([spec_of(teacher.base_url, timeout_s=30.0)]) as registry:
            breaker = Breaker(lambda: now_s, threshold=1, pause_s=10.0)
            registry._endpoints["a"] = replace(registry.get("a"), breaker=breaker)
            dispatcher = Dispatcher(registry, retry=replace(AT_ONCE, max_attempts=1))
            early = asyncio.create_task(dispatcher.answer(assign(), DispatchOptions()))
            await until(lambda: len(teacher.requests) == 1)
            breaker.failed()
            now_s = 10.0
            probe = asyncio.create_task(dispatcher.answer(assign(), DispatchOptions()))
            await until(lambda: len(teacher.requests) == 2)
            early.cancel()
            await asyncio.gather(early, return_exceptions=True)
            refused = await dispatcher.answer(assign(), DispatchOptions())
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
    assert refused.error.details == {"breaker": "half_open"}
    assert len(teacher.requests) == 2


# --- fallback


async def test_no_fallback_unless_asked():
    """A failed teacher is not replaced in silence."""
    with FakeTeacher(in_turn(Reply(status=400))) as refusing, FakeTeacher() as spare:
        outcome = await answer_one([spec_of(refusing.base_url), spec_of(spare.base_url, "b")])
    assert isinstance(outcome, Failed)
    assert spare.requests == []


async def test_fallback_is_recorded():
    """Fallbacks are tried in order; the provenance names both the substitute and whom it replaced."""
    with FakeTeacher(in_turn(Reply(status=400))) as refusing, FakeTeacher() as spare:
        outcome = await answer_one(
            [
                spec_of(refusing.base_url),
                spec_of(refusing.base_url, "b"),
                spec_of(spare.base_url, "c", price=Price(1.0, 1.0)),
            ],
            assign(fallbacks=("b", "c")),
        )
    assert (outcome.provenance.teacher, outcome.provenance.fallback_from) == ("c", "a")
    assert outcome.provenance.cost_usd > 0.0


async def test_failed_fallbacks_report_the_first_error():
    """Where all fail, the error is that of the teacher that was assigned."""
    with (
        FakeTeacher(in_turn(Reply(status=401))) as first,
        FakeTeacher(in_turn(Reply(status=503))) as second,
    ):
        outcome = await answer_one(
            [spec_of(first.base_url), spec_of(second.base_url, "b")], assign(fallbacks=("b",))
        )
    assert (outcome.teacher, outcome.error.teacher_id) == ("a", "a")
    assert isinstance(outcome.error, TeacherRejectedError)


async def test_unknown_teacher_fails_one_prompt():
    """A teacher that is not in the project is a failure with its name, not an exception."""
    outcome = await answer_one(spec_of(), assign(teacher="zz"))
    assert isinstance(outcome.error, UnknownTeacherError)
    assert "'zz'" in outcome.error.message

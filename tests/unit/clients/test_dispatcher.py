"""Assignments in, answers with provenance out, against teachers on real sockets."""

import asyncio
import math
import time
from dataclasses import replace

import pytest

from clients.canonical import messages_hash
from clients.dispatcher import Dispatcher, DispatchOptions, cost_usd
from clients.errors import (
    TeacherProtocolError,
    TeacherRateLimitedError,
    TeacherRejectedError,
    TeacherUnavailableError,
)
from clients.registry import Registry
from clients.testing import FakeTeacher, Reply
from clients.types import Answered, Failed, Price, Usage
from tests.unit.clients.dispatching import (
    AT_ONCE,
    BrokenCache,
    answer_one,
    answer_script,
    assign,
    in_turn,
    spec_of,
)


async def test_answer_carries_its_whole_provenance():
    """Everything needed to trace an answer is recorded: who, why, with what, how often, at what cost."""
    assignment = assign(
        "one two three",
        checkpoint_id="c1",
        strategy="persyn",
        student="s",
        distribution={"a": 0.7, "b": 0.3},
        propensity=1.0,
    )
    with FakeTeacher(lambda _body, _n_call: Reply("four words of answer")) as teacher:
        spec = spec_of(
            teacher.base_url,
            system_prompt="Be brief.",
            sampling={"temperature": 0.5},
            price=Price(1.0, 10.0),
        )
        outcome = await answer_one(spec, assignment, DispatchOptions(sampling={"seed": 0}))
    assert isinstance(outcome, Answered)
    assert outcome.prompt is assignment.prompt
    got = outcome.provenance
    assert (got.teacher, got.served_model, got.checkpoint_id, got.strategy) == (
        "a",
        "m-served",
        "c1",
        "persyn",
    )
    assert (got.student, got.distribution, got.propensity) == ("s", {"a": 0.7, "b": 0.3}, 1.0)
    assert got.sampling == {"temperature": 0.5, "seed": 0}
    assert got.prompt_hash == messages_hash(assignment.prompt.messages)
    assert (got.attempts, got.fallback_from, got.cache, got.finish_reason) == (1, None, "off", "stop")
    assert got.usage == Usage(5, 4, 9)
    assert got.cost_usd == pytest.approx((5 * 1.0 + 4 * 10.0) / 1e6)
    assert got.latency_s > 0.0
    assert got.persyn_version


def test_cost_is_per_million_tokens():
    """A million tokens each way cost the two prices."""
    assert cost_usd(Usage(1_000_000, 1_000_000, 2_000_000), Price(2.0, 3.0)) == pytest.approx(5.0)
    assert cost_usd(Usage(10, 10, 20), Price()) == 0.0


# --- retries


async def test_outage_is_retried_and_counted():
    """A 500 followed by an answer is an answer after two attempts."""
    outcome, teacher = await answer_script(in_turn(Reply(status=500), Reply("fine")))
    assert (outcome.completion.content, outcome.provenance.attempts) == ("fine", 2)
    assert len(teacher.requests) == 2
    assert teacher.requests[0] == teacher.requests[1]


async def test_broken_answers_are_retried():
    """A cut answer, or one that is no chat completion, is asked for again."""
    outcome, _ = await answer_script(in_turn(Reply(finish_reason=None), Reply(raw=b"<html>"), Reply("fine")))
    assert (outcome.completion.content, outcome.provenance.attempts) == ("fine", 3)


async def test_refusal_is_not_retried():
    """A 400 is asked once."""
    outcome, teacher = await answer_script(in_turn(Reply(status=400), Reply("fine")))
    assert isinstance(outcome.error, TeacherRejectedError)
    assert (outcome.error.attempts, len(teacher.requests)) == (1, 1)


async def test_attempts_are_bounded_and_reported():
    """A teacher that never answers is asked four times; the failure says so."""
    outcome, teacher = await answer_script(in_turn(Reply(status=503)))
    assert isinstance(outcome, Failed)
    assert outcome.teacher == "a"
    assert isinstance(outcome.error, TeacherUnavailableError)
    assert (outcome.error.attempts, len(teacher.requests)) == (4, 4)


async def test_retry_after_is_respected():
    """After a 429 the next attempt waits at least as long as the teacher asked."""
    times = []

    def script(_body, n_call):
        times.append(time.monotonic())
        return Reply(status=429, headers={"Retry-After": "0.2"}) if n_call == 1 else Reply("fine")

    outcome, _ = await answer_script(script)
    assert outcome.provenance.attempts == 2
    assert times[1] - times[0] >= 0.2


async def test_retry_after_beyond_the_deadline_fails_at_once():
    """Where the teacher asks for more patience than the deadline leaves, nobody waits in vain."""
    began_s = asyncio.get_running_loop().time()
    options = DispatchOptions(deadline_s=began_s + 30.0)
    outcome, teacher = await answer_script(in_turn(Reply(status=429, headers={"Retry-After": "60"})), options)
    assert isinstance(outcome.error, TeacherRateLimitedError)
    assert outcome.error.retry_after_s == 60.0
    assert len(teacher.requests) == 1
    assert asyncio.get_running_loop().time() - began_s < 5.0


async def test_rate_limits_do_not_open_the_breaker():
    """A teacher that limits us is healthy: it is asked again."""
    with FakeTeacher(in_turn(*[Reply(status=429)] * 12, Reply("fine"))) as teacher:
        async with Registry([spec_of(teacher.base_url)]) as registry:
            dispatcher = Dispatcher(registry, retry=replace(AT_ONCE, max_attempts=20))
            outcome = await dispatcher.answer(assign(), DispatchOptions())
    assert outcome.provenance.attempts == 13


# --- failures


@pytest.mark.parametrize(
    "sampling", [{"temperature": math.nan}, {"top_p": math.inf}, {"stop": {1, 2}}], ids=["nan", "inf", "set"]
)
async def test_request_that_is_no_json_fails_one_prompt(sampling):
    """What cannot be written as JSON is a refusal before any call, not an exception."""
    outcome, teacher = await answer_script(in_turn(Reply()), DispatchOptions(sampling=sampling))
    assert isinstance(outcome.error, TeacherRejectedError)
    assert teacher.requests == []


@pytest.mark.parametrize("value", ["many", None, -5, [], 2.5])
async def test_odd_token_limit_is_left_to_the_teacher(value):
    """The estimate for the rate limit survives any ``max_tokens``; the teacher judges it."""
    sampling = {"max_tokens": value, "max_completion_tokens": 10}
    with FakeTeacher() as teacher:
        outcome = await answer_one(spec_of(teacher.base_url), options=DispatchOptions(sampling=sampling))
    assert isinstance(outcome, Answered)
    assert teacher.requests[0].get("max_tokens") == value


async def test_no_prompt_or_key_in_logs_or_errors(caplog):
    """A failure is logged and described without the prompt and without the key."""
    caplog.set_level("DEBUG")
    with FakeTeacher(in_turn(Reply(status=500))) as teacher:
        spec = spec_of(teacher.base_url, api_key="sk-secret")
        outcome = await answer_one(spec, assign("private words"), cache=BrokenCache())
    said = caplog.text + str([vars(record) for record in caplog.records]) + repr(outcome.error)
    assert "teacher_failed" in said
    assert "cache_failed" in said
    assert "private words" not in said
    assert "sk-secret" not in said


async def test_protocol_error_names_the_teacher():
    """The kind of the failure survives the retries."""
    outcome, _ = await answer_script(in_turn(Reply(raw=b"<html>", content_type="text/html")))
    assert isinstance(outcome.error, TeacherProtocolError)
    assert outcome.error.teacher_id == "a"

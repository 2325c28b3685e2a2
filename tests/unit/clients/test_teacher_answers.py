"""Which answers of a teacher are accepted, and how the others are named."""

import json
import math

import pytest

from clients import teacher as teacher_module
from clients.errors import (
    TeacherProtocolError,
    TeacherRejectedError,
)
from clients.testing import FakeTeacher, Reply
from clients.types import Usage
from tests.unit.clients.asking import HEAD, ask, ask_once, completion_reply, socket_server


async def test_whole_answer_is_kept():
    """Choices with vendor fields, served model, usage and fingerprint come through; content is text."""
    message = {"role": "assistant", "content": "fine", "reasoning_content": "hm"}
    reply = completion_reply(
        message=message, logprobs={"content": [-0.5]}, system_fingerprint="fp", model="m-2026"
    )
    completion = await ask_once(reply)
    assert completion.choices == (
        {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": [-0.5]}},
    )
    assert (completion.content, completion.finish_reason) == ("fine", "stop")
    assert (completion.served_model, completion.system_fingerprint) == ("m-2026", "fp")
    assert completion.usage == Usage(1, 2, 3)


async def test_several_choices():
    """``n`` choices arrive as n; the reported reason is that of the worst."""
    with FakeTeacher() as teacher:
        completion = await ask(teacher.base_url, sampling={"n": 3})
    assert [choice["message"]["content"] for choice in completion.choices] == ["You said: hi"] * 3
    choices = [
        {"message": {"content": "x"}, "finish_reason": reason} for reason in ("stop", "length", "stop")
    ]
    assert (await ask_once(completion_reply(choices=choices))).finish_reason == "length"


async def test_tool_call_without_content_is_an_answer():
    """A message of tool calls alone is whole; its null content reads as empty text."""
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    completion = await ask_once(completion_reply(message=message, finish_reason="tool_calls"))
    assert (completion.content, completion.finish_reason) == ("", "tool_calls")


async def test_lone_surrogates_anywhere_in_an_answer_are_replaced():
    """Each lone surrogate becomes one U+FFFD in every text kept; paired ones stay the character they mean."""
    message = {"role": "assistant", "content": "a\ud83d b\U0001f600\udc00", "reasoning_content": ["\ud800"]}
    completion = await ask_once(
        completion_reply(message=message, model="m\udfff", system_fingerprint="\ud800")
    )
    assert completion.choices[0]["message"] == {
        "role": "assistant",
        "content": "a\ufffd b\U0001f600\ufffd",
        "reasoning_content": ["\ufffd"],
    }
    assert (completion.served_model, completion.system_fingerprint) == ("m\ufffd", "\ufffd")


async def test_numbers_that_json_lacks_become_null():
    """An infinite log probability leaves the answer usable and JSON."""
    payload = json.dumps(
        {"choices": [{"message": {"content": "x"}, "finish_reason": "stop", "logprobs": math.inf}]}
    )
    completion = await ask_once(
        Reply(raw=payload.replace("Infinity", "[-Infinity, NaN, 1e999, -1.5]").encode())
    )
    assert completion.choices[0]["logprobs"] == [None, None, None, -1.5]


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 9}, Usage(5, 2, 9)),
        ({"prompt_tokens": 5, "completion_tokens": 2}, Usage(5, 2, 7)),
        ({"prompt_tokens": "many", "completion_tokens": [1], "total_tokens": {}}, Usage(0, 0, 0)),
        ({"prompt_tokens": -5, "completion_tokens": 2.0}, Usage(0, 2, 2)),
        (None, Usage(0, 0, 0)),
        ("none", Usage(0, 0, 0)),
    ],
)
async def test_usage_forms(usage, counted):
    """Missing or nonsensical counts read as zero and do not spoil the answer."""
    assert (await ask_once(completion_reply(usage=usage))).usage == counted


PROTOCOL_BREACHES = {
    "error in a 200": (Reply(raw=b'{"error": {"message": "out of memory"}}'), "out of memory"),
    "error beside choices": (completion_reply(error="overloaded"), "overloaded"),
    "empty choices": (Reply(raw=b'{"choices": []}'), "without choices"),
    "no choices": (Reply(raw=b"{}"), "without choices"),
    "choices not a list": (Reply(raw=b'{"choices": {"0": 1}}'), "without choices"),
    "choice not an object": (completion_reply(choices=["x"]), "without a message"),
    "HTML": (Reply(raw=b"<html>Sign in</html>", content_type="text/html"), "Sign in"),
    "no body": (Reply(raw=b""), "no JSON"),
    "broken UTF-8": (Reply(raw=b'{"choices": "\xff"}'), "no JSON"),
    "JSON too deep": (Reply(raw=b"[" * 200_000), "no JSON"),
    "JSON array": (Reply(raw=b"[]"), "JSON list"),
    "cut body": (Reply(raw=b'{"choices": [{"message'), "no JSON"),
    "finish_reason null": (Reply(finish_reason=None), "finish_reason None"),
    "finish_reason no text": (completion_reply(finish_reason=["stop"]), "finish_reason"),
    "content not text": (completion_reply(message={"content": [{"type": "text"}]}), "not text"),
    "no message": (completion_reply(message=None), "without a message"),
}
USELESS_ANSWERS = {
    "finish_reason unknown": (Reply(finish_reason="error"), "finish_reason 'error'"),
    "empty content": (Reply(content=""), "empty message"),
    "null content": (completion_reply(message={"content": None}), "empty message"),
    "all spent on reasoning": (
        completion_reply(message={"content": None, "reasoning": "hm"}, finish_reason="length"),
        "empty message (finish_reason 'length')",
    ),
    "one empty choice of two": (
        completion_reply(choices=[{"message": {"content": c}, "finish_reason": "stop"} for c in ("x", "")]),
        "empty message",
    ),
}


@pytest.mark.parametrize("answer", USELESS_ANSWERS)
async def test_an_answer_that_says_nothing_is_not_asked_for_again(answer):
    """It was made and paid for: an error of this prompt that no retry follows."""
    reply, says = USELESS_ANSWERS[answer]
    with pytest.raises(TeacherProtocolError) as raised:
        await ask_once(reply)
    assert says in raised.value.message
    assert not raised.value.retryable


@pytest.mark.parametrize(("theirs", "ours"), [("eos_token", "stop"), ("max_tokens", "length")])
async def test_other_names_of_finish_reasons_are_understood(theirs, ours):
    """Servers that name the reasons otherwise are as good as those that follow the API."""
    assert (await ask_once(Reply(finish_reason=theirs))).finish_reason == ours


@pytest.mark.parametrize("breach", PROTOCOL_BREACHES)
async def test_what_is_no_chat_completion_is_a_protocol_error(breach):
    """A 200 that holds no whole answer is a retryable protocol error that says what came."""
    reply, says = PROTOCOL_BREACHES[breach]
    with pytest.raises(TeacherProtocolError) as raised:
        await ask_once(reply)
    assert says in raised.value.message
    assert raised.value.retryable
    assert raised.value.teacher_id == "a"


async def test_error_excerpt_is_short():
    """A huge error body does not end up in a message."""
    with pytest.raises(TeacherRejectedError) as raised:
        await ask_once(Reply(status=400, raw=b"x" * 1_000_000))
    assert len(raised.value.message) < 300


@pytest.mark.parametrize("padding", [0, 150, 195])
async def test_key_quoted_by_a_teacher_is_not_passed_on(padding):
    """A refusal that quotes the key is shown without it, also where the excerpt would cut it."""
    raw = b"x" * padding + b" bad key sk-very-secret"
    with pytest.raises(TeacherRejectedError) as raised:
        await ask_once(Reply(status=401, raw=raw), api_key="sk-very-secret")
    assert "sk-" not in raised.value.message


async def test_huge_body_is_cut_off(monkeypatch):
    """A body without end is given up at the cap, not read into memory."""
    monkeypatch.setattr(teacher_module, "MAX_RESPONSE_BYTES", 100_000)
    n_sent = 0

    async def flood(writer):
        nonlocal n_sent
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(10_000):
            writer.write(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            await writer.drain()
            n_sent += 10_000

    async with socket_server(flood) as base_url:
        with pytest.raises(TeacherProtocolError, match="more than 100000 bytes"):
            await ask(base_url)
    assert n_sent < 50_000_000


async def test_body_of_exactly_the_cap_is_read(monkeypatch):
    """The cap itself is allowed."""
    reply = completion_reply()
    monkeypatch.setattr(teacher_module, "MAX_RESPONSE_BYTES", len(reply.raw))
    assert (await ask_once(reply)).content == "fine"

"""One attempt against one endpoint: what is sent, and how failures are named."""

import asyncio

import pytest

from clients.errors import (
    TeacherProtocolError,
    TeacherRateLimitedError,
    TeacherRejectedError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from clients.teacher import TeacherClient, request_body
from clients.testing import FakeTeacher, Reply, echo
from tests.unit.clients.asking import HEAD, USER, ask, ask_once, socket_server, spec_of


def test_sampling_precedence_and_falsy_values():
    """The caller overrides the teacher; zero is a value, null means absent and does not override."""
    spec = spec_of(
        sampling={"temperature": 0.7, "seed": 1, "top_p": 0.9, "max_tokens": None}, extra_body={"top_k": 5}
    )
    body = request_body(spec, [USER], {"temperature": 0, "seed": 0, "top_p": None, "stop": None})
    assert body == {
        "temperature": 0,
        "seed": 0,
        "top_p": 0.9,
        "top_k": 5,
        "model": "m",
        "messages": [USER],
        "stream": False,
    }


@pytest.mark.parametrize("origin", ["sampling", "extra_body", "caller"])
def test_sampling_cannot_change_model_messages_or_streaming(origin):
    """What the answer is attributed to cannot be overridden from any side."""
    wrong = {"model": "other", "messages": [], "stream": True}
    spec = spec_of() if origin == "caller" else spec_of(**{origin: wrong})
    body = request_body(spec, [USER], wrong if origin == "caller" else {})
    assert (body["model"], body["messages"], body["stream"]) == ("m", [USER], False)


@pytest.mark.parametrize(
    ("turns", "sent"),
    [
        ([USER], [{"role": "system", "content": "Be brief."}, USER]),
        (
            [{"role": "system", "content": "In French.", "name": "s"}, USER],
            [{"role": "system", "content": "Be brief.\n\nIn French.", "name": "s"}, USER],
        ),
        (
            [{"role": "system", "content": [{"type": "text", "text": "In French."}]}, USER],
            [
                {
                    "role": "system",
                    "content": [
                        {"type": "text", "text": "Be brief."},
                        {"type": "text", "text": "In French."},
                    ],
                },
                USER,
            ],
        ),
        ([{"role": "system", "content": None}, USER], [{"role": "system", "content": "Be brief."}, USER]),
        ([], [{"role": "system", "content": "Be brief."}]),
    ],
)
def test_system_prompt_becomes_the_one_system_turn(turns, sent):
    """The teacher's system prompt comes first and is joined to a system turn of the prompt."""
    assert request_body(spec_of(system_prompt="Be brief."), turns, {})["messages"] == sent


def test_request_does_not_share_the_prompt():
    """Changing a request body leaves the caller's messages as they were."""
    messages = [dict(USER)]
    request_body(spec_of(), messages, {})["messages"][0]["content"] = "changed"
    assert messages == [USER]


async def test_request_arrives_as_built():
    """The teacher receives exactly the effective body, at its own path, with its key."""
    with FakeTeacher() as teacher:
        await ask(
            teacher.base_url + "/", sampling={"temperature": 0, "logit_bias": {"1": -100}}, api_key="k1"
        )
    assert teacher.requests == [
        {
            "temperature": 0,
            "logit_bias": {"1": -100},
            "model": "m",
            "messages": [USER],
            "stream": False,
        }
    ]
    assert {name.lower(): value for name, value in teacher.headers[0].items()}["authorization"] == "Bearer k1"


async def test_lone_surrogate_in_a_prompt_is_sent():
    """A prompt that is not valid Unicode reaches the teacher as a JSON escape."""
    with FakeTeacher(lambda _body, _n_call: Reply()) as teacher:
        await ask(teacher.base_url, [{"role": "user", "content": "a\ud800b"}])
    assert teacher.requests[0]["messages"][0]["content"] == "a\ud800b"


async def test_each_key_goes_to_its_own_endpoint():
    """One teacher's key is never sent to another, and a teacher without a key sends none."""
    with FakeTeacher() as first, FakeTeacher() as second, FakeTeacher() as third:
        await ask(first.base_url, api_key="key-1")
        await ask(second.base_url, api_key="key-2")
        await ask(third.base_url)
    sent = [
        {name.lower(): value for name, value in fake.headers[0].items()} for fake in (first, second, third)
    ]
    assert [headers.get("authorization") for headers in sent] == ["Bearer key-1", "Bearer key-2", None]


async def test_redirect_is_refused_and_not_followed():
    """A redirect fails, so that the key does not travel to wherever it points."""
    with FakeTeacher() as elsewhere:
        reply = Reply(status=307, headers={"location": f"{elsewhere.base_url}/chat/completions"})
        with pytest.raises(TeacherRejectedError, match="307"):
            await ask_once(reply, api_key="secret")
    assert elsewhere.requests == []


async def test_cookies_are_not_kept():
    """A cookie set by one answer is not sent with the next request."""
    with FakeTeacher(lambda _body, _n_call: Reply(headers={"set-cookie": "session=1; Path=/"})) as teacher:
        client = TeacherClient(spec_of(teacher.base_url))
        for _ in range(2):
            await client.complete(request_body(client.spec, [USER], {}))
        await client.aclose()
    assert "cookie" not in {name.lower() for name in teacher.headers[1]}


def test_the_key_is_not_part_of_the_printed_teacher():
    """A spec in a log or traceback does not show its key."""
    assert "secret" not in repr(spec_of(api_key="secret"))


# --- failures


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
async def test_refusals_are_not_retryable(status):
    """A 4xx that speaks about the request is a refusal with the teacher's words."""
    with pytest.raises(TeacherRejectedError, match="no such model") as raised:
        await ask_once(Reply(status=status, raw=b'{"error": "no such model"}'))
    assert not raised.value.retryable
    assert raised.value.details == {"upstream_status": status}


@pytest.mark.parametrize("status", [408, 409, 425, 500, 501, 502, 503, 504, 529])
async def test_outages_are_retryable(status):
    """5xx and the 4xx that pass are outages of the teacher."""
    with pytest.raises(TeacherUnavailableError, match=str(status)) as raised:
        await ask_once(Reply(status=status))
    assert raised.value.retryable


@pytest.mark.parametrize(("headers", "seconds"), [({"Retry-After": "7"}, 7.0), ({}, None)])
async def test_rate_limit_carries_retry_after(headers, seconds):
    """A 429 is named as such and keeps the wait the teacher asked for."""
    with pytest.raises(TeacherRateLimitedError) as raised:
        await ask_once(Reply(status=429, headers=headers))
    assert raised.value.retry_after_s == seconds
    assert raised.value.retryable


async def test_refused_connection_is_unavailable_not_a_timeout():
    """Where nobody listens, the error says that at once and names the address."""
    async with socket_server(None) as base_url:
        pass
    with pytest.raises(TeacherUnavailableError, match=r"cannot be reached at http://127\.0\.0\.1"):
        await ask(base_url)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"garbage\r\n\r\n",
        HEAD + b"content-length: 100\r\n\r\n{",
        HEAD + b"content-encoding: gzip\r\n\r\nplain",
    ],
    ids=["hangs up", "no HTTP", "cut body", "not the encoding it says"],
)
async def test_broken_http_is_unavailable(sent):
    """A connection that breaks, or speaks no HTTP, is an outage and no crash."""

    async def answer(writer):
        writer.write(sent)
        await writer.drain()

    async with socket_server(answer) as base_url:
        with pytest.raises(TeacherUnavailableError) as raised:
            await ask(base_url)
    assert raised.value.retryable


async def test_silence_is_a_timeout():
    """A teacher that says nothing within its time-out is given up, and says so."""
    with pytest.raises(TeacherTimeoutError, match=r"within 0\.1 s") as raised:
        await ask_once(Reply(delay_s=30.0), timeout_s=0.1)
    assert raised.value.retryable


async def test_leaving_reaches_the_teacher(until):
    """Cancelling a call closes its connection, so that the teacher stops generating."""
    with FakeTeacher(lambda _body, _n_call: Reply(delay_s=30.0)) as teacher:
        task = asyncio.create_task(ask(teacher.base_url))
        await until(lambda: len(teacher.requests) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: teacher.n_aborted == 1)
    assert task.cancelled()


# --- the list of models


async def _models(base_url):
    client = TeacherClient(spec_of(base_url, api_key="wrong"))
    try:
        return await client.models()
    finally:
        await client.aclose()


async def test_models_are_listed_without_a_chat_call():
    """The listed ids come back; an endpoint without a list has none; no answer is generated for it."""
    with FakeTeacher() as teacher:
        assert await _models(teacher.base_url) == {"fake"}
        assert await _models(teacher.base_url.removesuffix("/v1")) == frozenset()
    assert teacher.requests == []


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 7\r\n\r\nbad key", TeacherRejectedError),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", TeacherUnavailableError),
        (b"garbage\r\n\r\n", TeacherUnavailableError),
        (HEAD + b"content-length: 4\r\n\r\n<ht>", TeacherProtocolError),
        (HEAD + b"content-length: 2\r\n\r\n[]", TeacherProtocolError),
        (HEAD + b'content-length: 14\r\n\r\n{"data": [1]} ', TeacherProtocolError),
    ],
    ids=["refused", "down", "no HTTP", "no JSON", "no data", "no models"],
)
async def test_listing_models_names_what_is_wrong(sent, error):
    """A failed listing has the errors of a call."""

    async def answer(writer):
        writer.write(sent)
        await writer.drain()

    async with socket_server(answer) as base_url:
        with pytest.raises(error):
            await _models(base_url)


async def test_many_calls_share_the_pool():
    """Parallel calls on one client each get their own answer."""
    with FakeTeacher(echo) as teacher:
        client = TeacherClient(spec_of(teacher.base_url))
        bodies = [request_body(client.spec, [{"role": "user", "content": str(n)}], {}) for n in range(50)]
        completions = await asyncio.gather(*(client.complete(body) for body in bodies))
        await client.aclose()
    assert [completion.content for completion in completions] == [f"You said: {n}" for n in range(50)]

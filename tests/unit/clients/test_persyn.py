"""The Python clients of the service, blocking and asynchronous, against scripted HTTP."""

import asyncio
import gc
import json
import math
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from clients.errors import ServiceResponseError
from clients.persyn import AsyncPersynClient, PersynClient
from clients.schemas import AnsweredItem, FailedItem, SynthesisSummary, UsageBody

DECISION = {
    "id": "p1",
    "teacher": "a",
    "distribution": {"a": 1.0},
    "strengths": {"a": 0.0},
    "quality": {"a": 0.5},
    "learnability": {"a": -1.0},
    "expected_reward": {"a": 0.5},
    "propensity": 1.0,
    "margin": 0.0,
    "uncertain": False,
    "conformal_set": ["a"],
    "out_of_distribution": False,
    "input_tokens": 3,
    "truncated": False,
}
ROUTED = {
    "checkpoint_id": "c",
    "student": "s",
    "strategy": "persyn",
    "alpha": 0.4,
    "coverage": None,
    "decisions": [DECISION],
}
SUMMARY = {"ok": 1, "failed": 1, "cached": 0, "usage": {"total_tokens": 7}, "cost_usd": 0.5}
TEACHER = {
    "id": "a",
    "model": "m",
    "family": None,
    "size_b": None,
    "price": {},
    "limits": {},
    "in_flight": 0,
    "breaker": "closed",
    "students": [],
}
FAILED = {
    "id": "p2",
    "status": "error",
    "teacher": "a",
    "error": {"type": "t", "title": "t", "detail": "d", "source": "teacher", "retryable": True},
}


def _answered(content):
    provenance = {
        "teacher": "a",
        "served_model": "m",
        "checkpoint_id": "c",
        "strategy": "persyn",
        "student": "s",
        "distribution": {"a": 1.0},
        "propensity": 1.0,
        "sampling": {},
        "prompt_hash": "h",
        "attempts": 1,
        "fallback_from": None,
        "cache": "miss",
        "usage": {},
        "cost_usd": 0.0,
        "latency_s": 0.1,
        "finish_reason": "stop",
        "created": "2026-01-01T00:00:00Z",
        "persyn_version": "0.1.0",
    }
    messages = [{"role": "assistant", "content": content}]
    return {
        "id": "p1",
        "status": "ok",
        "teacher": "a",
        "messages": messages,
        "choices": [],
        "provenance": provenance,
    }


class ChunkStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in the given pieces, from a blocking and from an asynchronous transport."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self._chunks, self._error = chunks, error

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


@pytest.fixture(params=["blocking", "asynchronous"])
def call(request):
    """Call a method of one of the two clients against an HTTP handler; return what it returns.

    The items of a stream come as a list.
    """

    def blocking(handler, method, *args, **options):
        with PersynClient("http://persyn", api_key="k", transport=httpx.MockTransport(handler)) as client:
            result = getattr(client, method)(*args, **options)
            return list(result) if method.startswith("stream") else result

    async def asynchronous(handler, method, *args, **options):
        async with AsyncPersynClient(
            "http://persyn", api_key="k", transport=httpx.MockTransport(handler)
        ) as client:
            if method.startswith("stream"):
                return [item async for item in getattr(client, method)(*args, **options)]
            return await getattr(client, method)(*args, **options)

    if request.param == "blocking":
        return blocking
    return lambda *args, **options: asyncio.run(asynchronous(*args, **options))


def _stream(*chunks, error=None):
    return lambda _request: httpx.Response(200, stream=ChunkStream(*chunks, error=error))


def _lines(*items):
    return b"".join(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in items)


# --- requests


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("hi", ["hi"]),
        ({"id": "p", "prompt": "hi"}, [{"id": "p", "prompt": "hi"}]),
        (["a", {"prompt": "b"}], ["a", {"prompt": "b"}]),
        (("a", "b"), ["a", "b"]),
    ],
)
def test_route_sends_prompts_options_and_key(call, given, sent):
    """One prompt or many, with the options as fields and the key as a bearer token."""
    requests = []

    def handler(request):
        requests.append(request)
        return httpx.Response(200, json=ROUTED)

    response = call(handler, "route", given, alpha=0, teachers=["a"])
    assert response.decisions[0].teacher == "a"
    (request,) = requests
    assert (request.method, str(request.url)) == ("POST", "http://persyn/route")
    assert request.headers["authorization"] == "Bearer k"
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.content) == {"prompts": sent, "alpha": 0, "teachers": ["a"]}


def test_no_key_sends_no_authorization():
    """Without a key there is no authorization header."""
    seen = []

    def handler(request):
        seen.append(dict(request.headers))
        return httpx.Response(200, json={"teachers": []})

    with PersynClient("http://persyn", transport=httpx.MockTransport(handler)) as client:
        client.teachers()
    assert "authorization" not in seen[0]


def test_lone_surrogate_is_for_the_service_to_judge(call):
    """A prompt that is not valid Unicode is sent as an escape, so that the refusal is the service's."""
    problem = {"detail": "prompts.0: not valid Unicode", "status": 422}
    seen = []

    def handler(request):
        seen.append(json.loads(request.content))
        return httpx.Response(422, json=problem)

    with pytest.raises(ServiceResponseError, match="not valid Unicode"):
        call(handler, "route", "a\ud800")
    assert seen[0]["prompts"] == ["a\ud800"]


def test_nan_is_refused_before_it_is_sent(call):
    """An option that is not JSON never leaves."""
    with pytest.raises(ValueError, match="JSON"):
        call(lambda _request: pytest.fail("sent"), "route", "x", alpha=math.nan)


def test_synthesize_reads_items_and_summary(call):
    """Answered and failed items come back in order, with the totals."""
    body = {"checkpoint_id": "c", "items": [_answered("fine"), FAILED], "summary": SUMMARY}
    response = call(lambda _request: httpx.Response(200, json=body), "synthesize", ["a", "b"])
    assert [type(item) for item in response.items] == [AnsweredItem, FailedItem]
    assert response.items[0].messages[-1]["content"] == "fine"
    assert response.items[1].error.source == "teacher"
    assert response.summary == SynthesisSummary(ok=1, failed=1, usage=UsageBody(total_tokens=7), cost_usd=0.5)


def test_teachers_are_read(call):
    """The live state of each teacher comes back."""
    response = call(lambda _request: httpx.Response(200, json={"teachers": [TEACHER]}), "teachers")
    assert [teacher.breaker for teacher in response.teachers] == ["closed"]


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_ready_is_the_status_of_readyz(call, status, ready):
    """Readiness is what the service says."""
    paths = []

    def handler(request):
        paths.append(request.url.path)
        return httpx.Response(status)

    assert call(handler, "ready") is ready
    assert paths == ["/readyz"]


# --- failures


@pytest.mark.parametrize("method", ["route", "synthesize", "stream_synthesize"])
def test_problem_document_becomes_the_error(call, method):
    """Status, detail, fields and retryability of a problem are on the error."""
    problem = {
        "type": "urn:persyn:problem:overloaded",
        "title": "Overloaded",
        "status": 429,
        "detail": "try again in 3 s",
        "source": "persyn",
        "retryable": True,
        "request_id": "r1",
    }
    media_type = {"content-type": "application/problem+json"}
    with pytest.raises(ServiceResponseError) as raised:
        call(lambda _request: httpx.Response(429, json=problem, headers=media_type), method, "x")
    assert raised.value.message == "try again in 3 s"
    assert (raised.value.status, raised.value.retryable) == (429, True)
    assert raised.value.problem == problem


@pytest.mark.parametrize(
    ("status", "content", "retryable"),
    [(502, b"<html>Bad gateway</html>", True), (404, b"[]", False), (500, b"", True), (307, b"", False)],
)
def test_refusal_that_is_no_problem_document(call, status, content, retryable):
    """What a proxy says is an error too, with its status, and retryable by it."""
    with pytest.raises(ServiceResponseError, match=f"HTTP {status}, not from a PerSyn") as raised:
        call(lambda _request: httpx.Response(status, content=content), "route", "x")
    assert (raised.value.status, raised.value.problem, raised.value.retryable) == (status, {}, retryable)


@pytest.mark.parametrize(
    ("method", "content"),
    [
        ("route", b"<html>Sign in</html>"),
        ("route", b'{"decisions": "private words"}'),
        ("synthesize", b"[]"),
        ("stream_synthesize", b"<html>\n"),
        ("stream_synthesize", b"{}\n"),
        ("stream_synthesize", b'{"status": "maybe"}\n'),
        ("stream_synthesize", b'{"detail": "private words"}\n'),
    ],
)
def test_success_in_an_unknown_form_is_an_error(call, method, content):
    """A 200 that is no answer of this service is one named error, without the content in its text."""
    with pytest.raises(ServiceResponseError, match="form that this client does not know") as raised:
        call(lambda _request: httpx.Response(200, content=content), method, "x")
    assert (raised.value.status, raised.value.retryable) == (200, False)
    assert "private words" not in raised.value.message


@pytest.mark.parametrize("method", ["route", "synthesize", "stream_synthesize"])
@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("")])
def test_unreachable_service_is_one_error(call, method, error):
    """A service that cannot be reached is an error with status 0 that names the address."""

    def handler(_request):
        raise error

    with pytest.raises(
        ServiceResponseError, match=r"http://persyn.* did not answer: (refused|ReadTimeout)"
    ) as raised:
        call(handler, method, "x")
    assert (raised.value.status, raised.value.retryable) == (0, True)


def test_unreachable_service_is_not_ready(call):
    """A service that cannot be reached is not ready, and that is no exception."""

    def handler(_request):
        raise httpx.ConnectError("refused")

    assert call(handler, "ready") is False


# --- streams


def test_stream_yields_items_then_the_summary(call):
    """Each line is one item, told apart by its status, the summary last; the request asks for a stream."""
    bodies = []

    def handler(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(200, stream=ChunkStream(_lines(_answered("fine"), FAILED, SUMMARY)))

    items = call(handler, "stream_synthesize", ["a", "b"], seed=0)
    assert [type(item) for item in items] == [AnsweredItem, FailedItem, SynthesisSummary]
    assert bodies == [{"prompts": ["a", "b"], "seed": 0, "stream": True}]


@pytest.mark.parametrize(
    "content",
    [
        '{"ok": 1, "status": "error"}',
        '"status":"error"',
        'no status here, "ok": 1',
        "two\nlines\r\nand\ttabs",
        "line\u2028paragraph\u2029next\u0085form\u000cfeed\u001cend",
        "emoji \U0001f600",
        "",
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_no_answer_can_break_or_mimic_a_line(call, content, ascii_only):
    """Whatever text a teacher wrote, its line is one answered item and the text comes back unchanged."""
    lines = b"".join(
        json.dumps(item, ensure_ascii=ascii_only, separators=(",", ":")).encode() + b"\n"
        for item in (_answered(content), SUMMARY)
    )
    items = call(_stream(lines), "stream_synthesize", "x")
    assert [type(item) for item in items] == [AnsweredItem, SynthesisSummary]
    assert items[0].messages[-1]["content"] == content


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_lines_are_found_in_any_chunks(call, size):
    """Chunks that cut lines and characters anywhere, blank lines and no newline at the end change nothing."""
    text = _lines(_answered("naïve \U0001f600"), FAILED) + b"\n\r\n" + _lines(SUMMARY).rstrip()
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    items = call(_stream(*chunks), "stream_synthesize", "x")
    assert [type(item) for item in items] == [AnsweredItem, FailedItem, SynthesisSummary]
    assert items[0].messages[-1]["content"] == "naïve \U0001f600"


def test_items_come_before_the_stream_ends():
    """An item is handed over as soon as its line is complete; a later break is an error after it."""
    stream = _stream(_lines(FAILED), b'{"id"', error=httpx.ReadError("broken"))
    with PersynClient("http://persyn", transport=httpx.MockTransport(stream)) as client:
        items = client.stream_synthesize("x")
        assert isinstance(next(items), FailedItem)
        with pytest.raises(ServiceResponseError, match="broken"):
            next(items)


# --- real sockets


class Service(BaseHTTPRequestHandler):
    """Says that it is ready, and babbles on any other path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/readyz":
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.wfile.write(b"garbage\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_args):
        """Say nothing."""


@pytest.fixture
def service_url():
    """A small HTTP server in a thread."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_real_connections(service_url):
    """Over sockets: an answer, a peer that speaks no HTTP and a port where nobody listens."""
    async with AsyncPersynClient(service_url) as client:
        assert await client.ready()
        with pytest.raises(ServiceResponseError, match="did not answer"):
            await client.teachers()
    async with AsyncPersynClient("http://127.0.0.1:1") as client:
        assert not await client.ready()
        with pytest.raises(ServiceResponseError, match=r"http://127\.0\.0\.1:1 did not answer"):
            await client.route("x")


def test_real_connections_of_the_blocking_client(service_url):
    """The blocking client behaves the same over sockets."""
    with PersynClient(service_url) as client:
        assert client.ready()
        with pytest.raises(ServiceResponseError, match="did not answer"):
            client.teachers()
    with PersynClient("http://127.0.0.1:1") as client:
        assert not client.ready()


def test_closing_leaves_no_open_connection(service_url):
    """After the block no session or socket is left to the garbage collector."""

    async def use():
        async with AsyncPersynClient(service_url) as client:
            await client.ready()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(use())
        with PersynClient(service_url) as client:
            client.ready()
        del client
        gc.collect()
    assert [str(warning.message) for warning in caught] == []

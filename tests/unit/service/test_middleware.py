"""Middleware: ids, keys, body limit, disconnects, and the 500 of last resort."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.testing import capture_logs

from service.metrics import Metrics
from service.middleware import ObserveRequests, ReadBody, RequireApiKey


class Exchange:
    """One request to an ASGI application: what it was told and what it answered."""

    def __init__(self, chunks: Iterable[bytes] = (b"",)) -> None:
        chunks = list(chunks)
        self._messages: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
            for index, chunk in enumerate(chunks)
        ]
        self.n_received = 0
        self.gone = asyncio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self._messages:
            self.n_received += 1
            return self._messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))


def _scope(path: str = "/x", **headers: str) -> Scope:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b""}


def _is_stream(scope: Scope) -> bool:
    return bool(scope["path"] == "/stream")


def _wrapped(app: ASGIApp, *, keys: Iterable[str] = (), max_bytes: int = 100) -> ASGIApp:
    inner = RequireApiKey(ReadBody(app, max_bytes=max_bytes, is_stream=_is_stream), api_keys=keys)
    return ObserveRequests(inner, metrics=Metrics("test"))


async def _length(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await JSONResponse({"n_bytes": len(body)})(scope, receive, send)


async def _call(app: ASGIApp, scope: Scope, chunks: Iterable[bytes] = (b"",)) -> Exchange:
    exchange = Exchange(chunks)
    await app(scope, exchange.receive, exchange.send)
    return exchange


async def test_a_sane_request_id_is_kept_and_any_other_replaced() -> None:
    """The caller's id comes back if it is short and plain; one with odd characters becomes a fresh one."""
    app = _wrapped(_length)
    assert (await _call(app, _scope(x_request_id="job-7.a:b"))).headers["x-request-id"] == "job-7.a:b"
    for odd in ("", "a b", "x" * 129, "é", "<script>"):
        fresh = (await _call(app, _scope(x_request_id=odd))).headers["x-request-id"]
        assert fresh != odd
        assert len(fresh) == 32


@pytest.mark.parametrize("chunks", [[b"x" * 101], [b"x" * 60, b"x" * 60, b"never read"]])
async def test_a_long_body_is_refused_while_it_comes(chunks: list[bytes]) -> None:
    """A body above the limit is a 413 problem, without Content-Length too; reading stops at the limit."""
    exchange = await _call(_wrapped(_length), _scope(), chunks)
    assert (exchange.status, exchange.headers["content-type"]) == (413, "application/problem+json")
    assert exchange.body["source"] == "client"
    assert exchange.n_received == min(len(chunks), 2)


async def test_a_declared_long_body_is_refused_unread() -> None:
    """Content-Length above the limit is enough: no byte of the body is read."""
    exchange = await _call(_wrapped(_length), _scope(content_length="101"))
    assert (exchange.status, exchange.n_received) == (413, 0)
    assert exchange.headers["connection"] == "close"


async def test_a_body_at_the_limit_passes_whole() -> None:
    """The limit itself is allowed, and the handler gets every byte of all chunks."""
    exchange = await _call(_wrapped(_length), _scope(), [b"x" * 60, b"x" * 40])
    assert (exchange.status, exchange.body) == (200, {"n_bytes": 100})


async def test_a_stream_reads_its_body_itself() -> None:
    """No limit of its length holds, and its handler gets every piece as it came; a key is needed as ever."""
    pieces = []

    async def reader(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            pieces.append(message["body"])
            if not message["more_body"]:
                break
        await JSONResponse({})(scope, receive, send)

    app = _wrapped(reader, keys=["k"])
    assert (await _call(app, _scope("/stream"), [b"x" * 90] * 3)).status == 401
    assert pieces == []
    assert (await _call(app, _scope("/stream", authorization="Bearer k"), [b"x" * 90] * 3)).status == 200
    assert pieces == [b"x" * 90] * 3


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        ("Bearer key-", 401),
        ("Basic key-one", 401),
        ("Bearer kéy", 401),
        ("Bearer key-one", 200),
        ("bearer key-two", 200),
    ],
)
async def test_only_a_whole_valid_key_opens(authorization: str | None, status: int) -> None:
    """Any of the keys is taken, whole and as Bearer; everything else is a 401 problem, body unread."""
    headers = {} if authorization is None else {"authorization": authorization}
    exchange = await _call(_wrapped(_length, keys=["key-one", "key-two"]), _scope(**headers))
    assert exchange.status == status
    if status == 401:
        assert exchange.headers["www-authenticate"] == "Bearer"
        assert exchange.headers["x-request-id"] == exchange.body["request_id"]
        assert exchange.n_received == 0


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/readyz", 200), ("/metrics", 401)])
async def test_probes_need_no_key(path: str, status: int) -> None:
    """An orchestrator's probes pass without a key; metrics do not."""
    assert (await _call(_wrapped(_length, keys=["k"]), _scope(path))).status == status


async def test_the_unexpected_is_a_500_without_detail() -> None:
    """An exception of unknown kind: a problem that shows nothing of it, and its traceback in the log."""

    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise LookupError("secret")

    with capture_logs() as entries:
        exchange = await _call(_wrapped(broken), _scope())
    assert (exchange.status, exchange.body["type"]) == (500, "urn:persyn:problem:internal")
    assert "secret" not in json.dumps(exchange.body)
    failure = next(entry for entry in entries if entry["event"] == "request_failed")
    assert isinstance(failure["exc_info"], LookupError)


async def test_a_client_that_leaves_cancels_its_request() -> None:
    """When the connection goes, the handler is cancelled where it waits, and the log says 499."""
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def slow(_scope: Scope, receive: Receive, _send: Send) -> None:
        await receive()
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    exchange = Exchange()
    with capture_logs() as entries:
        async with asyncio.TaskGroup() as group:
            group.create_task(_run(_wrapped(slow), exchange))
            await waiting.wait()
            exchange.gone.set()
    assert cancelled.is_set()
    assert exchange.sent == []
    assert entries[-1]["status"] == 499


async def _run(app: Callable[[Scope, Receive, Send], Awaitable[None]], exchange: Exchange) -> None:
    await app(_scope(), exchange.receive, exchange.send)


async def test_the_log_line_has_facts_and_no_content() -> None:
    """One line per request with method, status and duration; neither body nor path parameters."""
    with capture_logs() as entries:
        await _call(_wrapped(_length), _scope("/x/secret"), [b"a private prompt"])
    (line,) = [entry for entry in entries if entry["event"] == "request_answered"]
    assert (line["method"], line["status"], line["log_level"]) == ("POST", 200, "info")
    assert "private" not in repr(entries)
    assert "secret" not in repr(entries)

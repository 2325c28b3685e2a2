"""ASGI middleware: request id, timing, API key, body limit, disconnects, and the 500 of last resort."""

import asyncio
import hmac
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem_response
from service.client_watch import ClientWatch
from service.errors import PayloadTooLargeError, UnauthorizedError
from service.metrics import Metrics

REQUEST_ID_HEADER = b"x-request-id"
OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""What an orchestrator's probes ask for; they carry no key."""

_CLIENT_LEFT_STATUS = 499
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ObserveRequests:
    """Outermost: gives each request its id, counts and times it, writes its log line.

    The last resort too: an exception that no handler took becomes a 500 problem without detail, and its
    traceback goes to the log.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        # Bound once: a logger that is looked up for each line costs as much as the line.
        self._logger = structlog.get_logger(__name__).bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; what is no HTTP request (the lifespan) passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        id_header = (REQUEST_ID_HEADER, request_id.encode())
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        clock = asyncio.get_running_loop().time
        started_s = clock()
        self._metrics.request_started()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # the one broad except: what nobody expected is a 500
            if status is None:
                await problem_response(error, request_id)(scope, receive, send_with_id)
            else:
                self._logger.exception("response_broken_off", error=type(error).__name__)
                raise
        finally:
            self._finish(scope, status or _CLIENT_LEFT_STATUS, clock() - started_s)

    def _finish(self, scope: Scope, status: int, duration_s: float) -> None:
        template = _route_label(scope.get("route"))
        self._metrics.request_finished(scope["method"], template, status, duration_s)
        write = self._logger.debug if scope["path"] in OPEN_PATHS else self._logger.info
        write(
            "request_answered",
            method=scope["method"],
            route=template,
            status=status,
            duration_s=round(duration_s, 4),
        )


class RequireApiKey:
    """Refuses requests without a valid key, before a byte of their body is read."""

    def __init__(self, app: ASGIApp, *, api_keys: Iterable[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            error = self._refusal(_header(scope, b"authorization"))
            if error is not None:
                await problem_response(error, scope["state"]["request_id"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, authorization: str) -> UnauthorizedError | None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return UnauthorizedError("send one of the service's API keys as `Authorization: Bearer <key>`")
        given = token.strip().encode("latin-1", "replace")
        # All keys are compared, each in constant time: the time tells nothing about any of them.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return None if any(matches) else UnauthorizedError("the API key is not one of the service's keys")


class ReadBody:
    """Reads the whole body within the limit, then watches the connection.

    A client that leaves cancels its own request: its place in the batch and its calls to teachers.

    Args:
        max_bytes: Longest body.
        is_stream: Says which requests are left alone: their handler reads the body while it answers.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, is_stream: Callable[[Scope], bool]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._is_stream = is_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or self._is_stream(scope):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except PayloadTooLargeError as error:
            response = problem_response(error, scope["state"]["request_id"])
            # The rest of the body is still under way: this connection cannot serve another request.
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        if body is not None:
            await _until_disconnect(self._app, scope, body, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or ``None`` if the client left before its end."""
        declared = _header(scope, b"content-length")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        n_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            n_bytes += len(chunks[-1])
            if n_bytes > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"a request body may have at most {self._max_bytes} bytes; POST /route takes any number of "
            "prompts as a stream (content-type application/x-ndjson, one prompt per line)"
        )


async def _until_disconnect(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run ``app`` on a body that was read already; cancel it when the client leaves."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal first
        if first is not None:
            message, first = first, None
            return message
        return await watch.disconnect()

    async with ClientWatch(receive) as watch:
        await app(scope, replay, send)


def _route_label(route: Any) -> str | None:
    """What metrics call a route: its own label, or its path template; ``None`` if no route took it."""
    label: str | None = getattr(route, "label", None) or getattr(route, "path", None)
    return label


def _header(scope: Scope, name: bytes) -> str:
    """The first header of this name, empty if there is none."""
    for given, value in scope["headers"]:
        if given == name:
            return str(value, "latin-1")
    return ""


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is short and plain enough for logs and headers, else a new one."""
    given = _header(scope, REQUEST_ID_HEADER)
    return given if given and _SANE_REQUEST_ID.fullmatch(given) else os.urandom(16).hex()

"""The Python client of the service, blocking and asynchronous."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Self

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from clients.answers import (
    ROUTED,
    SYNTHESIZED,
    SYNTHESIZED_LINE,
    TEACHERS,
    Lines,
    RouteItem,
    StreamedItem,
    parse,
)
from clients.errors import ServiceResponseError
from clients.retry import RETRYABLE_STATUSES, RetryPolicy, parse_retry_after
from clients.route_windows import PromptLike, Window, query_of, read_answer, windows, windows_of
from clients.schemas import RouteResponse, SynthesizeResponse, TeachersResponse

_BULK_RETRY = RetryPolicy(max_attempts=8, cap_s=30.0)
"""Outlasts a restart of the service: a minute or two."""


def _prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    return [prompts] if isinstance(prompts, str | Mapping) else list(prompts)


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _raise_for_problem(http_response: httpx.Response) -> None:
    if http_response.is_success:
        return
    try:
        problem = http_response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    status = http_response.status_code
    detail = problem.get("detail") or f"HTTP {status}, not from a PerSyn service"
    retryable = bool(problem.get("retryable", status in RETRYABLE_STATUSES))
    raise ServiceResponseError(
        str(detail),
        status=status,
        problem=problem,
        retryable=retryable,
        retry_after_s=parse_retry_after(http_response.headers.get("retry-after")),
    )


def _unreachable(base_url: httpx.URL, error: httpx.HTTPError | aiohttp.ClientError) -> ServiceResponseError:
    reason = str(error) or type(error).__name__
    return ServiceResponseError(
        f"the service at {base_url} did not answer: {reason}", status=0, problem={}, retryable=True
    )


def _json_request(prompts: PromptLike | Sequence[PromptLike], options: Mapping[str, Any]) -> dict[str, Any]:
    # ASCII JSON: what the service refuses (a lone surrogate) it must get to see.
    content = json.dumps({"prompts": _prompts(prompts), **options}, allow_nan=False).encode()
    return {"content": content, "headers": {"content-type": "application/json"}}


def _window_request(window: Window, query: Sequence[tuple[str, str]]) -> dict[str, Any]:
    headers = {"content-type": "application/x-ndjson"}
    return {"content": window.body, "headers": headers, "params": list(query)}


def _retry_delay_s(
    retry: RetryPolicy, attempt: int, error: ServiceResponseError, window: Window
) -> float | None:
    """Seconds to wait before a window is sent again; on ``None``, give up: the error says what is done."""
    delay_s = retry.delay_s(attempt, error)
    if delay_s is None:
        error.add_note(f"route_many: {window.first - 1} prompts were answered, in order, before this")
    return delay_s


class PersynClient:
    """Blocking client.

    Args:
        base_url: For example ``http://127.0.0.1:8080``.
        api_key: Where the service asks for one.
        timeout_s: Longest silence of the service. Give ``/synthesize`` the time its teachers need.
        transport: For tests.

    Every method raises ``ServiceResponseError`` where the service refuses or cannot be reached.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        timeout_s: float = 330.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url, headers=_headers(api_key), timeout=timeout_s, transport=transport
        )

    def route(self, prompts: PromptLike | Sequence[PromptLike], **options: Any) -> RouteResponse:
        """Which teacher suits each prompt. ``options`` are the fields of ``RouteRequest``."""
        return parse(ROUTED, self._post("/route", prompts, options))

    def route_many(
        self,
        prompts: Iterable[PromptLike],
        *,
        in_flight: int = 4,
        retry: RetryPolicy = _BULK_RETRY,
        **options: Any,
    ) -> Iterator[RouteItem]:
        """Which teacher suits each of any number of prompts: one item per prompt, in their order.

        A prompt that cannot be routed is an ``UnroutedItem`` in its place. ``line`` of an item is the number
        of its prompt, from 1. Prompts are read and sent in windows of 512, and no further than items are
        taken, so memory is bounded. Calls of ``route`` by others go first. ``options`` are the fields of
        ``RouteRequest`` without ``prompts``.

        Args:
            in_flight: Windows on their way at one time.
            retry: A window whose request failed is sent again where that may help: routing changes nothing.
        """
        query, stopped = query_of(options), threading.Event()
        pool = ThreadPoolExecutor(in_flight, thread_name_prefix="persyn-route-many")
        answers: deque[Future[list[RouteItem]]] = deque()
        try:
            for window in windows(prompts):
                if len(answers) == in_flight:
                    yield from answers.popleft().result()
                answers.append(pool.submit(self._route_window, window, query, retry, stopped))
            while answers:
                yield from answers.popleft().result()
        finally:
            # Whoever takes no more items does not wait for the requests on their way.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def synthesize(self, prompts: PromptLike | Sequence[PromptLike], **options: Any) -> SynthesizeResponse:
        """Route, then generate. ``options`` are the fields of ``SynthesizeRequest``."""
        return parse(SYNTHESIZED, self._post("/synthesize", prompts, options))

    def stream_synthesize(
        self, prompts: PromptLike | Sequence[PromptLike], **options: Any
    ) -> Iterator[StreamedItem]:
        """As ``synthesize``, item by item as each completes; the summary comes last."""
        request, lines = _json_request(prompts, {**options, "stream": True}), Lines()
        try:
            with self._http.stream("POST", "/synthesize", **request) as http_response:
                if not http_response.is_success:
                    http_response.read()
                _raise_for_problem(http_response)
                for chunk in http_response.iter_bytes():
                    for line in lines.feed(chunk):
                        yield parse(SYNTHESIZED_LINE, line)
                for line in lines.end():
                    yield parse(SYNTHESIZED_LINE, line)
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error

    def teachers(self) -> TeachersResponse:
        """Live state of the teachers."""
        return parse(TEACHERS, self._get("/teachers"))

    def ready(self) -> bool:
        """Whether the service can route now."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _route_window(
        self,
        window: Window,
        query: Sequence[tuple[str, str]],
        retry: RetryPolicy,
        stopped: threading.Event,
    ) -> list[RouteItem]:
        attempt = 1
        while True:
            try:
                return read_answer(window, self._send("/route", _window_request(window, query)))
            except ServiceResponseError as error:
                delay_s = _retry_delay_s(retry, attempt, error, window)
                if delay_s is None or stopped.wait(delay_s):
                    raise
            attempt += 1

    def _post(
        self, path: str, prompts: PromptLike | Sequence[PromptLike], options: Mapping[str, Any]
    ) -> bytes:
        return self._send(path, _json_request(prompts, options))

    def _send(self, path: str, request: Mapping[str, Any]) -> bytes:
        try:
            http_response = self._http.post(path, **request)
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error
        _raise_for_problem(http_response)
        return http_response.content

    def _get(self, path: str) -> bytes:
        try:
            http_response = self._http.get(path)
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error
        _raise_for_problem(http_response)
        return http_response.content


class AsyncPersynClient:
    """Asynchronous twin of ``PersynClient``: same arguments, same methods, ``aclose``."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        timeout_s: float = 330.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=_headers(api_key),
            timeout=timeout_s,
            transport=transport or AiohttpTransport(),
        )

    async def route(self, prompts: PromptLike | Sequence[PromptLike], **options: Any) -> RouteResponse:
        """See ``PersynClient.route``."""
        return parse(ROUTED, await self._post("/route", prompts, options))

    async def route_many(
        self,
        prompts: Iterable[PromptLike] | AsyncIterable[PromptLike],
        *,
        in_flight: int = 4,
        retry: RetryPolicy = _BULK_RETRY,
        **options: Any,
    ) -> AsyncIterator[RouteItem]:
        """See ``PersynClient.route_many``. Prompts may come asynchronously too."""
        query = query_of(options)
        answers: deque[asyncio.Task[list[RouteItem]]] = deque()
        try:
            async with aclosing(windows_of(prompts)) as all_windows:
                async for window in all_windows:
                    if len(answers) == in_flight:
                        for item in await answers.popleft():
                            yield item
                    answers.append(asyncio.create_task(self._route_window(window, query, retry)))
            while answers:
                for item in await answers.popleft():
                    yield item
        finally:
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    async def synthesize(
        self, prompts: PromptLike | Sequence[PromptLike], **options: Any
    ) -> SynthesizeResponse:
        """See ``PersynClient.synthesize``."""
        return parse(SYNTHESIZED, await self._post("/synthesize", prompts, options))

    async def stream_synthesize(
        self, prompts: PromptLike | Sequence[PromptLike], **options: Any
    ) -> AsyncIterator[StreamedItem]:
        """See ``PersynClient.stream_synthesize``."""
        request, lines = _json_request(prompts, {**options, "stream": True}), Lines()
        try:
            async with self._http.stream("POST", "/synthesize", **request) as http_response:
                if not http_response.is_success:
                    await http_response.aread()
                _raise_for_problem(http_response)
                async for chunk in http_response.aiter_bytes():
                    for line in lines.feed(chunk):
                        yield parse(SYNTHESIZED_LINE, line)
                for line in lines.end():
                    yield parse(SYNTHESIZED_LINE, line)
        except (httpx.HTTPError, aiohttp.ClientError) as error:
            raise _unreachable(self._http.base_url, error) from error

    async def teachers(self) -> TeachersResponse:
        """See ``PersynClient.teachers``."""
        return parse(TEACHERS, await self._get("/teachers"))

    async def ready(self) -> bool:
        """See ``PersynClient.ready``."""
        try:
            return (await self._http.get("/readyz")).is_success
        except (httpx.HTTPError, aiohttp.ClientError):
            return False

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _route_window(
        self, window: Window, query: Sequence[tuple[str, str]], retry: RetryPolicy
    ) -> list[RouteItem]:
        attempt = 1
        while True:
            try:
                return read_answer(window, await self._send("/route", _window_request(window, query)))
            except ServiceResponseError as error:
                delay_s = _retry_delay_s(retry, attempt, error, window)
                if delay_s is None:
                    raise
            await asyncio.sleep(delay_s)
            attempt += 1

    async def _post(
        self, path: str, prompts: PromptLike | Sequence[PromptLike], options: Mapping[str, Any]
    ) -> bytes:
        return await self._send(path, _json_request(prompts, options))

    async def _send(self, path: str, request: Mapping[str, Any]) -> bytes:
        try:
            http_response = await self._http.post(path, **request)
        except (httpx.HTTPError, aiohttp.ClientError) as error:
            raise _unreachable(self._http.base_url, error) from error
        _raise_for_problem(http_response)
        return http_response.content

    async def _get(self, path: str) -> bytes:
        try:
            http_response = await self._http.get(path)
        except (httpx.HTTPError, aiohttp.ClientError) as error:
            raise _unreachable(self._http.base_url, error) from error
        _raise_for_problem(http_response)
        return http_response.content

"""The Python client of the service, blocking and asynchronous."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from clients.errors import ServiceResponseError
from clients.retry import RETRYABLE_STATUSES
from clients.schemas import (
    AnsweredItem,
    FailedItem,
    RouteResponse,
    SynthesisSummary,
    SynthesizeResponse,
    TeachersResponse,
)

PromptLike = str | Mapping[str, Any]
StreamedItem = AnsweredItem | FailedItem | SynthesisSummary
Answer = TypeVar("Answer")


def _line_kind(line: Any) -> str:
    """Tag of one line of a stream: the status of an item; a summary has none, but counts."""
    fields = line if isinstance(line, dict) else {}
    return str(fields.get("status", "summary" if "ok" in fields else "unknown"))


_route: TypeAdapter[RouteResponse] = TypeAdapter(RouteResponse)
_synthesize: TypeAdapter[SynthesizeResponse] = TypeAdapter(SynthesizeResponse)
_teachers: TypeAdapter[TeachersResponse] = TypeAdapter(TeachersResponse)
_line: TypeAdapter[StreamedItem] = TypeAdapter(
    Annotated[
        Annotated[AnsweredItem, Tag("ok")]
        | Annotated[FailedItem, Tag("error")]
        | Annotated[SynthesisSummary, Tag("summary")],
        Discriminator(_line_kind),
    ]
)


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
    raise ServiceResponseError(str(detail), status=status, problem=problem, retryable=retryable)


def _unreachable(base_url: httpx.URL, error: httpx.HTTPError | aiohttp.ClientError) -> ServiceResponseError:
    reason = str(error) or type(error).__name__
    return ServiceResponseError(
        f"the service at {base_url} did not answer: {reason}", status=0, problem={}, retryable=True
    )


def _parse(form: TypeAdapter[Answer], payload: bytes) -> Answer:
    try:
        return form.validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise ServiceResponseError(
            f"the service answered in a form that this client does not know: {where}: {first['msg']}",
            status=200,
            problem={},
            retryable=False,
        ) from None


def _json_request(prompts: PromptLike | Sequence[PromptLike], options: Mapping[str, Any]) -> dict[str, Any]:
    # ASCII JSON: what the service refuses (a lone surrogate) it must get to see.
    content = json.dumps({"prompts": _prompts(prompts), **options}, allow_nan=False).encode()
    return {"content": content, "headers": {"content-type": "application/json"}}


class _Lines:
    """NDJSON lines of a byte stream. ``iter_lines`` of httpx also splits at U+2028, which JSON may hold."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that ``chunk`` completes."""
        self._rest += chunk
        *whole, rest = self._rest.split(b"\n")
        self._rest = rest
        return [bytes(line) for line in whole if line.strip()]

    def end(self) -> list[bytes]:
        """The last line if no newline ended it."""
        return [bytes(self._rest)] if self._rest.strip() else []


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
        return _parse(_route, self._post("/route", prompts, options))

    def synthesize(self, prompts: PromptLike | Sequence[PromptLike], **options: Any) -> SynthesizeResponse:
        """Route, then generate. ``options`` are the fields of ``SynthesizeRequest``."""
        return _parse(_synthesize, self._post("/synthesize", prompts, options))

    def stream_synthesize(
        self, prompts: PromptLike | Sequence[PromptLike], **options: Any
    ) -> Iterator[StreamedItem]:
        """As ``synthesize``, item by item as each completes; the summary comes last."""
        request, lines = _json_request(prompts, {**options, "stream": True}), _Lines()
        try:
            with self._http.stream("POST", "/synthesize", **request) as http_response:
                if not http_response.is_success:
                    http_response.read()
                _raise_for_problem(http_response)
                for chunk in http_response.iter_bytes():
                    for line in lines.feed(chunk):
                        yield _parse(_line, line)
                for line in lines.end():
                    yield _parse(_line, line)
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error

    def teachers(self) -> TeachersResponse:
        """Live state of the teachers."""
        return _parse(_teachers, self._get("/teachers"))

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

    def _post(
        self, path: str, prompts: PromptLike | Sequence[PromptLike], options: Mapping[str, Any]
    ) -> bytes:
        try:
            http_response = self._http.post(path, **_json_request(prompts, options))
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
        return _parse(_route, await self._post("/route", prompts, options))

    async def synthesize(
        self, prompts: PromptLike | Sequence[PromptLike], **options: Any
    ) -> SynthesizeResponse:
        """See ``PersynClient.synthesize``."""
        return _parse(_synthesize, await self._post("/synthesize", prompts, options))

    async def stream_synthesize(
        self, prompts: PromptLike | Sequence[PromptLike], **options: Any
    ) -> AsyncIterator[StreamedItem]:
        """See ``PersynClient.stream_synthesize``."""
        request, lines = _json_request(prompts, {**options, "stream": True}), _Lines()
        try:
            async with self._http.stream("POST", "/synthesize", **request) as http_response:
                if not http_response.is_success:
                    await http_response.aread()
                _raise_for_problem(http_response)
                async for chunk in http_response.aiter_bytes():
                    for line in lines.feed(chunk):
                        yield _parse(_line, line)
                for line in lines.end():
                    yield _parse(_line, line)
        except (httpx.HTTPError, aiohttp.ClientError) as error:
            raise _unreachable(self._http.base_url, error) from error

    async def teachers(self) -> TeachersResponse:
        """See ``PersynClient.teachers``."""
        return _parse(_teachers, await self._get("/teachers"))

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

    async def _post(
        self, path: str, prompts: PromptLike | Sequence[PromptLike], options: Mapping[str, Any]
    ) -> bytes:
        try:
            http_response = await self._http.post(path, **_json_request(prompts, options))
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

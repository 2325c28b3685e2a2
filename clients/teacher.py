"""One OpenAI-compatible endpoint: a chat request in, a checked completion or a named error out."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from clients.canonical import without_none
from clients.errors import (
    TeacherError,
    TeacherProtocolError,
    TeacherRateLimitedError,
    TeacherRejectedError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from clients.retry import RETRYABLE_STATUSES, parse_retry_after
from clients.types import ChatMessage, Completion, TeacherSpec, Usage

MAX_RESPONSE_BYTES = 32 * 1024 * 1024
_CONNECT_TIMEOUT_S = 10.0
_MAX_DEPTH = 100
_MAX_COUNT = 2**53
# How some servers call what the OpenAI API calls stop and length.
_OTHER_NAMES = {
    "eos_token": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
}
_FINISH_REASONS = frozenset({"stop", "length", "content_filter", "tool_calls", "function_call"})


def request_body(
    spec: TeacherSpec, messages: Sequence[ChatMessage], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The effective chat request to a teacher: its own parameters, overridden by the caller's.

    The teacher's system prompt comes first and is joined to a system turn of the prompt, since chat
    templates of many models accept one system turn only.
    """
    body = {**without_none(spec.sampling), **without_none(spec.extra_body), **without_none(sampling)}
    body["model"] = spec.model
    body["messages"] = _with_system_prompt(spec.system_prompt, messages)
    body["stream"] = False
    return body


def _with_system_prompt(system_prompt: str | None, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    turns = [dict(message) for message in messages]
    if not system_prompt:
        return turns
    if not turns or turns[0].get("role") != "system":
        return [{"role": "system", "content": system_prompt}, *turns]
    content = turns[0].get("content")
    joined: str | list[Any]
    if isinstance(content, list):
        joined = [{"type": "text", "text": system_prompt}, *content]
    else:
        joined = f"{system_prompt}\n\n{content}" if content else system_prompt
    return [{**turns[0], "content": joined}, *turns[1:]]


class TeacherClient:
    """Pooled connections to one teacher's endpoint. One attempt per call; retries live elsewhere.

    The key of a teacher goes to its own endpoint only: redirects are not followed, cookies not kept.
    """

    def __init__(self, spec: TeacherSpec, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.spec = spec
        self._http = httpx.AsyncClient(
            transport=transport or _pooled_transport(spec.limits.concurrency),
            headers={"authorization": f"Bearer {spec.api_key}"} if spec.api_key else {},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            timeout=httpx.Timeout(spec.timeout_s, connect=min(spec.timeout_s, _CONNECT_TIMEOUT_S), pool=None),
        )

    async def complete(self, body: Mapping[str, Any]) -> Completion:
        """Send one chat request.

        Raises:
            TeacherError: One of its kinds; ``retryable`` says whether another attempt makes sense.
        """
        # ASCII JSON: a lone surrogate in a prompt must not fail on its way into UTF-8.
        content = json.dumps(body, ensure_ascii=True, allow_nan=False).encode()
        status, headers, payload = await self._post("/chat/completions", content)
        self._check_status(status, headers, payload)
        return self._parse(payload)

    async def models(self) -> frozenset[str]:
        """Ids of the models that the endpoint lists: shows that it is reachable and takes the key.

        Empty for an endpoint without such a list.

        Raises:
            TeacherError: It cannot be reached or refuses.
        """
        try:
            http_response = await self._http.get(self._url("/models"))
        except (httpx.HTTPError, aiohttp.ClientError) as error:
            raise self._transport_error(error) from error
        if http_response.status_code in {404, 405}:
            return frozenset()
        self._check_status(http_response.status_code, http_response.headers, http_response.content)
        try:
            entries = http_response.json()["data"]
            return frozenset(str(entry["id"]) for entry in entries)
        except (ValueError, KeyError, TypeError) as error:
            raise self._protocol_error("answers /models with something else than a list") from error

    async def aclose(self) -> None:
        """Close the pooled connections."""
        await self._http.aclose()

    def _url(self, path: str) -> str:
        return self.spec.base_url.rstrip("/") + path

    async def _post(self, path: str, content: bytes) -> tuple[int, httpx.Headers, bytes]:
        headers = {"content-type": "application/json", "accept": "application/json"}
        try:
            async with self._http.stream(
                "POST", self._url(path), content=content, headers=headers
            ) as http_response:
                payload = bytearray()
                async for chunk in http_response.aiter_bytes():
                    payload += chunk
                    if len(payload) > MAX_RESPONSE_BYTES:
                        raise self._protocol_error(f"sent more than {MAX_RESPONSE_BYTES} bytes")
                return http_response.status_code, http_response.headers, bytes(payload)
        except (httpx.HTTPError, aiohttp.ClientError) as error:
            raise self._transport_error(error) from error

    def _transport_error(self, error: httpx.HTTPError | aiohttp.ClientError) -> TeacherError:
        teacher_id = self.spec.id
        if _is_timeout(error):
            return TeacherTimeoutError(
                f"teacher {teacher_id!r} did not answer within {self.spec.timeout_s:g} s",
                teacher_id=teacher_id,
                retryable=True,
            )
        reason = str(error) or type(error).__name__
        return TeacherUnavailableError(
            f"teacher {teacher_id!r} cannot be reached at {self.spec.base_url}: {reason}",
            teacher_id=teacher_id,
            retryable=True,
        )

    def _check_status(self, status: int, headers: httpx.Headers, payload: bytes) -> None:
        if 200 <= status < 300:
            return
        teacher_id = self.spec.id
        says = f"teacher {teacher_id!r} answered HTTP {status}: {self._excerpt(payload)}"
        details = {"upstream_status": status}
        if status == 429:
            retry_after_s = parse_retry_after(headers.get("retry-after"))
            raise TeacherRateLimitedError(
                says, teacher_id=teacher_id, retry_after_s=retry_after_s, details=details
            )
        if status in RETRYABLE_STATUSES or status >= 500:
            raise TeacherUnavailableError(says, teacher_id=teacher_id, retryable=True, details=details)
        raise TeacherRejectedError(says, teacher_id=teacher_id, retryable=False, details=details)

    def _parse(self, payload: bytes) -> Completion:
        """Check that a 200 is a whole chat completion: some servers hide errors behind that status."""
        try:
            body = json.loads(payload, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError):
            raise self._protocol_error(f"sent no JSON: {self._excerpt(payload)}") from None
        if not isinstance(body, dict):
            raise self._protocol_error(f"sent a JSON {type(body).__name__}, not an object")
        if body.get("error"):
            raise self._protocol_error(f"answered 200 with an error inside: {self._excerpt(payload)}")
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices:
            raise self._protocol_error("answered 200 without choices")
        fingerprint = body.get("system_fingerprint")
        return Completion(
            choices=tuple(self._checked_choice(choice) for choice in choices),
            served_model=_valid_unicode(str(body.get("model") or self.spec.model)),
            usage=_usage(body.get("usage")),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            system_fingerprint=None if fingerprint is None else _valid_unicode(str(fingerprint)),
        )

    def _checked_choice(self, choice: Any) -> dict[str, Any]:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise self._protocol_error("sent a choice without a message")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise self._protocol_error("sent a message whose content is not text")
        reason = choice.get("finish_reason")
        if not isinstance(reason, str):
            raise self._protocol_error(f"sent finish_reason {reason!r}: a cut answer")
        reason = _OTHER_NAMES.get(reason, reason)
        if reason not in _FINISH_REASONS:
            raise self._useless_answer(f"sent finish_reason {reason!r}, which means nothing here")
        if not (content or message.get("tool_calls")):
            raise self._useless_answer(f"sent an empty message (finish_reason {reason!r})")
        try:
            whole: dict[str, Any] = _valid_unicode(
                {**choice, "finish_reason": reason, "message": {**message, "content": content or ""}}
            )
        except _TooDeepError:
            raise self._protocol_error(f"sent JSON nested deeper than {_MAX_DEPTH} levels") from None
        return whole

    def _excerpt(self, payload: bytes, n_chars: int = 200) -> str:
        """The beginning of what the teacher sent, less the key that it may have quoted."""
        text = " ".join(payload[: 8 * n_chars].decode("utf-8", "replace").split())
        if self.spec.api_key:
            text = text.replace(self.spec.api_key, "[key]")
        return repr(text if len(text) <= n_chars else text[:n_chars] + "…")

    def _useless_answer(self, what: str) -> TeacherProtocolError:
        """An answer that was made and paid for, but says nothing: about this prompt, not the teacher."""
        return TeacherProtocolError(f"teacher {self.spec.id!r} {what}", teacher_id=self.spec.id)

    def _protocol_error(self, what: str) -> TeacherProtocolError:
        # Retryable: behind a load balancer the next replica often answers well.
        return TeacherProtocolError(
            f"teacher {self.spec.id!r} {what}", teacher_id=self.spec.id, retryable=True
        )


def _pooled_transport(concurrency: int) -> AiohttpTransport:
    def open_session() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=concurrency, keepalive_timeout=30)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    return AiohttpTransport(client=open_session)


def _is_timeout(error: httpx.HTTPError | aiohttp.ClientError) -> bool:
    """Whether time ran out. The transport calls a refused or dropped connection a time-out as well."""
    if isinstance(error.__cause__, aiohttp.ClientError):
        return isinstance(error.__cause__, aiohttp.ServerTimeoutError)
    return isinstance(error, httpx.TimeoutException | aiohttp.ServerTimeoutError)


def _usage(usage: Any) -> Usage:
    counts = usage if isinstance(usage, dict) else {}
    n_prompt, n_completion = _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    return Usage(n_prompt, n_completion, _count(counts.get("total_tokens")) or n_prompt + n_completion)


def _count(value: Any) -> int:
    """A token count; 0 where the teacher sent none or nonsense: its answer is still good."""
    return min(max(0, int(value)), _MAX_COUNT) if isinstance(value, int | float) else 0


def _finite(number: str) -> float | None:
    """A number of the answer; ``None`` for NaN and infinities, which no JSON downstream can hold."""
    value = float(number)
    return value if math.isfinite(value) else None


class _TooDeepError(Exception):
    """Lists and objects are nested deeper than the writers downstream follow."""


def _valid_unicode(value: Any, depth: int = 0) -> Any:
    """``value`` with U+FFFD for each lone surrogate: no file format downstream can hold them."""
    if depth > _MAX_DEPTH:
        raise _TooDeepError
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_valid_unicode(name): _valid_unicode(member, depth + 1) for name, member in value.items()}
    if isinstance(value, list):
        return [_valid_unicode(member, depth + 1) for member in value]
    return value

"""Any number of prompts as windows: what one request to ``/route`` carries, and how its answer is read.

One endless request would not do everywhere: a proxy that collects bodies, a client library
that reads when it has sent, a service that is restarted each end it. Windows are requests like others: each
is sent whole, goes to any replica, and is repeated if it fails, because routing changes nothing.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clients.answers import ROUTED_LINE, Lines, RouteItem, parse
from clients.errors import ServiceResponseError
from clients.schemas import RouteSummary

PromptLike = str | Mapping[str, Any]

_MAX_PROMPTS = 512
_MAX_BYTES = 2**20
"""A window is within what the service reads before it must be read from, so no client can wait for itself."""


@dataclass(frozen=True, slots=True)
class Window:
    """Prompts that follow each other.

    Args:
        first: Number of its first prompt, from 1.
        body: One line per prompt.
    """

    first: int
    n_prompts: int
    body: bytes


class _Packer:
    """Collects prompts until a window is full."""

    def __init__(self) -> None:
        self._first = 1
        self._lines: list[bytes] = []
        self._n_bytes = 0

    def add(self, prompt: PromptLike) -> Window | None:
        """Take one prompt; returns a window if it filled one."""
        # ASCII JSON: what the service refuses (a lone surrogate) it must get to see.
        line = json.dumps(prompt, allow_nan=False).encode() + b"\n"
        self._lines.append(line)
        self._n_bytes += len(line)
        return self.rest() if len(self._lines) >= _MAX_PROMPTS or self._n_bytes >= _MAX_BYTES else None

    def rest(self) -> Window | None:
        """What is collected, if anything."""
        if not self._lines:
            return None
        window = Window(self._first, len(self._lines), b"".join(self._lines))
        self._first += len(self._lines)
        self._lines, self._n_bytes = [], 0
        return window


def windows(prompts: Iterable[PromptLike]) -> Iterator[Window]:
    """The prompts in their order, read no further than the window needs."""
    packer = _Packer()
    for prompt in _many(prompts):
        if (window := packer.add(prompt)) is not None:
            yield window
    if (window := packer.rest()) is not None:
        yield window


async def windows_of(
    prompts: Iterable[PromptLike] | AsyncIterable[PromptLike],
) -> AsyncGenerator[Window, None]:
    """``windows`` of prompts that may come asynchronously."""
    if not isinstance(prompts, AsyncIterable):
        for window in windows(prompts):
            yield window
        return
    packer = _Packer()
    async for prompt in prompts:
        if (filled := packer.add(prompt)) is not None:
            yield filled
    if (last := packer.rest()) is not None:
        yield last


def query_of(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options of ``/route`` as query parameters: a list is repeated, ``None`` is left out."""
    pairs: list[tuple[str, str]] = []
    for name, value in options.items():
        if isinstance(value, list | tuple | set | frozenset):
            # No teacher at all is not the same as no allow-list: the service gets to see it, and refuses it.
            empty = [""] if name == "teachers" else []
            pairs += [(name, str(member)) for member in value or empty]
        elif value is not None:
            pairs.append((name, str(value)))
    return pairs


def read_answer(window: Window, content: bytes) -> list[RouteItem]:
    """One item per prompt of a window, in order, each with the number of its prompt as ``line``.

    Raises:
        ServiceResponseError: The answer is broken off, retryable if it may be whole next time, or it is of
            another form.
    """
    lines = Lines()
    whole = lines.feed(content) or lines.end()
    parsed = [parse(ROUTED_LINE, line) for line in whole]
    if not parsed or not isinstance(summary := parsed.pop(), RouteSummary):
        raise _unusable("the service broke its answer off", retryable=True)
    if summary.error is not None:
        raise ServiceResponseError(
            f"the service ended its answer early: {summary.error.detail}",
            status=200,
            problem=summary.error.model_dump(),
            retryable=summary.error.retryable,
        )
    numbered: list[RouteItem] = []
    for number, item in enumerate(parsed, start=1):
        if isinstance(item, RouteSummary) or item.line != number:
            raise _unusable("the service answered other lines than were sent", retryable=False)
        numbered.append(item.model_copy(update={"line": window.first + number - 1}))
    if len(numbered) != window.n_prompts:
        raise _unusable("the service answered other lines than were sent", retryable=False)
    return numbered


def _many(prompts: Iterable[PromptLike]) -> Iterable[PromptLike]:
    return [prompts] if isinstance(prompts, str | Mapping) else prompts


def _unusable(message: str, *, retryable: bool) -> ServiceResponseError:
    return ServiceResponseError(message, status=200, problem={}, retryable=retryable)

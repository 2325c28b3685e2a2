"""The response cache: its protocol, its keys, and what may be stored."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from clients.canonical import canonical_json, content_hash
from clients.types import Completion, TeacherSpec, Usage

KEY_SCHEMA_VERSION = 1
"""Raise it when the meaning of a key or the form of an entry changes: old entries are never read again."""


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """A completion as first given, with what it took: a hit keeps its original usage and attempts."""

    key: str
    completion: Completion
    attempts: int
    latency_s: float


class ResponseCache(Protocol):
    """Where completions are kept. Implementations raise ``CacheError`` for every failure."""

    async def get(self, key: str) -> CachedResponse | None:
        """The entry of ``key``; ``None`` if there is none or it is not the entry of this key."""

    async def put(self, entry: CachedResponse) -> None:
        """Store ``entry`` under its own key."""

    async def ping(self) -> None:
        """Raise ``CacheError`` if the store cannot be used."""

    async def aclose(self) -> None:
        """Release files or connections."""


def response_key(spec: TeacherSpec, body: Mapping[str, Any]) -> str:
    """What counts as the same request: the teacher, where it is served, and its whole effective body.

    ``body`` holds the messages with the system prompt, the model and every sampling parameter, so that a
    new parameter is part of the key without a change here.
    """
    return content_hash(
        {"schema": KEY_SCHEMA_VERSION, "teacher": spec.id, "base_url": spec.base_url, "body": dict(body)}
    )


def may_store(completion: Completion) -> bool:
    """Only whole answers are stored: a truncated or filtered one must be asked for again."""
    return completion.finish_reason == "stop" and all(
        choice["message"]["content"].strip() for choice in completion.choices
    )


def encode_entry(entry: CachedResponse) -> bytes:
    """An entry as compressed canonical JSON, its key inside."""
    return zlib.compress(canonical_json(asdict(entry)).encode(), level=1)


def decode_entry(key: str, payload: bytes) -> CachedResponse | None:
    """The entry, or ``None`` where the payload is damaged or belongs to another key.

    A store can hand out a foreign value (a reply left on a connection by a cancelled command), so the
    key inside is compared with the key asked for.
    """
    try:
        fields = json.loads(zlib.decompress(payload))
        if fields["key"] != key:
            return None
        completion = fields.pop("completion")
        usage = Usage(**completion.pop("usage"))
        choices = tuple(completion.pop("choices"))
        return CachedResponse(completion=Completion(choices=choices, usage=usage, **completion), **fields)
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError):
        return None

"""What counts as the same content: canonical JSON, and hashes of it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from clients.types import ChatMessage


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        ValueError: The value holds NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def content_hash(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def messages_hash(messages: Iterable[ChatMessage]) -> str:
    """Hex SHA-256 of a chat: the ``prompt_hash`` of the provenance."""
    return content_hash([dict(message) for message in messages])


def without_none(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` less its ``None`` values: in the OpenAI API null means absent. Zero stays zero."""
    return {name: value for name, value in body.items() if value is not None}

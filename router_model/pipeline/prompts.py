"""Prompt files: JSONL, Parquet and OpenAI batch input lines, read and checked."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clients.canonical import messages_hash
from clients.types import ChatMessage, Prompt
from router_model.errors import TableError

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file, in its order.

    A row has ``prompt`` (a text, or a chat list) or ``messages``, or is an OpenAI batch input line. The id is
    ``id`` or ``custom_id``, else a hash of the content. Answers at the end of a chat are cut off and kept as
    ``reference`` in ``extra``, with every other column. A row that repeats an id and its content is dropped.

    Raises:
        TableError: With the line: no prompt, an empty one, invalid Unicode, an id with two contents.
    """
    prompts: dict[str, Prompt] = {}
    for line, row in _rows(path):
        prompt = _prompt(path, line, row)
        earlier = prompts.setdefault(prompt.id, prompt)
        if messages_hash(earlier.messages) != messages_hash(prompt.messages):
            raise TableError(path, f"id {prompt.id!r} stands twice with different content", line=line)
    if not prompts:
        raise TableError(path, "holds no prompts")
    return list(prompts.values())


def sample_prompts(prompts: list[Prompt], n_prompts: int | None, seed: int) -> list[Prompt]:
    """At most ``n_prompts`` of the prompts, in their order.

    The choice depends on the seed and the ids alone: adding prompts to the file moves few of those chosen.
    """
    if n_prompts is None or n_prompts >= len(prompts):
        return prompts
    ranked = sorted(prompts, key=lambda prompt: unit_hash(seed, "sample", prompt.id))
    chosen = {prompt.id for prompt in ranked[:n_prompts]}
    return [prompt for prompt in prompts if prompt.id in chosen]


def unit_hash(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.sha256(f"{seed}\x00{purpose}\x00{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise TableError(path, f"not a readable Parquet file: {error}") from error
        yield from enumerate(rows, start=1)
        return
    try:
        with path.open("rb") as lines:
            yield from _json_lines(path, lines)
    except OSError as error:
        raise TableError(path, f"cannot be read: {error.strerror}") from error


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise TableError(path, f"not a JSON object: {error}", line=number) from error
        if not isinstance(row, dict):
            raise TableError(path, "not a JSON object", line=number)
        yield number, row


def _prompt(path: Path, line: int, row: Mapping[str, Any]) -> Prompt:
    try:
        messages, reference = _split_reference(_messages(row))
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise TableError(
            path, "the prompt holds a lone surrogate, which is no valid text", line=line
        ) from None
    except ValueError as error:
        raise TableError(path, str(error), line=line) from None
    used = {"prompt", "messages", "id", "custom_id"} | ({"body", "method", "url"} if "body" in row else set())
    extra = {name: value for name, value in row.items() if name not in used and value is not None}
    if reference:
        extra["reference"] = reference
    named = row.get("id") if row.get("id") is not None else row.get("custom_id")
    identifier = messages_hash(messages)[:16] if named is None else str(named)
    if not identifier.strip():
        raise TableError(path, "the id is empty", line=line)
    return Prompt(id=identifier, messages=messages, extra=extra)


def _messages(row: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    """The chat of a row. Raises ``ValueError`` with what is wrong."""
    body = row.get("body")
    source = body if isinstance(body, Mapping) else row
    content = source.get("messages") if source.get("messages") is not None else source.get("prompt")
    if content is None:
        raise ValueError("neither 'prompt' nor 'messages'")
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if not isinstance(content, list) or not content:
        raise ValueError("the prompt must be a text or a list of chat messages")
    return tuple(_message(message) for message in content)


def _message(message: Any) -> ChatMessage:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        raise ValueError(f"a chat message needs a role, one of {', '.join(sorted(_ROLES))}")
    content = message.get("content")
    if not isinstance(content, str | list):
        raise ValueError(f"the content of a {message['role']} message must be a text or a list of parts")
    if message["role"] == "user" and not (content.strip() if isinstance(content, str) else content):
        raise ValueError("the prompt is empty")
    return {name: value for name, value in message.items() if value is not None}


def _split_reference(
    messages: tuple[ChatMessage, ...],
) -> tuple[tuple[ChatMessage, ...], list[dict[str, Any]]]:
    n_kept = len(messages)
    while n_kept and messages[n_kept - 1]["role"] == "assistant":
        n_kept -= 1
    if not n_kept:
        raise ValueError("the chat holds answers only")
    return messages[:n_kept], [dict(message) for message in messages[n_kept:]]


def prompt_from_text(text: str) -> Prompt:
    """A prompt of one user turn.

    Raises:
        TableError: The text is empty.
    """
    return _prompt(Path("the command line"), 1, {"prompt": text})

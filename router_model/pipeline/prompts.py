"""Prompt files: JSONL, Parquet and OpenAI batch input lines, read and checked."""

import hashlib
import importlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

from clients.canonical import content_hash, messages_hash, without_none
from clients.types import ChatMessage, Prompt
from router_model.errors import TableError
from router_model.tokenization import message_text

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_INSTRUCTION_ROLES = frozenset({"system", "developer"})
_MAX_DEPTH = 64
"""Levels of lists and objects in a row. No real row comes near it, and every later reader and writer of JSON
has room to spare before it runs into the interpreter's recursion limit."""


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file, in its order.

    A row has ``prompt`` (a text, or a chat list) or ``messages``, or is an OpenAI batch input line. The id is
    ``id`` or ``custom_id``, else a hash of the content. Answers at the end of a chat are cut off and kept as
    ``reference`` in ``extra``, with every other column; the other parameters of a batch line's body stand in
    ``extra["body"]``. A row that repeats an earlier one in all its columns is dropped.

    Raises:
        TableError: With the line: no prompt, an empty one, a value that JSON in UTF-8 cannot hold (a lone
            surrogate, NaN, bytes), an id whose rows differ.
    """
    return [prompt for prompt, _ in read_prompt_rows(path)]


def read_prompt_rows(path: Path) -> list[tuple[Prompt, dict[str, Any]]]:
    """The prompts of ``read_prompts``, each with its row as the file has it, ready for JSON.

    Raises:
        TableError: As ``read_prompts``.
    """
    prompts: dict[str, tuple[Prompt, dict[str, Any]]] = {}
    for line, row in _rows(path):
        prompt = _prompt(path, line, row)
        earlier, _ = prompts.setdefault(prompt.id, (prompt, {name: _plain(row[name]) for name in row}))
        if earlier is not prompt:
            _require_equal(path, line, earlier, prompt)
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


def _require_equal(path: Path, line: int, earlier: Prompt, prompt: Prompt) -> None:
    """Two rows of one id must be one row: which of two answers or constraints counts cannot be guessed."""
    if messages_hash(earlier.messages) != messages_hash(prompt.messages):
        raise TableError(path, f"id {prompt.id!r} stands twice with different content", line=line)
    # Hashes, because 1, 1.0 and True are equal in Python but not in a file.
    differing = [
        name
        for name in sorted({*earlier.extra, *prompt.extra})
        if content_hash([earlier.extra.get(name)]) != content_hash([prompt.extra.get(name)])
    ]
    if differing:
        reason = f"id {prompt.id!r} stands twice with the same prompt, but {differing[0]!r} differs"
        raise TableError(path, f"{reason}: drop one row or give the rows ids of their own", line=line)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Asked first: as Parquet a folder would be read as all the files in it.
    if path.is_dir():
        raise TableError(path, "cannot be read: it is a folder")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
        return
    try:
        with path.open("rb") as lines:
            yield from _json_lines(path, lines)
    except OSError as error:
        raise TableError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # A NUL byte in the path.
        raise TableError(path, f"cannot be read: {error}") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    # Imported here: the serving image reads prompts from the command line and has no pyarrow.
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise TableError(path, "reading Parquet needs pyarrow: pip install 'persyn[train]'") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    # Beside Arrow's own errors: damaged text, dates that Python cannot hold, unknown time zones.
    except (OSError, arrow.ArrowException, ValueError, OverflowError, LookupError) as error:
        raise TableError(path, f"not a readable Parquet file: {error}") from error
    return rows


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except RecursionError as error:
            raise TableError(path, "not a JSON object: it is nested too deeply", line=number) from error
        except ValueError as error:
            raise TableError(path, f"not a JSON object: {error}", line=number) from error
        if not isinstance(row, dict):
            raise TableError(path, "not a JSON object", line=number)
        yield number, row


def _prompt(path: Path, line: int, row: Mapping[str, Any]) -> Prompt:
    try:
        return _checked_prompt({_column_name(name): _plain_column(name, row[name]) for name in row})
    except ValueError as error:
        raise TableError(path, str(error), line=line) from None


def _checked_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row. Raises ``ValueError`` with what is wrong."""
    body = row.get("body")
    is_batch_line = isinstance(body, Mapping)
    source = body if isinstance(body, Mapping) else row
    column = "messages" if source.get("messages") is not None else "prompt"
    messages, reference = _split_reference(_messages(source.get(column)))
    _require_text(messages)
    used = {"id", "custom_id", *(("body", "method", "url") if is_batch_line else ("prompt", "messages"))}
    extra = {name: value for name, value in row.items() if name not in used and value is not None}
    if isinstance(body, Mapping):
        parameters = without_none({name: value for name, value in body.items() if name != column})
        extra.update({"body": parameters} if parameters else {})
    if reference:
        extra["reference"] = reference
    named = row.get("id") if row.get("id") is not None else row.get("custom_id")
    identifier = messages_hash(messages)[:16] if named is None else str(named)
    if not identifier.strip():
        raise ValueError("the id is empty")
    return Prompt(id=identifier, messages=messages, extra=extra)


def _column_name(name: str) -> str:
    try:
        return _plain_text(name)
    except ValueError as error:
        raise ValueError(f"the name of a column {error}") from None


def _plain_column(name: str, value: Any) -> Any:
    try:
        return _plain(value)
    except ValueError as error:
        raise ValueError(f"column {name!r} {error}") from None


def _plain(value: Any, depth: int = 1) -> Any:
    """A value as JSON has it. What could not be written later is refused now, before answers are paid for.

    Raises:
        ValueError: With the end of a sentence about the value.
    """
    if isinstance(value, str):
        return _plain_text(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"holds {value}, which is no JSON number: leave it out or write null")
        return value
    if isinstance(value, date | time):  # A datetime is a date.
        return value.isoformat()
    if not isinstance(value, Mapping | list | tuple):
        raise ValueError(f"holds a value of type {type(value).__name__}, expected text, numbers or lists")
    if depth > _MAX_DEPTH:
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {_plain_text(name): _plain(entry, depth + 1) for name, entry in value.items()}
    return [_plain(entry, depth + 1) for entry in value]


def _plain_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no valid text") from None
    return text


def _messages(content: Any) -> tuple[ChatMessage, ...]:
    """The chat of a row. Raises ``ValueError`` with what is wrong."""
    if content is None:
        raise ValueError("neither 'prompt' nor 'messages'")
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if not isinstance(content, list) or not content:
        raise ValueError("the prompt must be a text or a list of chat messages")
    return tuple(_message(message) for message in content)


def _message(message: Any) -> ChatMessage:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"a chat message needs a role, one of {', '.join(sorted(_ROLES))}")
    content = message.get("content")
    if not isinstance(content, str | list):
        raise ValueError(f"the content of a {role} message must be a text or a list of parts")
    if role == "user" and not (content.strip() if isinstance(content, str) else content):
        raise ValueError("the prompt is empty")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    return without_none({**message, "content": content})


def _part(part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError("a content part must be an object with a type, such as text")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ValueError("a content part of type text needs a text")
    # Parquet gives every part the columns of all.
    return without_none(part)


def _require_text(messages: tuple[ChatMessage, ...]) -> None:
    """A prompt asks something: instructions and earlier answers alone do not."""
    asked = [message for message in messages if message["role"] not in {"assistant", *_INSTRUCTION_ROLES}]
    if not asked:
        raise ValueError("the chat has no user turn, so there is no prompt")
    if not any(message_text(message).strip() for message in asked):
        raise ValueError("the prompt is empty")


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
        TableError: The text is empty or no valid Unicode.
    """
    return _prompt(Path("the command line"), 1, {"prompt": text})

"""A run's folder: who may write to it, its journals, and the manifests that make stages resumable."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clients.canonical import content_hash
from router_model.errors import PipelineError

_BALLAST_BYTES = 4 * 1024 * 1024


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for one process: two that write to it would pay for the same answers twice.

    The lock dies with its process, however it ends.

    Raises:
        PipelineError: Another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+")
    except OSError as error:
        raise PipelineError(f"{folder}: cannot be written: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PipelineError(f"{folder}: another persyn process is working in this folder") from None
        yield


class Journal:
    """An append-only JSONL file whose every record is on disk before ``append`` returns.

    A kill leaves at most one torn line at the end, which the next opening cuts off. A ballast file beside the
    journal is given up when the disk is full, so that answers already paid for still find room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path.with_name(f".{path.name}.ballast")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._cut_torn_line()
        except OSError as error:
            raise PipelineError(f"{path}: cannot be opened: {error.strerror}") from error
        self._load_ballast()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> bool:
        """Write one record.

        Returns:
            False if the disk is full: this record was kept by giving up the ballast, the next may be lost.

        Raises:
            PipelineError: The record could not be written.
        """
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        try:
            self._write(line)
        except OSError as error:
            if not self._ballast.exists():
                raise PipelineError(f"{self.path}: cannot be written: {error.strerror}") from error
            self._ballast.unlink()
        else:
            return True
        try:
            self._write(line)
        except OSError as error:
            raise PipelineError(f"{self.path}: cannot be written: {error.strerror}") from error
        return False

    def close(self) -> None:
        """Close the file and free the ballast."""
        os.close(self._file)
        self._ballast.unlink(missing_ok=True)

    def _write(self, line: bytes) -> None:
        size_bytes = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size_bytes)
            raise

    def _cut_torn_line(self) -> None:
        size_bytes = os.fstat(self._file).st_size
        end = size_bytes
        while end > 0:
            start = max(0, end - 65536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size_bytes:
            os.ftruncate(self._file, end)

    def _load_ballast(self) -> None:
        # Without room for the ballast the first full write is an error, as on any file.
        try:
            with self._ballast.open("wb") as ballast:
                os.posix_fallocate(ballast.fileno(), 0, _BALLAST_BYTES)
        except OSError:
            self._ballast.unlink(missing_ok=True)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a journal, in order; none if there is no such file. A torn last line is skipped.

    Raises:
        PipelineError: A line inside the file is damaged.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise PipelineError(f"{path}:{number}: damaged line: {error}") from error
            yield record


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content whole.

    Raises:
        PipelineError: The disk refuses; the old file stays.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise PipelineError(f"{path}: cannot be written: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that an earlier call has written.

    Raises:
        PipelineError: It cannot be read or is no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise PipelineError(f"{path}: holds no JSON object")
    return value


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file atomically."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_identity(name: str) -> str:
    """A model as far as results depend on it: a hub id, or the path, sizes and times of local files.

    Times rather than contents: a model of many gigabytes is named at every start of a stage.
    """
    path = Path(name)
    if not path.exists():
        return name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{name} {content_hash(facts)}"


def stage_is_done(folder: Path, stage: str, inputs: Mapping[str, Any], outputs: Sequence[Path]) -> bool:
    """Whether a stage has run to its end on these very inputs and its outputs are still there."""
    manifest = folder / f"{stage}.manifest.json"
    if not manifest.exists() or not all(output.exists() for output in outputs):
        return False
    return read_json(manifest).get("inputs_sha256") == content_hash(dict(inputs))


def record_stage(folder: Path, stage: str, inputs: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the manifest of a finished stage: what went in, what came out, with which versions."""
    write_json(
        folder / f"{stage}.manifest.json",
        {
            "stage": stage,
            "inputs_sha256": content_hash(dict(inputs)),
            "inputs": dict(inputs),
            **facts,
            "persyn_version": importlib.metadata.version("persyn"),
            "git_revision": git_revision(Path.cwd()),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def git_revision(folder: Path) -> str | None:
    """Commit checked out in ``folder``, or None outside a checkout or without git."""
    try:
        shown = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None

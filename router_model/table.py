"""The score table: read, validate, and turn into prompt × teacher arrays with a mask."""

import hashlib
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.types import LearnabilityMeasure
from router_model.errors import TableError
from router_model.reward import Normalization, mix_reward

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

REQUIRED_COLUMNS = ("prompt_id", "prompt", "teacher", "quality")
LEARNABILITY_COLUMNS: Mapping[LearnabilityMeasure, str] = {
    "mean_logprob": "learnability",
    "rank_surprisal": "rank_surprisal",
    "local_logprob": "local_logprob",
}
"""Column of each measure of learnability."""

OPTIONAL_COLUMNS = (*LEARNABILITY_COLUMNS.values(), "n_tokens", "cost_usd", "family", "size_b", "split")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTable:
    """Rewards of parallel responses: N prompts × M teachers.

    A missing (prompt, teacher) cell is ``False`` in ``mask_NM`` and NaN in every value array. Prompts stand
    in the order of their first row, teachers in sorted order, so column ``m`` is ``teachers[m]``.
    """

    prompt_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    teachers: tuple[str, ...]
    quality_NM: FloatArray
    """Higher is better, any scale."""
    learnability_NM: FloatArray | None
    """Closeness to the student, higher is closer: log-probability in nats, or minus the rank-surprisal ratio,
    as ``read_table`` was asked. None if the table has none."""
    mask_NM: BoolArray
    split_N: tuple[str | None, ...]
    """``train``, ``test`` or None for each prompt."""
    n_tokens_NM: FloatArray | None
    cost_usd_NM: FloatArray | None
    families: Mapping[str, str | None]
    sizes_b: Mapping[str, float | None]
    content_sha256: str
    """Hash of ids, prompts, teachers and values, whatever the file format."""
    source: str = "score table"
    """The file the table came from, for error messages."""

    @property
    def n_prompts(self) -> int:
        """Number of prompts, N."""
        return len(self.prompt_ids)

    @property
    def n_teachers(self) -> int:
        """Number of teachers, M."""
        return len(self.teachers)

    def prompt_hashes(self) -> tuple[str, ...]:
        """SHA-256 of each prompt's text: how a checkpoint remembers what it was trained on."""
        return tuple(prompt_sha256(text) for text in self.prompts)

    def select(self, rows: Sequence[int] | NDArray[np.integer[Any]] | BoolArray) -> "ScoreTable":
        """The same table with some of its prompts only.

        Args:
            rows: Row numbers in the wanted order, or a boolean mask over the prompts. Teachers all stay, even
                one that has no cell left.
        """
        index = np.arange(self.n_prompts)[np.asarray(rows)] if len(rows) else np.zeros(0, dtype=np.int64)
        return _assemble(
            prompt_ids=tuple(self.prompt_ids[i] for i in index),
            prompts=tuple(self.prompts[i] for i in index),
            teachers=self.teachers,
            values={name: array[index] for name, array in self._values().items()},
            split_N=tuple(self.split_N[i] for i in index),
            families=self.families,
            sizes_b=self.sizes_b,
            source=self.source,
        )

    def with_teachers(self, teachers: Sequence[str]) -> "ScoreTable":
        """The same table with some of its teachers only, in the order given."""
        columns = [self.teachers.index(teacher) for teacher in teachers]
        return _assemble(
            prompt_ids=self.prompt_ids,
            prompts=self.prompts,
            teachers=tuple(teachers),
            values={name: array[:, columns] for name, array in self._values().items()},
            split_N=self.split_N,
            families=self.families,
            sizes_b=self.sizes_b,
            source=self.source,
        )

    def rewards(self, alpha: float, normalization: Normalization) -> FloatArray:
        """Mixed reward of each response at ``alpha``, NM; see ``mix_reward``.

        Raises:
            RouterError: alpha is outside [0, 1], or above 0 and the table has no learnability.
        """
        return mix_reward(
            self.quality_NM,
            self.learnability_NM,
            self.mask_NM,
            alpha=alpha,
            normalization=normalization,
        )

    def _values(self) -> dict[str, FloatArray]:
        """The value arrays that the table has, by column name."""
        arrays = {
            "quality": self.quality_NM,
            "learnability": self.learnability_NM,
            "n_tokens": self.n_tokens_NM,
            "cost_usd": self.cost_usd_NM,
        }
        return {name: array for name, array in arrays.items() if array is not None}


def prompt_sha256(text: str) -> str:
    """SHA-256 of a prompt's text. Lone surrogates are hashed too, so that no prompt is refused here."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_table(path: str | Path, *, learnability: LearnabilityMeasure = "mean_logprob") -> ScoreTable:
    """Read a score table in long form: one row per prompt and teacher.

    Args:
        path: A ``.parquet`` or ``.jsonl`` file with at least ``prompt_id``, ``prompt``, ``teacher``,
            ``quality``.
        learnability: The measure that becomes ``learnability_NM``. ``rank_surprisal``, of which lower is
            closer to the student, is negated.

    Raises:
        TableError: With the row at fault, when the file or one of its rows is malformed. Or the table has no
            value of a measure other than ``mean_logprob``, without which a table can be read.
    """
    file = Path(path)
    if not file.is_file():
        raise TableError(file, "no such file: expected a score table in .parquet or .jsonl")
    if file.suffix == ".parquet":
        rows = _parquet_rows(file)
    elif file.suffix == ".jsonl":
        rows = _jsonl_rows(file)
    else:
        raise TableError(file, f"unknown format {file.suffix!r}: expected .parquet or .jsonl")
    builder = _TableBuilder(file, learnability)
    for line, row in rows:
        builder.add(line, row)
    return builder.build()


def _parquet_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a Parquet file, counted from 1. Only the columns that are used are read."""
    # Imported here: reading tables is offline work, and the serving image has no pyarrow.
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise TableError(file, "reading Parquet needs pyarrow: pip install 'persyn[train]'") from error
    try:
        names = set(parquet.read_schema(file).names)
        missing = [name for name in REQUIRED_COLUMNS if name not in names]
        if missing:
            raise TableError(file, f"column {missing[0]!r} is missing; required are {list(REQUIRED_COLUMNS)}")
        wanted = [name for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS) if name in names]
        batches = parquet.ParquetFile(file).iter_batches(columns=wanted)
        line = 0
        for batch in batches:
            for row in batch.to_pylist():
                line += 1
                yield line, row
    # Beside Arrow's own errors: pages that do not decompress, and text that is not UTF-8.
    except (arrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise TableError(file, f"not a readable Parquet file: {error}") from error


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a JSON lines file, numbered by line; blank lines are skipped."""
    try:
        with file.open("rb") as stream:
            for line, raw in enumerate(stream, start=1):
                row = _json_row(file, line, raw)
                if row is not None:
                    yield line, row
    except OSError as error:
        raise TableError(file, f"cannot be read: {error.strerror}") from error


def _json_row(file: Path, line: int, raw: bytes) -> Mapping[str, Any] | None:
    """The row on a line, or None if the line is blank."""
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
        row = json.loads(text) if text else None
    except RecursionError as error:
        raise TableError(file, "not valid JSON: it is nested too deeply", line=line) from error
    except ValueError as error:
        raise TableError(file, f"not valid JSON in UTF-8: {error}", line=line) from error
    if not text:
        return None
    if not isinstance(row, dict):
        raise TableError(file, f"expected a JSON object, got {type(row).__name__}", line=line)
    missing = [name for name in REQUIRED_COLUMNS if name not in row]
    if missing:
        raise TableError(file, f"column {missing[0]!r} is missing", line=line)
    return row


@dataclass(slots=True)
class _Cell:
    """One row's numbers and where it stood."""

    line: int
    values: dict[str, float | None]


@dataclass(slots=True)
class _TableBuilder:
    """Collects rows, checks them against each other, and builds the arrays."""

    file: Path
    measure: LearnabilityMeasure
    prompts: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str | None] = field(default_factory=dict)
    families: dict[str, str | None] = field(default_factory=dict)
    sizes_b: dict[str, float | None] = field(default_factory=dict)
    cells: dict[tuple[str, str], _Cell] = field(default_factory=dict)

    def add(self, line: int, row: Mapping[str, Any]) -> None:
        """Take one row. Raises ``TableError`` naming it if it is malformed or contradicts an earlier one."""
        prompt_id = self._text(line, row, "prompt_id")
        prompt = self._text(line, row, "prompt", allow_empty=True)
        teacher = self._text(line, row, "teacher")
        where = f"prompt {prompt_id!r}, teacher {teacher!r}"
        if self.prompts.setdefault(prompt_id, prompt) != prompt:
            raise self._error(
                line, f"prompt id {prompt_id!r} stands for another prompt text in an earlier row"
            )
        first = self.cells.get((prompt_id, teacher))
        if first is not None:
            raise self._error(line, f"{where}: duplicate of row {first.line}; expected one row per pair")
        quality = self._number(line, row, "quality", where)
        if quality is None:
            raise self._error(line, f"{where}: quality is null; a missing answer is a missing row, never NaN")
        values: dict[str, float | None] = {"quality": quality}
        for name in ("learnability", "local_logprob"):
            values[name] = self._number(line, row, name, where)
        for name in ("rank_surprisal", "n_tokens", "cost_usd"):
            values[name] = self._number(line, row, name, where, least=0.0)
        self.cells[prompt_id, teacher] = _Cell(line, values)
        self._add_split(line, prompt_id, row.get("split"))
        self._add_teacher_fact(
            line, teacher, "family", self._optional_text(line, row, "family"), self.families
        )
        size = self._number(line, row, "size_b", where, least=0.0)
        self._add_teacher_fact(line, teacher, "size_b", size, self.sizes_b)

    def build(self) -> ScoreTable:
        """The finished table."""
        if not self.cells:
            raise TableError(self.file, "holds no rows: expected one per prompt and teacher")
        prompt_ids, teachers = tuple(self.prompts), tuple(sorted(self.families))
        row_of = {prompt_id: n for n, prompt_id in enumerate(prompt_ids)}
        column_of = {teacher: m for m, teacher in enumerate(teachers)}
        values: dict[str, FloatArray] = {}
        measured = LEARNABILITY_COLUMNS[self.measure]
        for name in ("quality", "learnability", "n_tokens", "cost_usd"):
            column = measured if name == "learnability" else name
            array_NM = np.full((len(prompt_ids), len(teachers)), np.nan)
            for (prompt_id, teacher), cell in self.cells.items():
                value = cell.values[column]
                array_NM[row_of[prompt_id], column_of[teacher]] = np.nan if value is None else value
            if not np.isnan(array_NM).all():
                values[name] = array_NM
        if "learnability" in values:
            self._require_all(measured)
        elif self.measure != "mean_logprob":
            raise self._without_measure(measured)
        if self.measure == "rank_surprisal":
            values["learnability"] = -values["learnability"]
        return _assemble(
            prompt_ids=prompt_ids,
            prompts=tuple(self.prompts.values()),
            teachers=teachers,
            values=values,
            split_N=tuple(self.splits[prompt_id] for prompt_id in prompt_ids),
            families={teacher: self.families[teacher] for teacher in teachers},
            sizes_b={teacher: self.sizes_b[teacher] for teacher in teachers},
            source=str(self.file),
        )

    def _require_all(self, column: str) -> None:
        """Learnability is there for every present cell or for none: half a reward cannot be compared."""
        for (prompt_id, teacher), cell in self.cells.items():
            if cell.values[column] is None:
                where = f"prompt {prompt_id!r}, teacher {teacher!r}"
                reason = f"{where}: {column} is missing here but not elsewhere"
                raise self._error(cell.line, f"{reason}; fill every row or leave the column out")

    def _without_measure(self, column: str) -> TableError:
        present = [
            name
            for name in LEARNABILITY_COLUMNS.values()
            if any(cell.values[name] is not None for cell in self.cells.values())
        ]
        has = f"of the columns of learnability it has {', '.join(present)}" if present else "it has no other"
        return TableError(self.file, f"has no {column} in any row; {has}. Score the responses with it first")

    def _add_split(self, line: int, prompt_id: str, split: Any) -> None:
        if split not in ("train", "test", None):
            raise self._error(line, f"split is {split!r}; expected 'train', 'test' or null")
        if self.splits.setdefault(prompt_id, split) != split:
            raise self._error(line, f"prompt {prompt_id!r} has two values of split; expected one per prompt")

    def _add_teacher_fact(
        self, line: int, teacher: str, name: str, value: Any, known: dict[str, Any]
    ) -> None:
        """Remember a teacher's family or size; a null says nothing, two values contradict each other."""
        earlier = known.setdefault(teacher, value)
        if earlier is None:
            known[teacher] = value
        elif value is not None and value != earlier:
            raise self._error(line, f"teacher {teacher!r} has {name} {value!r} here and {earlier!r} before")

    def _text(self, line: int, row: Mapping[str, Any], name: str, *, allow_empty: bool = False) -> str:
        value = row[name]
        # Ids are often numbers in tables made elsewhere.
        if name == "prompt_id" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self._error(line, f"{name} is {type(value).__name__}, expected a string")
        if not value and not allow_empty:
            raise self._error(line, f"{name} is empty")
        return value

    def _optional_text(self, line: int, row: Mapping[str, Any], name: str) -> str | None:
        return None if row.get(name) is None else self._text(line, row, name)

    def _number(
        self, line: int, row: Mapping[str, Any], name: str, where: str, *, least: float = -math.inf
    ) -> float | None:
        value = row.get(name)
        if value is None:
            return None
        # Exact answers are often written as true and false.
        if not isinstance(value, int | float):
            raise self._error(line, f"{where}: {name} is {type(value).__name__}, expected a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            hint = "a missing answer is a missing row" if name == "quality" else "leave it out or write null"
            raise self._error(line, f"{where}: {name} is {number}; {hint}, never NaN")
        if number < least:
            raise self._error(line, f"{where}: {name} is {number}, expected at least {least:g}")
        return number

    def _error(self, line: int, reason: str) -> TableError:
        return TableError(self.file, reason, line=line)


def _assemble(
    *,
    prompt_ids: tuple[str, ...],
    prompts: tuple[str, ...],
    teachers: tuple[str, ...],
    values: Mapping[str, FloatArray],
    split_N: tuple[str | None, ...],
    families: Mapping[str, str | None],
    sizes_b: Mapping[str, float | None],
    source: str,
) -> ScoreTable:
    """A table with its hash. The order of prompts counts: it decides the cross-validation folds."""
    digest = hashlib.sha256()
    heading = [
        prompt_ids,
        prompts,
        teachers,
        split_N,
        [families[t] for t in teachers],
        [sizes_b[t] for t in teachers],
    ]
    digest.update(json.dumps(heading).encode())
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values[name], dtype="<f8").tobytes())
    return ScoreTable(
        prompt_ids=prompt_ids,
        prompts=prompts,
        teachers=teachers,
        quality_NM=values["quality"],
        learnability_NM=values.get("learnability"),
        mask_NM=~np.isnan(values["quality"]),
        split_N=split_N,
        n_tokens_NM=values.get("n_tokens"),
        cost_usd_NM=values.get("cost_usd"),
        families={teacher: families[teacher] for teacher in teachers},
        sizes_b={teacher: sizes_b[teacher] for teacher in teachers},
        content_sha256=digest.hexdigest(),
        source=source,
    )

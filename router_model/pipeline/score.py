"""Stage ``score``: the quality and the learnability of each collected answer, as the score table."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from clients.canonical import content_hash
from clients.types import LearnabilityMeasure, Prompt, TeacherSpec
from router_model.errors import PipelineError, RouterError
from router_model.learnability import load_student, score_learnability
from router_model.pipeline.artifacts import (
    Journal,
    file_sha256,
    locked_folder,
    model_identity,
    read_journal,
    record_stage,
    write_atomically,
)
from router_model.pipeline.collect import collected_answers, collected_prompts, quality_scorer
from router_model.pipeline.config import ProjectFile, QualitySection, StudentSection
from router_model.pipeline.progress import Progress
from router_model.pipeline.prompts import unit_hash
from router_model.table import LEARNABILITY_COLUMNS
from router_model.tokenization import prompt_text

Value = TypeVar("Value")
Measured = dict[LearnabilityMeasure, float]

SCORES_FILE = "scores.parquet"
_CHUNK = 64
"""Answers between two writes to the journal: what a kill can cost, in seconds of compute."""

_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("teacher", pa.string()),
        ("quality", pa.float64()),
        ("learnability", pa.float64()),
        ("rank_surprisal", pa.float64()),
        ("response", pa.string()),
        ("source", pa.string()),
        ("family", pa.string()),
        ("size_b", pa.float64()),
        ("n_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
        ("finish_reason", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What one call of ``score`` did."""

    n_rows: int
    n_missing: int
    """Cells without an answer."""
    n_unscorable: int
    """Answers without a learnability, such as empty ones: left out of the table."""
    path: Path


@dataclass(frozen=True, slots=True)
class _Item:
    prompt: Prompt
    spec: TeacherSpec
    answer: Mapping[str, Any]

    def key(self, scorer: str) -> str:
        """What a score depends on. The constraints or the answer of the row count, as well as the text."""
        extra = {name: self.prompt.extra.get(name) for name in ("constraints", "answer")}
        return content_hash([scorer, self.answer["key"], self.answer["response"], extra])


def score(
    project: ProjectFile,
    run_folder: Path,
    *,
    progress: Progress,
    student_id: str | None = None,
) -> ScoreResult:
    """Judge every collected answer and write ``scores.parquet``; scores of an earlier call are kept.

    Raises:
        PipelineError: Nothing has been collected, or the folder is in use.
        BackboneError, QualityError: A model cannot be loaded, or a prompt row cannot be judged.
    """
    # No teacher is asked, so no key is needed: scoring may run on another machine.
    specs = project.teacher_specs(with_keys=False)
    prompts = collected_prompts(run_folder)
    student = project.student(student_id)
    with locked_folder(run_folder):
        items = [_Item(*found) for found in collected_answers(specs, prompts, run_folder)]
        qualities = _qualities(items, project.quality, run_folder, progress)
        measures = _measures(project.reward.learnability)
        learnabilities = _learnabilities(items, student, measures, run_folder, progress)
        rows = [
            _row(project, item, quality, learnability)
            for item, quality, learnability in zip(items, qualities, learnabilities, strict=True)
            if learnability is not None
        ]
        if not rows:
            raise PipelineError(f"{run_folder}: none of the {len(items)} answers could be scored")
        path = run_folder / SCORES_FILE
        _write_table(path, rows, measures)
        record_stage(
            run_folder,
            "score",
            {"quality": project.quality.model_dump(), "student": student.model, "learnability": measures},
            {"n_rows": len(rows), "sha256": file_sha256(path)},
        )
    return ScoreResult(
        n_rows=len(rows),
        n_missing=len(prompts) * len(specs) - len(items),
        n_unscorable=len(items) - len(rows),
        path=path,
    )


def _qualities(
    items: Sequence[_Item], section: QualitySection, run_folder: Path, progress: Progress
) -> list[float | None]:
    scorer = quality_scorer(section)
    for item in items:
        scorer.check(item.prompt)
    model = model_identity(section.model) if section.model else None
    keys = [item.key(content_hash([section.model_dump(), model])) for item in items]

    def judge(chunk: Sequence[_Item]) -> Sequence[float | None]:
        return scorer.score([(item.prompt, str(item.answer["response"])) for item in chunk])

    return _journalled(items, keys, run_folder / "quality.jsonl", judge, progress)


def _measures(wanted: LearnabilityMeasure) -> list[LearnabilityMeasure]:
    """What is measured: all that one forward pass gives, and the local measure where it is wanted."""
    measures: list[LearnabilityMeasure] = ["mean_logprob", "rank_surprisal"]
    return [*measures, "local_logprob"] if wanted == "local_logprob" else measures


def _learnabilities(
    items: Sequence[_Item],
    student: StudentSection,
    measures: Sequence[LearnabilityMeasure],
    run_folder: Path,
    progress: Progress,
) -> list[Measured | None]:
    """The measures of each answer by name; None where they are undefined."""
    # The names are in the key: an entry without one of the measures is not the answer to this question.
    keys = [item.key(f"{' '.join(measures)} {model_identity(student.model)}") for item in items]
    load = cache(partial(load_student, student.model))  # a finished run never loads it

    def judge(chunk: Sequence[_Item]) -> list[Measured | None]:
        pairs = [(item.prompt.messages, str(item.answer["response"])) for item in chunk]
        try:
            scores = score_learnability(load(), pairs, with_local="local_logprob" in measures)
        except RouterError as error:
            index = error.details.get("index")
            if index is None:
                raise
            # The student's chat template refuses this prompt: its cell stays empty, the others count.
            progress.note(f"prompt {chunk[index].prompt.id!r} has no learnability: {error.message}")
            rest = judge([*chunk[:index], *chunk[index + 1 :]])
            return [*rest[:index], None, *rest[index:]]
        values: list[Measured] = [
            {measure: float(getattr(found, measure)) for measure in measures} for found in scores
        ]
        return [value if all(map(math.isfinite, value.values())) else None for value in values]

    return _journalled(items, keys, run_folder / "learnability.jsonl", judge, progress)


def _journalled(
    items: Sequence[_Item],
    keys: Sequence[str],
    path: Path,
    judge: Callable[[Sequence[_Item]], Sequence[Value | None]],
    progress: Progress,
) -> list[Value | None]:
    """The value of each item: from the journal ``path``, or judged now and journalled chunk by chunk."""
    known: dict[str, Value | None] = {record["key"]: record["value"] for record in read_journal(path)}
    missing = [(key, item) for key, item in zip(keys, items, strict=True) if key not in known]
    progress.start(path.stem, total=len(items), done=len(items) - len(missing))
    with Journal(path) as journal:
        for chunk in _chunks(missing):
            values = judge([item for _, item in chunk])
            for (key, _), value in zip(chunk, values, strict=True):
                known[key] = value
                if not journal.append({"key": key, "value": value}):
                    raise PipelineError(f"{path}: the disk is full; free some space and run again")
            progress.advance(len(chunk))
    progress.finish()
    return [known[key] for key in keys]


def _chunks(keyed: Sequence[tuple[str, _Item]]) -> Iterator[Sequence[tuple[str, _Item]]]:
    """Chunks that hold all answers to a prompt, so that its text need be read once for all of them."""
    chunk: list[tuple[str, _Item]] = []
    for _, group in groupby(keyed, key=lambda pair: pair[1].prompt.id):
        chunk.extend(group)
        if len(chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _row(project: ProjectFile, item: _Item, quality: float | None, learnability: Measured) -> dict[str, Any]:
    answer, extra = item.answer, item.prompt.extra
    provenance = answer["provenance"]
    return {
        "prompt_id": item.prompt.id,
        "prompt": prompt_text(item.prompt.messages),
        "teacher": item.spec.id,
        "quality": quality,
        **{LEARNABILITY_COLUMNS[measure]: value for measure, value in learnability.items()},
        "response": answer["response"],
        "source": None if extra.get("source") is None else str(extra["source"]),
        "family": item.spec.family,
        "size_b": item.spec.size_b,
        "n_tokens": provenance["usage"]["completion_tokens"],
        "cost_usd": provenance["cost_usd"],
        "finish_reason": answer["finish_reason"],
        "split": split_of(project, item.prompt),
    }


def require_trainable(project: ProjectFile, prompts: Sequence[Prompt]) -> None:
    """Refuse, before anything is paid for, what no router could be trained and judged on.

    Raises:
        PipelineError: One teacher only, or no prompt to train on or to hold out.
    """
    if len(project.teachers) < 2:
        raise PipelineError("a router chooses between teachers: the project file needs at least two")
    splits = {split_of(project, prompt) for prompt in prompts}
    for split, purpose in (("train", "to train on"), ("test", "to hold out for the report")):
        if split not in splits:
            raise PipelineError(
                f"none of the {len(prompts)} calibration prompts is left {purpose}: give more prompts, or "
                f"mark some with split = {split!r}"
            )


def split_of(project: ProjectFile, prompt: Prompt) -> str:
    """``train`` or ``test``: what the row says, else drawn by the prompt's id."""
    named = prompt.extra.get("split")
    if named in {"train", "test"}:
        return str(named)
    calibration = project.calibration
    drawn = unit_hash(calibration.seed, "split", prompt.id)
    return "test" if drawn < calibration.test_fraction else "train"


def _write_table(
    path: Path, rows: Sequence[Mapping[str, Any]], measures: Sequence[LearnabilityMeasure]
) -> None:
    buffer = pa.BufferOutputStream()
    local = pa.field("local_logprob", pa.float64())
    schema = _SCHEMA.append(local) if local.name in measures else _SCHEMA
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue().to_pybytes())

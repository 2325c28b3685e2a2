"""The data set that ``synthesize`` writes: rows, failures, card and manifest."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clients.types import Prompt, RoutingDecision, TeacherSpec
from router_model.pipeline.artifacts import file_sha256, write_atomically, write_json, write_jsonl
from router_model.tokenization import message_text

DATA_FILE = "data/train-00000-of-00001.parquet"
"""The name that the Hugging Face ``datasets`` library reads as the split ``train``."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", _MESSAGES),
        ("completion", _MESSAGES),
        ("messages", _MESSAGES),
        ("teacher", pa.string()),
        ("teacher_revision", pa.string()),
        ("p_teacher", pa.float64()),
        ("propensity", pa.float64()),
        ("student", pa.string()),
        ("strategy", pa.string()),
        ("seed", pa.int64()),
        ("checkpoint_id", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
        ("latency_ms", pa.float64()),
        ("attempts", pa.int64()),
        ("record_id", pa.string()),
        ("prompt_sha256", pa.string()),
        ("reasoning", pa.string()),
        ("extra", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt with its decision and the journalled answer."""

    prompt: Prompt
    decision: RoutingDecision
    record: Mapping[str, Any]

    @property
    def is_whole(self) -> bool:
        """Whether the teacher ended the answer itself and said something."""
        return self.record["finish_reason"] == "stop" and bool(self.record["response"].strip())


@dataclass(frozen=True, slots=True)
class DataSetSummary:
    """What was written."""

    n_rows: int
    n_failures: int
    shares: Mapping[str, float]
    """Share of the rows per teacher, of those that have any."""
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Origin:
    """How a data set came about, for its card and manifest."""

    student: str
    strategy: str
    checkpoint_id: str
    seed: int
    temperature: float
    rebuild_command: str
    plan: Mapping[str, Any] | None = None
    """Of the plan by which teachers were taken, if there was one: its limits and what was expected."""


def write_dataset(
    folder: Path,
    answers: Sequence[Answer],
    failures: Sequence[Mapping[str, Any]],
    *,
    specs: Sequence[TeacherSpec],
    origin: Origin,
) -> DataSetSummary:
    """Write the Parquet file, ``failures.jsonl``, ``manifest.json`` and the card.

    Truncated and empty answers are failures: a student would learn to stop in mid-sentence.
    """
    whole = [answer for answer in answers if answer.is_whole]
    cut = [_cut_failure(answer) for answer in answers if not answer.is_whole]
    rows = [_row(answer, origin) for answer in whole]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
    write_atomically(folder / DATA_FILE, buffer.getvalue().to_pybytes())
    all_failures = [*failures, *cut]
    write_jsonl(folder / "failures.jsonl", all_failures)
    counts = Counter(row["teacher"] for row in rows)
    summary = DataSetSummary(
        n_rows=len(rows),
        n_failures=len(all_failures),
        shares={teacher: count / len(rows) for teacher, count in counts.most_common()},
        cost_usd=sum(answer.record["provenance"]["cost_usd"] for answer in answers),
    )
    write_json(folder / "manifest.json", _manifest(folder, summary, specs, origin))
    card = _card(rows, summary, specs, origin)
    write_atomically(folder / "README.md", card.encode())
    return summary


def _row(answer: Answer, origin: Origin) -> dict[str, Any]:
    provenance, decision = answer.record["provenance"], answer.decision
    message = answer.record["choices"][0]["message"]
    prompt = [_turn(turn) for turn in answer.prompt.messages]
    completion = [{"role": "assistant", "content": answer.record["response"]}]
    return {
        "id": answer.prompt.id,
        "prompt": prompt,
        "completion": completion,
        "messages": [*prompt, *completion],
        "teacher": provenance["teacher"],
        "teacher_revision": provenance["served_model"],
        "p_teacher": decision.distribution.get(provenance["teacher"]),
        "propensity": decision.propensity,
        "student": origin.student,
        "strategy": origin.strategy,
        "seed": origin.seed,
        "checkpoint_id": origin.checkpoint_id,
        "finish_reason": answer.record["finish_reason"],
        "prompt_tokens": provenance["usage"]["prompt_tokens"],
        "completion_tokens": provenance["usage"]["completion_tokens"],
        "cost_usd": provenance["cost_usd"],
        "latency_ms": 1000 * provenance["latency_s"],
        "attempts": provenance["attempts"],
        "record_id": answer.record["key"],
        "prompt_sha256": provenance["prompt_hash"],
        "reasoning": message.get("reasoning_content") or message.get("reasoning"),
        # One text column: the rows of a prompt file may differ in their columns and types.
        "extra": json.dumps(dict(answer.prompt.extra), ensure_ascii=False) if answer.prompt.extra else None,
    }


def _turn(message: Mapping[str, Any]) -> dict[str, str]:
    return {"role": str(message["role"]), "content": message_text(message)}


def _cut_failure(answer: Answer) -> dict[str, Any]:
    reason = answer.record["finish_reason"]
    what = "the answer is empty" if reason == "stop" else f"the answer ended with finish_reason {reason!r}"
    return {
        "prompt_id": answer.prompt.id,
        "teacher": answer.record["teacher"],
        "type": "IncompleteAnswer",
        "reason": what,
        "retryable": False,
        "response": answer.record["response"],
    }


def _manifest(
    folder: Path, summary: DataSetSummary, specs: Sequence[TeacherSpec], origin: Origin
) -> dict[str, Any]:
    return {
        "n_rows": summary.n_rows,
        "n_failures": summary.n_failures,
        "shares": dict(summary.shares),
        "cost_usd": summary.cost_usd,
        "student": origin.student,
        "strategy": origin.strategy,
        "seed": origin.seed,
        "temperature": origin.temperature,
        "checkpoint_id": origin.checkpoint_id,
        "plan": origin.plan,
        "teachers": [
            {
                "id": spec.id,
                "model": spec.model,
                "license": spec.license.name,
                "outputs_may_train": spec.license.outputs_may_train,
            }
            for spec in specs
        ],
        "files": {name: file_sha256(folder / name) for name in (DATA_FILE, "failures.jsonl")},
        "rebuild_command": origin.rebuild_command,
    }


def _card(
    rows: Sequence[Mapping[str, Any]],
    summary: DataSetSummary,
    specs: Sequence[TeacherSpec],
    origin: Origin,
) -> str:
    """A data-set card with the YAML head that the Hugging Face hub reads."""
    used = [spec for spec in specs if spec.id in summary.shares]
    head = [
        "---",
        "license: other",
        "license_name: " + json.dumps(", ".join(sorted({spec.license.name for spec in used})) or "none"),
        "annotations_creators: [machine-generated]",
        "task_categories: [text-generation]",
        f"size_categories: [{_size_category(summary.n_rows)}]",
        "tags: [synthetic, persyn]",
        "configs:",
        "- config_name: default",
        "  data_files: data/*.parquet",
        "---",
    ]
    body = [
        f"# Synthetic answers for {origin.student}",
        "",
        f"{summary.n_rows} answers, each written by the teacher that the strategy `{origin.strategy}` chose "
        f"for its prompt (router checkpoint `{origin.checkpoint_id}`, seed {origin.seed}, temperature "
        f"{origin.temperature:g}). {summary.n_failures} prompts have no whole answer: `failures.jsonl`.",
        *_plan_lines(origin),
        "",
        "| teacher | model | share | rows | completion tokens | cost, USD | licence | may train a model |",
        "|---|---|--:|--:|--:|--:|---|---|",
        *(_teacher_line(spec, rows, summary) for spec in used),
        "",
        "Rows follow TRL's prompt-completion form (`prompt`, `completion`, and `messages` with both); the "
        "flat columns say where each answer came from.",
        "",
        "Rebuild:",
        "",
        "```",
        origin.rebuild_command,
        "```",
    ]
    if rows:
        sample = {name: rows[0][name] for name in ("id", "teacher", "messages")}
        body += ["", "One row:", "", "```json", json.dumps(sample, indent=2, ensure_ascii=False), "```"]
    return "\n".join([*head, "", *body, ""])


def _plan_lines(origin: Origin) -> list[str]:
    if origin.plan is None:
        return []
    limits = [
        f"`{teacher}` {least:.4g} to {most:.4g}" for teacher, (least, most) in origin.plan["shares"].items()
    ]
    limits = [f"shares of the prompts: {', '.join(limits)}"] if limits else []
    if origin.plan["budget_usd"] is not None:
        limits.insert(0, f"a budget of ${origin.plan['budget_usd']:g}")
    cost_usd = origin.plan["expected_cost_usd"]
    text = f"A plan for all prompts together gave each its teacher ({'; '.join(limits) or 'without limits'})"
    return ["", f"{text}." if cost_usd is None else f"{text}, at an expected cost of ${cost_usd:.4f}."]


def _teacher_line(spec: TeacherSpec, rows: Sequence[Mapping[str, Any]], summary: DataSetSummary) -> str:
    own = [row for row in rows if row["teacher"] == spec.id]
    may_train = {True: "yes", False: "**no**", None: "not stated"}[spec.license.outputs_may_train]
    cells = [
        f"`{spec.id}`",
        f"`{spec.model}`",
        f"{summary.shares[spec.id]:.1%}",
        f"{len(own)}",
        f"{sum(row['completion_tokens'] for row in own)}",
        f"{sum(row['cost_usd'] for row in own):.4f}",
        spec.license.name,
        may_train,
    ]
    return f"| {' | '.join(cells)} |"


def _size_category(n_rows: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if n_rows < limit:
            return name
    return "100K<n<1M" if n_rows < 1_000_000 else "n>1M"

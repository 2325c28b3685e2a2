"""Answers for assignments, journalled one by one: the paid part of ``collect`` and ``synthesize``."""

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clients.canonical import content_hash
from clients.dispatcher import Dispatcher, DispatchOptions, Outcome
from clients.errors import PersynError
from clients.registry import Registry
from clients.retry import RetryPolicy
from clients.teacher import request_body
from clients.types import Answered, Assignment, TeacherSpec
from router_model.errors import PipelineError
from router_model.pipeline.artifacts import Journal, read_journal
from router_model.pipeline.progress import Progress

OUTAGE_PATIENCE_S = 30.0
"""How long a teacher may be down before its prompts fail. They are asked again when the stage is resumed."""


# More attempts than failures open the breaker: in an outage no prompt is given up before the teacher is.
_RETRY = RetryPolicy(max_attempts=10)


@dataclass(frozen=True, slots=True)
class Failure:
    """One assignment without an answer, and why."""

    prompt_id: str
    teacher: str
    type: str
    reason: str
    retryable: bool


@dataclass(slots=True)
class GenerationResult:
    """What one call of ``generate`` did."""

    n_reused: int = 0
    n_generated: int = 0
    failures: list[Failure] = field(default_factory=list)
    cost_usd: float = 0.0
    interrupted: bool = False


def request_key(spec: TeacherSpec, assignment: Assignment) -> str:
    """What makes an answer reusable: the teacher and the whole effective request, wherever it is served."""
    body = request_body(spec, assignment.prompt.messages, {})
    return content_hash({"teacher": spec.id, "body": body})


def answers_by_key(journal_path: Path) -> dict[str, dict[str, Any]]:
    """The journalled answers by request key."""
    return {record["key"]: record for record in read_journal(journal_path)}


def generate(
    specs: Sequence[TeacherSpec],
    assignments: Sequence[Assignment],
    journal_path: Path,
    *,
    stage: str,
    progress: Progress,
) -> GenerationResult:
    """Answer every assignment that the journal does not answer yet.

    An interrupt (Ctrl-C, SIGTERM) stops taking up new assignments and finishes those in flight; a second one
    drops them.

    Raises:
        PipelineError: The disk is full or the journal cannot be written. What was answered is kept.
    """
    by_id = {spec.id: spec for spec in specs}
    keys = [request_key(by_id[assignment.teacher], assignment) for assignment in assignments]
    known = {record["key"] for record in read_journal(journal_path)}
    missing: dict[str, list[Assignment]] = {}
    for key, assignment in zip(keys, assignments, strict=True):
        if key not in known:
            missing.setdefault(key, []).append(assignment)
    n_reused = sum(key in known for key in keys)
    generation = _Generation(missing, progress, GenerationResult(n_reused=n_reused))
    progress.start(stage, total=len(assignments), done=n_reused)
    with Journal(journal_path) as journal:
        asyncio.run(generation.run(specs, journal))
    progress.finish()
    if generation.disk_error is not None:
        raise generation.disk_error
    return generation.result


class _Generation:
    """The state of one call of ``generate``."""

    def __init__(
        self, missing: Mapping[str, Sequence[Assignment]], progress: Progress, result: GenerationResult
    ) -> None:
        self._keys = list(missing)
        # Several ids with the same content are one request: it is paid for once.
        self._same = list(missing.values())
        self._progress = progress
        self._stopping = False
        self.result = result
        self.disk_error: PipelineError | None = None

    async def run(self, specs: Sequence[TeacherSpec], journal: Journal) -> None:
        """Ask the teachers and journal what they answer."""
        task = asyncio.current_task()
        interrupt = self._interrupt(task.cancel if task else lambda: False)
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signal_number, interrupt)
        try:
            async with Registry(specs) as registry:
                # No response cache: the journal is the store of this folder, and it has no expiry.
                await Dispatcher(registry, retry=_RETRY).run(
                    [same[0] for same in self._same],
                    DispatchOptions(cache="off", patience_s=OUTAGE_PATIENCE_S),
                    lambda index, outcome: self._take(journal, index, outcome),
                    should_stop=lambda: self._stopping,
                )
        except asyncio.CancelledError:
            if not self.result.interrupted:
                raise
        finally:
            for signal_number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signal_number)

    def _interrupt(self, cancel: Callable[[], object]) -> Callable[[], None]:
        def interrupt() -> None:
            if self.result.interrupted:
                cancel()
                return
            self.result.interrupted = self._stopping = True
            self._progress.note("stopping: finishing the calls in flight; interrupt again to drop them")

        return interrupt

    def _take(self, journal: Journal, index: int, outcome: Outcome) -> None:
        if isinstance(outcome, Answered):
            self.result.cost_usd += outcome.provenance.cost_usd
            self._keep(journal, answer_record(self._keys[index], outcome), len(self._same[index]))
            self._progress.advance(len(self._same[index]), cost_usd=outcome.provenance.cost_usd)
            return
        failures = [_failure(same.prompt.id, outcome.teacher, outcome.error) for same in self._same[index]]
        self.result.failures += failures
        self._progress.advance(len(failures), n_errors=len(failures))

    def _keep(self, journal: Journal, record: Mapping[str, Any], n_assignments: int) -> None:
        """Journal one answer; on a full disk, stop asking and let the calls in flight come home."""
        try:
            has_room = journal.append(record)
        except PipelineError as error:
            self.disk_error = self.disk_error or error
            self._stopping = True
            return
        self.result.n_generated += n_assignments
        if not has_room:
            self._stopping = True
            self.disk_error = PipelineError(
                f"{journal.path}: the disk is full. Every answer that came is kept; free some space and run "
                "the same command again"
            )


def _failure(prompt_id: str, teacher: str, error: Exception) -> Failure:
    retryable = error.retryable if isinstance(error, PersynError) else False
    return Failure(prompt_id, teacher, type(error).__name__, str(error), retryable)


def answer_record(key: str, answered: Answered) -> dict[str, Any]:
    """An answer as one line of the journal."""
    return {
        "key": key,
        "prompt_id": answered.prompt.id,
        "teacher": answered.provenance.teacher,
        "response": answered.completion.content,
        "finish_reason": answered.completion.finish_reason,
        "choices": [dict(choice) for choice in answered.completion.choices],
        "provenance": asdict(answered.provenance),
    }

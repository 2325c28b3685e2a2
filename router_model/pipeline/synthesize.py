"""Stage ``synthesize``: route every prompt, let its teacher answer, write the data set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clients.canonical import content_hash
from clients.types import Assignment, Prompt, RoutingDecision, TeacherSpec
from router_model.errors import CheckpointError, PipelineError
from router_model.inference import Router
from router_model.pipeline.artifacts import locked_folder, read_json, write_json
from router_model.pipeline.config import ProjectFile
from router_model.pipeline.dataset import Answer, DataSetSummary, Origin, write_dataset
from router_model.pipeline.decisions import decide_all, known_prices
from router_model.pipeline.generation import Failure, answers_by_key, generate, request_key
from router_model.pipeline.progress import Progress
from router_model.pipeline.prompts import read_prompts
from router_model.strategies import RouteOptions

RESPONSES_FILE = ".responses.jsonl"
"""Hidden, so that data-set libraries that read the whole folder pass it over."""


@dataclass(frozen=True, slots=True)
class SynthesisSettings:
    """How teachers are chosen.

    Args:
        options: Without prices, which the project file states.
        command: The command line that writes the data set again.
    """

    options: RouteOptions
    command: str = "persyn synthesize"


@dataclass(frozen=True, slots=True)
class SynthesisResult:
    """What one call of ``synthesize`` did."""

    summary: DataSetSummary
    n_generated: int
    n_reused: int
    folder: Path
    interrupted: bool

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **asdict(self.summary),
            "n_generated": self.n_generated,
            "n_reused": self.n_reused,
            "folder": str(self.folder),
        }


def synthesize_dataset(
    project: ProjectFile,
    prompts_path: Path,
    folder: Path,
    settings: SynthesisSettings,
    *,
    progress: Progress,
    student_id: str | None = None,
    checkpoint: Path | None = None,
) -> SynthesisResult:
    """Write a data set: each prompt answered by the one teacher that the strategy chooses for it.

    Calling it again with the same folder asks only for what is missing.

    Raises:
        TableError: The prompt file is malformed; nothing has been asked.
        CheckpointError: The router is missing, or chooses teachers that the project file does not name.
        StrategyError: The router cannot serve the strategy or alpha; nothing has been asked.
        PipelineError: The folder was begun with another router or another way of choosing, or the disk is
            full.
    """
    student = project.student(student_id)
    specs = project.teacher_specs()
    prompts = read_prompts(prompts_path)
    with locked_folder(folder):
        folder_of_router = checkpoint or Path(student.checkpoint)
        router = Router.load(folder_of_router, moved_to=project.router.backbone)
        require_known_teachers(router, specs)
        options = replace(settings.options, prices=known_prices(specs))
        decisions = decide_all(router, prompts, options)
        origin = _origin(router, student.id, settings)
        _write_plan(folder, origin, _way_of_choosing(router, options), decisions)
        assignments = [
            _assignment(prompt, decision, origin) for prompt, decision in zip(prompts, decisions, strict=True)
        ]
        result = generate(specs, assignments, folder / RESPONSES_FILE, stage="synthesize", progress=progress)
        answered = _answered(folder, specs, assignments, decisions)
        failures = [asdict(failure) for failure in result.failures]
        failures += _not_asked(prompts, answered, result.failures)
        summary = write_dataset(folder, answered, failures, specs=specs, origin=origin)
    return SynthesisResult(summary, result.n_generated, result.n_reused, folder, result.interrupted)


def require_known_teachers(router: Router, specs: Sequence[TeacherSpec]) -> None:
    """Raise ``CheckpointError`` if the router chooses among teachers that the project does not name."""
    unknown = router.manifest.teachers_beyond({spec.id for spec in specs})
    if unknown:
        raise CheckpointError(
            f"the router was trained with teachers that the project file does not name: {', '.join(unknown)}"
        )


def _origin(router: Router, student_id: str, settings: SynthesisSettings) -> Origin:
    return Origin(
        student=student_id,
        strategy=settings.options.strategy,
        checkpoint_id=router.manifest.checkpoint_id,
        seed=settings.options.seed,
        temperature=settings.options.temperature,
        rebuild_command=settings.command,
    )


def _way_of_choosing(router: Router, options: RouteOptions) -> dict[str, Any]:
    """The options as JSON. Prices are among them only where cost counts: else they may change."""
    chosen = {
        name: value for name, value in asdict(options).items() if options.cost_weight or name != "prices"
    }
    chosen["alpha"] = router.manifest.alpha if options.alpha is None else options.alpha
    allowed, excluded = chosen.pop("teachers"), chosen.pop("exclude")
    chosen["allowed_teachers"] = None if allowed is None else sorted(allowed)
    chosen["excluded_teachers"] = sorted(excluded)
    return chosen


def _write_plan(
    folder: Path, origin: Origin, choosing: Mapping[str, Any], decisions: Sequence[RoutingDecision]
) -> None:
    """Record how teachers were chosen. A folder holds the answers of one way of choosing."""
    identity = {"student": origin.student, "checkpoint_id": origin.checkpoint_id, **choosing}
    path = folder / "plan.json"
    earlier = read_json(path) if path.exists() else {}
    for name, value in identity.items():
        if earlier and earlier.get(name) != value:
            raise PipelineError(
                f"{folder}: was begun with {name} {earlier.get(name)!r}, not {value!r}; "
                "write to another --out, or remove the folder"
            )
    counts = Counter(decision.teacher for decision in decisions)
    write_json(
        path,
        {
            **identity,
            "n_prompts": len(decisions),
            "teachers": dict(counts.most_common()),
            "n_uncertain": sum(decision.uncertain for decision in decisions),
            "n_out_of_distribution": sum(decision.out_of_distribution for decision in decisions),
            "assignments_sha256": content_hash([[d.prompt_id, d.teacher] for d in decisions]),
        },
    )


def _assignment(prompt: Prompt, decision: RoutingDecision, origin: Origin) -> Assignment:
    return Assignment(
        prompt=prompt,
        teacher=decision.teacher,
        checkpoint_id=origin.checkpoint_id,
        strategy=origin.strategy,
        distribution=decision.distribution,
        propensity=decision.propensity,
        student=origin.student,
    )


def _answered(
    folder: Path,
    specs: Sequence[TeacherSpec],
    assignments: Sequence[Assignment],
    decisions: Sequence[RoutingDecision],
) -> list[Answer]:
    by_id = {spec.id: spec for spec in specs}
    answers = answers_by_key(folder / RESPONSES_FILE)
    return [
        Answer(assignment.prompt, decision, answers[key])
        for assignment, decision in zip(assignments, decisions, strict=True)
        if (key := request_key(by_id[assignment.teacher], assignment)) in answers
    ]


def _not_asked(
    prompts: Sequence[Prompt], answered: Sequence[Answer], failures: Sequence[Failure]
) -> list[dict[str, Any]]:
    """Prompts that an interrupt left over: they are failures of this data set until it is resumed."""
    settled = {answer.prompt.id for answer in answered} | {failure.prompt_id for failure in failures}
    return [
        {
            "prompt_id": prompt.id,
            "teacher": None,
            "type": "Interrupted",
            "reason": "not asked yet; run the same command again",
            "retryable": True,
        }
        for prompt in prompts
        if prompt.id not in settled
    ]

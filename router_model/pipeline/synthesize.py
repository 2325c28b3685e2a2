"""Stage ``synthesize``: route every prompt, let its teacher answer, write the data set."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clients.types import Assignment, Prompt, RoutingDecision, TeacherSpec
from router_model.checkpoint import Manifest, read_checkpoint
from router_model.errors import PipelineError
from router_model.inference import Router
from router_model.pipeline.artifacts import locked_folder, read_json, write_json
from router_model.pipeline.config import ProjectFile, StudentSection
from router_model.pipeline.corpus_plan import (
    ASSIGNMENTS_FILE,
    PLAN_FILE,
    CorpusPlan,
    assignments_hash,
    read_plan,
)
from router_model.pipeline.dataset import Answer, DataSetSummary, Origin, write_dataset
from router_model.pipeline.decisions import (
    decide_all,
    known_prices,
    require_known_teachers,
    way_of_choosing,
)
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
        plan: Folder of a plan, by which teachers are taken in place of choosing them.
        given: Names of the options that were asked for: beside a plan the others follow it.
    """

    options: RouteOptions
    command: str = "persyn synthesize"
    plan: Path | None = None
    given: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The teachers of the prompts, in their order."""

    identity: Mapping[str, Any]
    """How they were chosen: a folder holds the answers of one way of choosing."""
    decisions: Sequence[RoutingDecision]


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
    """Write a data set: each prompt answered by the one teacher that the strategy, or the plan, chose for it.

    Calling it again with the same folder asks only for what is missing.

    Raises:
        TableError: The prompt file is malformed; nothing has been asked.
        CheckpointError: The router is missing, or chooses teachers that the project file does not name.
        StrategyError: The router cannot serve the strategy or alpha; nothing has been asked.
        PipelineError: The folder was begun with another router or another way of choosing, the plan was made
            for other prompts, another checkpoint or other options, or the disk is full.
    """
    specs = project.teacher_specs()
    prompts = read_prompts(prompts_path)
    with locked_folder(folder):
        _require_no_plan(folder)
        if settings.plan is None:
            student = project.student(student_id)
            chosen = _by_router(project, student, checkpoint, prompts, settings.options)
        else:
            plan = _fitting_plan(settings.plan, prompts, prompts_path)
            student = project.student(plan.facts["student"] if student_id is None else student_id)
            _, manifest = read_checkpoint(checkpoint or Path(student.checkpoint))
            require_known_teachers(manifest, specs)
            chosen = _by_plan(plan, student.id, manifest, prompts, settings)
        decisions = chosen.decisions
        origin = _origin(chosen.identity, settings)
        _write_plan(folder, chosen)
        assignments = [
            _assignment(prompt, decision, origin) for prompt, decision in zip(prompts, decisions, strict=True)
        ]
        result = generate(specs, assignments, folder / RESPONSES_FILE, stage="synthesize", progress=progress)
        answered = _answered(folder, specs, assignments, decisions)
        failures = [asdict(failure) for failure in result.failures]
        failures += _not_asked(prompts, answered, result.failures)
        summary = write_dataset(folder, answered, failures, specs=specs, origin=origin)
    return SynthesisResult(summary, result.n_generated, result.n_reused, folder, result.interrupted)


def _by_router(
    project: ProjectFile,
    student: StudentSection,
    checkpoint: Path | None,
    prompts: Sequence[Prompt],
    options: RouteOptions,
) -> _Chosen:
    router = Router.load(checkpoint or Path(student.checkpoint), moved_to=project.router.backbone)
    specs = project.teacher_specs(with_keys=False)
    require_known_teachers(router.manifest, specs)
    options = replace(options, prices=known_prices(specs))
    identity = {
        "student": student.id,
        "checkpoint_id": router.manifest.checkpoint_id,
        **way_of_choosing(router.manifest, options),
        "plan": None,
    }
    return _Chosen(identity, decide_all(router, prompts, options))


def _require_no_plan(folder: Path) -> None:
    """A data set has a ``plan.json`` too: in the folder of a plan it would take the place of the plan's."""
    if (folder / ASSIGNMENTS_FILE).exists():
        raise PipelineError(
            f"{folder}: is the folder of a plan; give it as --plan, and write the data set to another --out"
        )


def _fitting_plan(folder_of_plan: Path, prompts: Sequence[Prompt], prompts_path: Path) -> CorpusPlan:
    plan = read_plan(folder_of_plan)
    plan.require_prompts(prompts, prompts_path)
    return plan


def _by_plan(
    plan: CorpusPlan,
    student_id: str,
    manifest: Manifest,
    prompts: Sequence[Prompt],
    settings: SynthesisSettings,
) -> _Chosen:
    """The teachers of the plan. Of the router only its manifest is needed: it must be the plan's."""
    asked = {
        "student": student_id,
        "checkpoint_id": manifest.checkpoint_id,
        **way_of_choosing(manifest, settings.options),
    }
    recorded = {"teachers": "allowed_teachers", "exclude": "excluded_teachers"}
    given = [recorded.get(name, name) for name in settings.given]
    plan.require_choice(asked, ["student", "checkpoint_id", *given])
    identity = {**plan.identity, "plan": plan.summary}
    return _Chosen(identity, [plan.decisions[prompt.id] for prompt in prompts])


def _origin(identity: Mapping[str, Any], settings: SynthesisSettings) -> Origin:
    return Origin(
        student=identity["student"],
        strategy=identity["strategy"],
        checkpoint_id=identity["checkpoint_id"],
        seed=identity["seed"],
        temperature=identity["temperature"],
        rebuild_command=settings.command,
        plan=identity["plan"],
    )


def _write_plan(folder: Path, chosen: _Chosen) -> None:
    """Record how teachers were chosen. A folder holds the answers of one way of choosing."""
    path = folder / PLAN_FILE
    earlier = read_json(path) if path.exists() else {}
    for name, value in chosen.identity.items():
        if earlier and earlier.get(name) != value:
            raise PipelineError(
                f"{folder}: was begun with {name} {earlier.get(name)!r}, not {value!r}; "
                "write to another --out, or remove the folder"
            )
    counts = Counter(decision.teacher for decision in chosen.decisions)
    write_json(
        path,
        {
            **chosen.identity,
            "n_prompts": len(chosen.decisions),
            "teachers": dict(counts.most_common()),
            "n_uncertain": sum(decision.uncertain for decision in chosen.decisions),
            "n_out_of_distribution": sum(decision.out_of_distribution for decision in chosen.decisions),
            "assignments_sha256": assignments_hash(chosen.decisions),
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

"""What ``persyn check`` looks at: everything in the project file that a later stage would fail on."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from clients.errors import PersynError, TeacherError
from clients.registry import Endpoint, Registry
from clients.types import LearnabilityMeasure, Prompt
from router_model.checkpoint import Manifest, read_checkpoint
from router_model.inference import backbone_location
from router_model.pipeline.collect import calibration_prompts, quality_scorer
from router_model.pipeline.config import ProjectFile, StudentSection, load_project
from router_model.pipeline.score import split_of
from router_model.table import read_table

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    state: State
    subject: str
    detail: str

    def as_json(self) -> dict[str, str]:
        """For ``--json``."""
        return {"state": self.state, "subject": self.subject, "detail": self.detail}


def check_project(path: Path) -> list[Finding]:
    """Look at the project file and all that it names; teachers are reached, but asked nothing.

    Raises:
        ConfigurationError: The file itself cannot be used.
    """
    project = load_project(path)
    findings = [
        Finding("ok", str(path), f"{len(project.teachers)} teachers, {len(project.students)} students")
    ]
    if len(project.teachers) < 2:
        findings.append(Finding("failed", "teachers", "a router needs at least two teachers"))
    findings += _check_prompts(project)
    findings += [_check_model(f"student {section.id}", section.model) for section in project.students]
    findings.append(_check_model("router backbone", project.router.backbone))
    if project.quality.model is not None:
        findings.append(_check_model("reward model", project.quality.model))
    findings += asyncio.run(_check_teachers(project))
    findings += [_check_checkpoint(project, section) for section in project.students]
    return findings


def check_scores(path: Path, learnability: LearnabilityMeasure) -> Finding:
    """Whether a score table can be read whole, and has the project's measure of learnability."""

    def read() -> str:
        table = read_table(path, learnability=learnability)
        return f"{table.n_prompts} prompts x {table.n_teachers} teachers"

    return _attempt(f"scores {path}", read)


def _attempt(subject: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", subject, work())
    except PersynError as error:
        return Finding("failed", subject, error.message)


def _check_prompts(project: ProjectFile) -> list[Finding]:
    subject = "calibration prompts"
    try:
        prompts = calibration_prompts(project)
        scorer = quality_scorer(project.quality)
        for prompt in prompts:
            scorer.check(prompt)
    except PersynError as error:
        return [Finding("failed", subject, error.message)]
    detail = f"{len(prompts)} in {project.calibration.prompts}, each with what {project.quality.kind} needs"
    return [Finding("ok", subject, detail), _check_split(project, prompts)]


def _check_split(project: ProjectFile, prompts: Sequence[Prompt]) -> Finding:
    n_test = sum(split_of(project, prompt) == "test" for prompt in prompts)
    n_train = len(prompts) - n_test
    detail = f"{n_train} to train on, {n_test} to test on"
    if n_train and n_test:
        return Finding("ok", "split", detail)
    return Finding(
        "failed", "split", f"{detail}; set calibration.test_fraction or the rows' `split`, or add prompts"
    )


def _check_model(subject: str, name: str) -> Finding:
    path = Path(name)
    if path.suffix == ".gguf":
        state: State = "ok" if path.is_file() else "failed"
        return Finding(state, subject, name if path.is_file() else f"{name}: no such file")
    try:
        # Reads the configuration alone: from the folder, the local hub cache, or the hub.
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return Finding("failed", subject, f"{name}: {reason}")
    return Finding("ok", subject, name)


async def _check_teachers(project: ProjectFile) -> list[Finding]:
    findings: list[Finding] = []
    specs = []
    for section in project.teachers:
        try:
            specs.append(section.spec())
        except PersynError as error:
            findings.append(Finding("failed", f"teacher {section.id}", error.message))
    async with Registry(specs) as registry:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_probe(endpoint)) for endpoint in registry]
        return findings + [task.result() for task in tasks]


async def _probe(endpoint: Endpoint) -> Finding:
    spec, subject = endpoint.spec, f"teacher {endpoint.spec.id}"
    try:
        served = await endpoint.client.models()
    except TeacherError as error:
        return Finding("failed", subject, error.message)
    if served and spec.model not in served:
        shown = ", ".join(sorted(served)[:5])
        return Finding("warning", subject, f"{spec.base_url} lists {shown}, not {spec.model}")
    return Finding("ok", subject, f"{spec.base_url} answers")


def _check_checkpoint(project: ProjectFile, section: StudentSection) -> Finding:
    subject, folder = f"checkpoint of {section.id}", Path(section.checkpoint)
    if not folder.exists():
        return Finding("warning", subject, f"{folder}: not trained yet; `persyn run` makes it")

    try:
        _, manifest = read_checkpoint(folder)
    except PersynError as error:
        return Finding("failed", subject, error.message)
    fault = _checkpoint_fault(project, manifest)
    if fault is not None:
        return Finding("failed", subject, fault)
    return Finding("ok", subject, f"{manifest.checkpoint_id[:12]}, {len(manifest.teachers)} teachers")


def _checkpoint_fault(project: ProjectFile, manifest: Manifest) -> str | None:
    """Why ``persyn serve`` could not use a checkpoint that is whole in itself."""
    unknown = manifest.teachers_beyond({teacher.id for teacher in project.teachers})
    if unknown:
        return f"chooses teachers that are not in the project: {', '.join(unknown)}"
    name = backbone_location(manifest.backbone.name, project.router.backbone)
    backbone = Path(name)
    is_local = backbone.is_absolute() or backbone.suffix == ".gguf" or name.startswith(".")
    if is_local and not backbone.exists():
        return f"its backbone {backbone} does not exist"
    return None

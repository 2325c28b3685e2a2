"""What ``persyn check`` looks at: everything in the project file that a later stage would fail on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from clients.errors import PersynError, TeacherError
from clients.registry import Endpoint, Registry
from router_model.checkpoint import read_checkpoint
from router_model.pipeline.collect import calibration_prompts, quality_scorer
from router_model.pipeline.config import ProjectFile, StudentSection, load_project

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
    findings.append(_attempt("calibration prompts", lambda: _check_prompts(project)))
    findings += [_check_model(f"student {section.id}", section.model) for section in project.students]
    findings.append(_check_model("router backbone", project.router.backbone))
    if project.quality.model is not None:
        findings.append(_check_model("reward model", project.quality.model))
    findings += asyncio.run(_check_teachers(project))
    findings += [_check_checkpoint(project, section) for section in project.students]
    return findings


def _attempt(subject: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", subject, work())
    except PersynError as error:
        return Finding("failed", subject, error.message)


def _check_prompts(project: ProjectFile) -> str:
    prompts = calibration_prompts(project)
    scorer = quality_scorer(project.quality)
    for prompt in prompts:
        scorer.check(prompt)
    return f"{len(prompts)} in {project.calibration.prompts}, each with what {project.quality.kind} needs"


def _check_model(subject: str, name: str) -> Finding:
    path = Path(name)
    if path.suffix == ".gguf":
        state: State = "ok" if path.is_file() else "failed"
        return Finding(state, subject, name if path.is_file() else f"{name}: no such file")
    try:
        # Reads the configuration alone: from the folder, the local hub cache, or the hub.
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        return Finding("failed", subject, f"{name}: {str(error).splitlines()[0]}")
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

    def verify() -> str:
        _, manifest = read_checkpoint(folder)
        return f"{manifest.checkpoint_id[:12]}, {len(manifest.teachers)} teachers"

    finding = _attempt(subject, verify)
    if finding.state == "ok":
        _, manifest = read_checkpoint(folder)
        known: set[Any] = {teacher.id for teacher in project.teachers}
        unknown = [teacher.id for teacher in manifest.teachers if teacher.id not in known]
        if unknown:
            detail = f"chooses teachers that are not in the project: {', '.join(unknown)}"
            return Finding("failed", subject, detail)
    return finding

"""``persyn run``: collect, score, train and evaluate, each skipped where nothing has changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_model.checkpoint import read_checkpoint
from router_model.errors import CheckpointError, PipelineError
from router_model.pipeline.artifacts import (
    file_sha256,
    locked_folder,
    model_identity,
    read_json,
    record_stage,
    stage_is_done,
)
from router_model.pipeline.collect import calibration_prompts, collect
from router_model.pipeline.config import ProjectFile, StudentSection
from router_model.pipeline.evaluate import REPORT_FILE, evaluate_router
from router_model.pipeline.progress import Progress
from router_model.pipeline.score import SCORES_FILE, require_trainable, score
from router_model.pipeline.train import TrainSettings, train_router

EMBEDDINGS_FILE = "embeddings.sqlite"


@dataclass(frozen=True, slots=True)
class RunResult:
    """What ``run`` made. ``report`` is empty if it was interrupted."""

    checkpoint: Path
    report_folder: Path
    report: Mapping[str, Any]
    n_failed: int
    interrupted: bool


def run_pipeline(
    project: ProjectFile,
    *,
    progress: Progress,
    student_id: str | None = None,
    run_folder: Path | None = None,
) -> RunResult:
    """Take one student from its prompts to an evaluated router.

    The run's folder is the one that holds the student's checkpoint, unless another is given.

    Raises:
        PersynError: A stage failed; what the stages before it made is kept.
    """
    student = project.student(student_id)
    checkpoint = Path(student.checkpoint)
    folder = run_folder or checkpoint.parent
    report_folder = folder / "report"
    require_trainable(project, calibration_prompts(project))
    collected = collect(project, folder, progress=progress)
    if collected.interrupted:
        return RunResult(checkpoint, report_folder, {}, len(collected.failures), interrupted=True)
    if not collected.n_generated + collected.n_reused:
        reason = collected.failures[0].reason if collected.failures else "there are no prompts"
        raise PipelineError(f"no teacher answered anything: {reason}")
    scored = score(project, folder, progress=progress, student_id=student_id)
    with locked_folder(folder):
        _train(project, student, folder, progress)
        report = _evaluate(checkpoint, folder, report_folder, progress)
    n_failed = scored.n_missing + scored.n_unscorable
    return RunResult(checkpoint, report_folder, report, n_failed, interrupted=False)


def _train(project: ProjectFile, student: StudentSection, folder: Path, progress: Progress) -> None:
    settings = TrainSettings(
        student=student.id,
        student_family=student.family,
        backbone=project.router.backbone,
        head=project.router.head,
        alpha=project.reward.alpha,
        normalization=project.reward.normalize,
        learnability=project.reward.learnability,
        seed=project.calibration.seed,
        max_tokens=project.router.max_tokens,
        views=None if project.router.views is None else tuple(project.router.views),
    )
    scores, checkpoint = folder / SCORES_FILE, Path(student.checkpoint)
    backbone = model_identity(settings.backbone)
    inputs = {"scores_sha256": file_sha256(scores), "backbone_identity": backbone, **settings.as_json()}
    if stage_is_done(folder, "train", inputs, [checkpoint]) and _is_own(checkpoint, folder):
        return
    result = train_router(
        scores, checkpoint, settings, progress=progress, embeddings=folder / EMBEDDINGS_FILE
    )
    record_stage(folder, "train", inputs, {"checkpoint_id": result.checkpoint_id})


def _is_own(checkpoint: Path, folder: Path) -> bool:
    """Whether the checkpoint is whole and the one that this run has trained."""
    try:
        _, manifest = read_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return bool(read_json(folder / "train.manifest.json").get("checkpoint_id") == manifest.checkpoint_id)


def _evaluate(checkpoint: Path, folder: Path, report_folder: Path, progress: Progress) -> dict[str, Any]:
    scores, report = folder / SCORES_FILE, report_folder / REPORT_FILE
    _, manifest = read_checkpoint(checkpoint)
    inputs = {"scores_sha256": file_sha256(scores), "checkpoint_id": manifest.checkpoint_id}
    if stage_is_done(folder, "evaluate", inputs, [report]):
        return read_json(report)
    found = evaluate_router(checkpoint, scores, report_folder, progress=progress)
    record_stage(folder, "evaluate", inputs, {"verdict": found["verdict"]})
    return found

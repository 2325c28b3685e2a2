"""Stage ``train``: score table → router checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router_model.backbone import load_backbone
from router_model.checkpoint import BackboneFacts, StudentFacts, TrainingFacts, write_checkpoint
from router_model.errors import TableError
from router_model.model import fit_router
from router_model.pipeline.artifacts import git_revision
from router_model.pipeline.config import HeadChoice
from router_model.pipeline.progress import Progress
from router_model.reward import LearnabilityMeasure, Normalization
from router_model.table import read_table

_BATCH = 256


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What is trained, and how."""

    student: str
    student_family: str | None
    backbone: str
    """Hub id, local folder, or a .gguf file."""
    head: HeadChoice = "auto"
    alpha: float = 0.4
    normalization: Normalization = "minmax"
    learnability: LearnabilityMeasure = "mean_logprob"
    seed: int = 0
    max_tokens: int = 2048

    def as_json(self) -> dict[str, Any]:
        """For manifests."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The trained router."""

    checkpoint_id: str
    head: str
    n_prompts: int
    n_teachers: int
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "folder": str(self.folder)}


def train_router(scores: Path, folder: Path, settings: TrainSettings, *, progress: Progress) -> TrainResult:
    """Train on the prompts of a score table that are not marked as test prompts.

    Raises:
        TableError: The table is malformed, lacks the measure of learnability, or holds nothing to train on.
        RouterError: ``alpha`` > 0 and the table has no learnability.
        BackboneError: The backbone cannot be loaded.
    """
    table = read_table(scores, learnability=settings.learnability)
    training = table.select(np.array([split != "test" for split in table.split_N]))
    if not training.n_prompts:
        raise TableError(scores, "every prompt is marked as a test prompt; nothing is left to train on")
    backbone = load_backbone(settings.backbone, max_tokens=settings.max_tokens)
    progress.start("encode", total=training.n_prompts)
    features = []
    for start in range(0, training.n_prompts, _BATCH):
        texts = training.prompts[start : start + _BATCH]
        features.append(backbone.encode(texts).features_BD)
        progress.advance(len(texts))
    progress.finish()
    model = fit_router(
        np.concatenate(features),
        training,
        alpha=settings.alpha,
        normalization=settings.normalization,
        head_kind=settings.head,
        seed=settings.seed,
    )
    checkpoint_id = write_checkpoint(
        folder,
        model,
        student=StudentFacts(settings.student, settings.student_family),
        backbone=BackboneFacts(
            # A local model by its whole path: the router may be loaded from another folder.
            name=str(Path(settings.backbone).resolve())
            if Path(settings.backbone).exists()
            else settings.backbone,
            fingerprint=backbone.fingerprint,
            pooling=backbone.pooling,
            max_tokens=backbone.max_tokens,
            width=backbone.width,
        ),
        training=TrainingFacts(training.content_sha256, training.n_prompts, training.prompt_hashes()),
        learnability=settings.learnability,
        git_revision=git_revision(Path.cwd()),
    )
    return TrainResult(
        checkpoint_id=checkpoint_id,
        head=model.strength.kind,
        n_prompts=training.n_prompts,
        n_teachers=training.n_teachers,
        folder=folder,
    )

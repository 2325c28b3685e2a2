"""Stage ``train``: score table → router checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.types import HeadChoice, LearnabilityMeasure
from router_model.backbone import Backbone, Encoded, load_backbone
from router_model.checkpoint import (
    BackboneFacts,
    StudentFacts,
    TrainingFacts,
    read_checkpoint,
    write_checkpoint,
)
from router_model.donor import QualityDonor
from router_model.embedding_cache import EmbeddingCache, encode_all
from router_model.engine_gate import with_agreement
from router_model.errors import TableError
from router_model.model import RouterModel
from router_model.network import Precision
from router_model.pipeline.artifacts import git_revision
from router_model.pipeline.progress import Progress
from router_model.reward import Normalization
from router_model.table import ScoreTable, read_table
from router_model.training import fit_router, require_trainable


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
    views: tuple[str, ...] | None = None
    """Such as ``last@22``; several layers of the backbone by default."""

    def as_json(self) -> dict[str, Any]:
        """For manifests."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The trained router."""

    checkpoint_id: str
    head: str
    helps: bool
    """Whether cross-validation found a gain over the best single teacher."""
    n_prompts: int
    n_teachers: int
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "folder": str(self.folder)}


def train_router(
    scores: Path,
    folder: Path,
    settings: TrainSettings,
    *,
    progress: Progress,
    embeddings: Path | None = None,
    quality_from: Path | None = None,
) -> TrainResult:
    """Train on the prompts of a score table that are not marked as test prompts.

    Args:
        embeddings: Cache of embeddings, a SQLite file; None for no cache.
        quality_from: A checkpoint whose quality heads are taken over: only learnability is fitted.

    Raises:
        TableError: The table is malformed, lacks the measure of learnability, or holds nothing to train on.
        BackboneError: The backbone cannot be loaded.
        CheckpointError: The quality heads of ``quality_from`` do not fit.
    """
    training = training_table(scores, settings.learnability)
    donor = None if quality_from is None else QualityDonor(*read_checkpoint(quality_from))
    if donor is not None:
        donor.require_head(settings.head)
        training = donor.ordered(training)
    # Before the prompts are encoded, which may take hours.
    require_trainable(training, alpha=settings.alpha)
    backbone = load_backbone(settings.backbone, max_tokens=settings.max_tokens, views=settings.views)
    facts = backbone_facts(settings.backbone, backbone)
    if donor is not None:
        donor.require_fit(facts, settings.normalization)
    cache = None if embeddings is None else EmbeddingCache(embeddings)
    progress.start("encode", total=training.n_prompts)
    encoded = encode_all(backbone, training.prompts, cache=cache, progress=progress.advance)
    progress.finish()
    progress.start("train", total=1)
    model = fit_router(
        encoded.features_BD,
        training,
        alpha=settings.alpha,
        normalization=settings.normalization,
        head_kind=settings.head,
        seed=settings.seed,
        widths=[backbone.hidden] * len(backbone.views),
        lent=None if donor is None else donor.lent(encoded.features_BD, training),
    )
    seen = training_facts(training)
    if donor is not None:
        model, seen = donor.completed(model, seen)
    progress.advance()
    progress.finish()

    def load(precision: Precision) -> Backbone:
        return load_backbone(
            settings.backbone,
            max_tokens=settings.max_tokens,
            views=facts.views,
            frame=facts.frame,
            precision=precision,
        )

    model = gated(model, encoded, training.prompts, load, progress)
    return save_router(folder, model, settings, training, backbone=facts, seen=seen)


def gated(
    model: RouterModel,
    encoded: Encoded,
    prompts: Sequence[str],
    load: Callable[[Precision], Backbone],
    progress: Progress,
) -> RouterModel:
    """The model with what faster arithmetic would change, measured on its prompts."""
    progress.start("check bf16", total=len(prompts))
    model = with_agreement(model, encoded, prompts, load, progress.advance)
    progress.finish()
    return model


def training_table(scores: Path, learnability: LearnabilityMeasure) -> ScoreTable:
    """The prompts of a score table that are not marked as test prompts.

    Raises:
        TableError: The table is malformed, or nothing is left.
    """
    table = read_table(scores, learnability=learnability)
    training = table.select(np.array([split != "test" for split in table.split_N]))
    if not training.n_prompts:
        raise TableError(
            scores,
            "every prompt is marked as a test prompt; nothing is left to train on. Take the mark off some, "
            "or give another table",
        )
    return training


def backbone_facts(name: str, backbone: Backbone, *, weights_sha256: str | None = None) -> BackboneFacts:
    """What a checkpoint remembers of its backbone."""
    return BackboneFacts(
        # A local model by its whole path: the router may be loaded from another folder.
        name=str(Path(name).resolve()) if Path(name).exists() else name,
        fingerprint=backbone.fingerprint,
        views=tuple(map(str, backbone.views)),
        frame=backbone.frame,
        max_tokens=backbone.max_tokens,
        width=backbone.width,
        weights_sha256=weights_sha256,
    )


def training_facts(training: ScoreTable) -> TrainingFacts:
    """What a checkpoint remembers of its training prompts."""
    return TrainingFacts(training.content_sha256, training.n_prompts, training.prompt_hashes())


def save_router(
    folder: Path,
    model: RouterModel,
    settings: TrainSettings,
    training: ScoreTable,
    *,
    backbone: BackboneFacts,
    seen: TrainingFacts,
    backbone_weights: bytes | None = None,
) -> TrainResult:
    """Write the checkpoint of a training run.

    Raises:
        CheckpointError: The folder cannot be written, or is something else than a checkpoint.
    """
    checkpoint_id = write_checkpoint(
        folder,
        model,
        student=StudentFacts(settings.student, settings.student_family),
        backbone=backbone,
        training=seen,
        learnability=settings.learnability,
        git_revision=git_revision(Path.cwd()),
        backbone_weights=backbone_weights,
    )
    return TrainResult(
        checkpoint_id=checkpoint_id,
        head=model.kind,
        helps=any(item.helps for item in model.calibration if item.alpha == model.alpha),
        n_prompts=training.n_prompts,
        n_teachers=training.n_teachers,
        folder=folder,
    )


def parse_views(text: str | None) -> tuple[str, ...] | None:
    """Names of views from a list with commas."""
    names: Sequence[str] = [] if text is None else [part.strip() for part in text.split(",")]
    return tuple(names) or None

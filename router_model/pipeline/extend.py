"""Stage ``extend``: checkpoint + score table with new teachers → checkpoint with more teachers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from router_model.backbone import Backbone
from router_model.checkpoint import Manifest, TrainingFacts, write_checkpoint
from router_model.embedding_cache import EmbeddingCache, encode_all
from router_model.errors import CheckpointError
from router_model.extension import EXTENSIONS_FACT, extend_model
from router_model.inference import Router
from router_model.model import RouterModel
from router_model.network import Precision
from router_model.pipeline.artifacts import git_revision
from router_model.pipeline.progress import Progress
from router_model.pipeline.train import gated, training_table
from router_model.probe_answers import require_extendable
from router_model.table import ScoreTable
from router_model.unseen import unseen_by


@dataclass(frozen=True, slots=True)
class AddedTeacher:
    """A teacher that was added."""

    id: str
    n_probes: int
    constant: bool
    """Whether its quality is the same for every prompt, as the probes told no more."""


@dataclass(frozen=True, slots=True)
class ExtendResult:
    """The extended router."""

    checkpoint_id: str
    parent_checkpoint_id: str
    added: tuple[AddedTeacher, ...]
    n_teachers: int
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "folder": str(self.folder)}


def extend_router(
    checkpoint: Path,
    scores: Path,
    folder: Path,
    *,
    teachers: Sequence[str] | None,
    progress: Progress,
    embeddings: Path | None = None,
) -> ExtendResult:
    """Add teachers to a router by the prompts of a table that are not marked as test prompts.

    Args:
        teachers: Those to add; None for all of the table that the checkpoint does not know.
        embeddings: Cache of embeddings, a SQLite file; None for no cache.

    Raises:
        CheckpointError: The checkpoint cannot be used, or would be replaced by its own extension.
        RouterError: The router cannot be extended, or knows a teacher already.
        TableError: The table is malformed or lacks what a new column needs.
    """
    _require_another_folder(folder, checkpoint)
    router = Router.load(checkpoint)
    model, manifest = router.model, router.manifest
    table = training_table(scores, manifest.learnability)
    new = list(_strangers(manifest, table) if teachers is None else teachers)
    require_extendable(model, table, new)
    probes = _answered_by(table, new)
    cache = None if embeddings is None else EmbeddingCache(embeddings)
    progress.start("encode", total=probes.n_prompts)
    encoded = encode_all(router.backbone, probes.prompts, cache=cache, progress=progress.advance)
    progress.finish()
    hashes = probes.prompt_hashes()
    extended = extend_model(
        model,
        encoded.features_BD,
        probes,
        new,
        unseen=unseen_by(model.facts, manifest.training.prompt_sha256, hashes),
    )
    extended = replace(extended, facts=_with_origin(extended, manifest, table, len(new)))

    def load(precision: Precision) -> Backbone:
        return Router.load(checkpoint, precision=precision).backbone

    extended = gated(extended, encoded, probes.prompts, load, progress)
    checkpoint_id = write_checkpoint(
        folder,
        extended,
        student=manifest.student,
        backbone=manifest.backbone,
        training=_training(manifest.training, hashes),
        learnability=manifest.learnability,
        git_revision=git_revision(Path.cwd()),
    )
    return ExtendResult(
        checkpoint_id=checkpoint_id,
        parent_checkpoint_id=manifest.checkpoint_id,
        added=tuple(
            AddedTeacher(item["teacher"], item["n_probes"], item["l2"]["quality"] is None)
            for item in extended.facts[EXTENSIONS_FACT][-len(new) :]
        ),
        n_teachers=len(extended.teachers),
        folder=folder,
    )


def _require_another_folder(folder: Path, checkpoint: Path) -> None:
    if folder.resolve() == checkpoint.resolve():
        raise CheckpointError(
            f"{folder}: is the checkpoint that is extended, which would be lost; write to another --out"
        )


def _strangers(manifest: Manifest, table: ScoreTable) -> list[str]:
    """The teachers of a table that a checkpoint does not know."""
    known = {teacher.id for teacher in manifest.teachers}
    return [teacher for teacher in table.teachers if teacher not in known]


def _answered_by(table: ScoreTable, teachers: Sequence[str]) -> ScoreTable:
    """The prompts that one of the teachers answered: no other needs to be encoded."""
    own = [table.teachers.index(teacher) for teacher in teachers]
    return table.select(np.flatnonzero(table.mask_NM[:, own].any(axis=1)))


def _training(known: TrainingFacts, hashes: Sequence[str]) -> TrainingFacts:
    """The probes count as seen, so that no report is made on them."""
    # Appended: the remembered folds stand in the order of the training prompts.
    new = tuple(dict.fromkeys(digest for digest in hashes if digest not in set(known.prompt_sha256)))
    return TrainingFacts(known.data_sha256, known.n_prompts + len(new), (*known.prompt_sha256, *new))


def _with_origin(model: RouterModel, parent: Manifest, table: ScoreTable, n_new: int) -> dict[str, Any]:
    """The facts, with where the last ``n_new`` extensions came from."""
    origin = {"parent_checkpoint_id": parent.checkpoint_id, "data_sha256": table.content_sha256}
    items = list(model.facts[EXTENSIONS_FACT])
    return {
        **model.facts,
        EXTENSIONS_FACT: [*items[:-n_new], *({**item, **origin} for item in items[-n_new:])],
    }

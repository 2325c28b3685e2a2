"""Checkpoints: a trained router as a folder of JSON and safetensors. No pickle anywhere."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from router_model.errors import CheckpointError
from router_model.heads import HEADS, Head
from router_model.model import RouterModel, TeacherSummary
from router_model.reward import LearnabilityMeasure, Normalization

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
HEAD_FILE = "head.safetensors"

_NOT_HASHED = frozenset({"checkpoint_id", "created", "seal"})
_PREVIOUS = ".{}.previous"
"""Where an older checkpoint stands for the moment in which a new one takes its place."""
_REMEDY = "restore the checkpoint or train again"
_HEADS = ("strength", "reward", "quality", "learnability")


@dataclass(frozen=True, slots=True)
class StudentFacts:
    """Whom the router serves."""

    id: str
    family: str | None = None


@dataclass(frozen=True, slots=True)
class BackboneFacts:
    """What encodes the prompts. The fingerprint is that of the weights it was trained with."""

    name: str
    fingerprint: str
    pooling: str
    max_tokens: int
    width: int


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What the router was trained on."""

    data_sha256: str
    n_prompts: int
    prompt_sha256: tuple[str, ...]
    """Hashes of the prompts' texts, so that no report is made on prompts the router has seen."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but its weights."""

    checkpoint_id: str
    student: StudentFacts
    teachers: tuple[TeacherSummary, ...]
    """In column order."""
    alpha: float
    normalization: Normalization
    backbone: BackboneFacts
    training: TrainingFacts
    heads: Mapping[str, str]
    """Kind of each head by its purpose."""
    head_sha256: str
    """Hash of ``head.safetensors``."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters and cross-validation numbers."""
    versions: Mapping[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    learnability: LearnabilityMeasure = "mean_logprob"
    """Measure that the reward was made of; negated where lower is closer to the student."""
    created: str = ""
    format_version: int = FORMAT_VERSION
    seal: str = ""
    """Hash of all the rest of the manifest, the time included."""

    def teachers_beyond(self, known: Collection[str]) -> list[str]:
        """Ids of the teachers that the router can choose and ``known`` does not hold."""
        return [teacher.id for teacher in self.teachers if teacher.id not in known]


def write_checkpoint(
    folder: Path,
    model: RouterModel,
    *,
    student: StudentFacts,
    backbone: BackboneFacts,
    training: TrainingFacts,
    learnability: LearnabilityMeasure = "mean_logprob",
    git_revision: str | None = None,
) -> str:
    """Write a checkpoint whole: a kill at any moment leaves the older one or the new one to be read.

    A kill between the two renames that replace an older checkpoint leaves that one beside, as
    ``.NAME.previous``, where ``read_checkpoint`` finds it.

    Returns:
        The checkpoint id: a hash of the weights and of the manifest, without the time.

    Raises:
        CheckpointError: The folder cannot be written, or is something else than a checkpoint.
    """
    heads = _heads(model)
    weights = save(
        {
            f"{purpose}.{name}": tensor
            for purpose, head in heads.items()
            for name, tensor in head.tensors().items()
        }
    )
    manifest = Manifest(
        checkpoint_id="",
        student=student,
        teachers=model.teachers,
        alpha=model.alpha,
        normalization=model.normalization,
        backbone=backbone,
        training=training,
        heads={purpose: head.kind for purpose, head in heads.items()},
        head_sha256=hashlib.sha256(weights).hexdigest(),
        facts=model.facts,
        versions={name: importlib.metadata.version(name) for name in ("persyn", "torch", "transformers")},
        git_revision=git_revision,
        learnability=learnability,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    content = asdict(manifest)
    content["checkpoint_id"] = _digest(content, leave_out=_NOT_HASHED)
    content["seal"] = _digest(content, leave_out=frozenset({"seal"}))
    files = {HEAD_FILE: weights, MANIFEST_FILE: _render(content)}
    try:
        _replace_folder(folder, files)
    except OSError as error:
        raise CheckpointError(f"{folder}: the checkpoint cannot be written: {error.strerror}") from error
    return str(content["checkpoint_id"])


def read_checkpoint(folder: Path) -> tuple[RouterModel, Manifest]:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: A file is missing, was changed, has another format version, or holds what does not
            fit; the message names it.
    """
    previous = _previous(folder)
    if not folder.exists() and previous.exists():
        # A writer was killed after it had moved the older checkpoint aside.
        folder = previous
    content = _read_manifest(folder)
    weights = _read_file(folder / HEAD_FILE)
    if hashlib.sha256(weights).hexdigest() != content.get("head_sha256"):
        raise CheckpointError(f"{folder / HEAD_FILE}: is not the file that was trained; {_REMEDY}")
    try:
        manifest = _manifest(content)
        tensors = load(weights)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} or {HEAD_FILE} is damaged: {error}") from error
    return _model(folder, manifest, tensors), manifest


def _heads(model: RouterModel) -> dict[str, Head]:
    heads = {name: getattr(model, name) for name in _HEADS}
    return {name: head for name, head in heads.items() if head is not None}


def _previous(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(_PREVIOUS.format(folder.name))


def _render(content: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest's file."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _digest(content: Mapping[str, Any], *, leave_out: frozenset[str]) -> str:
    """Hash of the manifest, which holds the hash of the weights. JSON keeps every float, so it is stable."""
    kept = {name: value for name, value in content.items() if name not in leave_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    raw = _read_file(path)
    try:
        content = json.loads(raw)
        rendered = _render(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}; this release reads {FORMAT_VERSION}, so train again"
        )
    sealed = content.get("seal") == _digest(content, leave_out=frozenset({"seal"}))
    identified = content.get("checkpoint_id") == _digest(content, leave_out=_NOT_HASHED)
    if not (sealed and identified and rendered == raw):
        raise CheckpointError(f"{path}: was changed after training; {_REMEDY}")
    return dict(content)


def _manifest(content: Mapping[str, Any]) -> Manifest:
    known = {item.name for item in fields(Manifest)}
    # Older checkpoints do not name their measure, which was the default.
    if {*content, "learnability"} != known:
        raise ValueError(f"its keys are {sorted(content)}, expected {sorted(known)}")
    if content.get("learnability", "mean_logprob") not in get_args(LearnabilityMeasure):
        raise ValueError(f"its learnability is {content['learnability']!r}")
    parts = {
        "student": StudentFacts(**content["student"]),
        "teachers": tuple(TeacherSummary(**teacher) for teacher in content["teachers"]),
        "backbone": BackboneFacts(**content["backbone"]),
        "training": TrainingFacts(
            **{**content["training"], "prompt_sha256": tuple(content["training"]["prompt_sha256"])}
        ),
    }
    return Manifest(**{**content, **parts})


def _model(folder: Path, manifest: Manifest, tensors: Mapping[str, NDArray[np.float64]]) -> RouterModel:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{folder / HEAD_FILE}: tensor {name!r} holds NaN or infinity")
        if tensor.shape[-1] != len(manifest.teachers):
            raise CheckpointError(
                f"{folder / HEAD_FILE}: tensor {name!r} has {tensor.shape[-1]} columns for "
                f"{len(manifest.teachers)} teachers"
            )
    heads: dict[str, Head] = {}
    for purpose, kind in manifest.heads.items():
        if kind not in HEADS or purpose not in _HEADS:
            raise CheckpointError(f"{folder / MANIFEST_FILE}: unknown head {kind!r} for {purpose!r}")
        own = {
            name.removeprefix(f"{purpose}."): t
            for name, t in tensors.items()
            if name.startswith(f"{purpose}.")
        }
        heads[purpose] = HEADS[kind].restore(own)
    missing = [name for name in _HEADS[:3] if name not in heads]
    if missing:
        raise CheckpointError(f"{folder / MANIFEST_FILE}: has no head for {missing[0]!r}")
    return RouterModel(
        teachers=manifest.teachers,
        alpha=manifest.alpha,
        normalization=manifest.normalization,
        strength=heads["strength"],
        reward=heads["reward"],
        quality=heads["quality"],
        learnability=heads.get("learnability"),
        facts=MappingProxyType(dict(manifest.facts)),
    )


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).exists():
        raise CheckpointError(f"{folder}: is no checkpoint and is left as it is; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = _previous(folder)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            with (draft / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        draft.chmod(0o755)
        if folder.exists():
            # A folder with files cannot be replaced in one step: the old one stands aside for a moment.
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        draft.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        if draft.exists():
            shutil.rmtree(draft)

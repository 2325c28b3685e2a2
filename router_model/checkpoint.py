"""Checkpoints: a trained router as a folder of JSON and safetensors. No pickle anywhere."""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clients.types import LearnabilityMeasure
from router_model.errors import CheckpointError, StrategyError
from router_model.model import RouterModel, TeacherSummary
from router_model.model_tensors import head_kinds, model_tensors, restore_model
from router_model.outlook import AlphaCalibration, Mode
from router_model.prompt_tokenizer import Frame
from router_model.reward import Normalization

FORMAT_VERSION = 3
MANIFEST_FILE = "manifest.json"
HEAD_FILE = "head.safetensors"
WEIGHTS_FILE = "model.safetensors"
"""Weights of a fine-tuned backbone."""

_NOT_HASHED = frozenset({"checkpoint_id", "created", "seal"})
_PREVIOUS = ".{}.previous"
"""Where an older checkpoint stands for the moment in which a new one takes its place."""
_REMEDY = "restore the checkpoint or train again"


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
    views: tuple[str, ...]
    """Which hidden states are the features, one view after the other, such as ``last@22``."""
    frame: Frame
    max_tokens: int
    width: int
    weights_sha256: str | None = None
    """Hash of ``model.safetensors``, whose weights take the place of the model's own; None if frozen."""


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
    mode: Mode
    head: str
    """Kind of the heads that choose: a reward's predictor, or an objective."""
    heads: Mapping[str, str]
    """Kind of each head by its purpose."""
    calibration: tuple[AlphaCalibration, ...]
    coverage: float
    """Of the conformal sets."""
    head_sha256: str
    """Hash of ``head.safetensors``."""
    top_alphas: tuple[float, ...] = ()
    """At which the best teacher is predicted; empty where rewards alone are."""
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

    def mean_reward(self, alpha: float) -> NDArray[np.float64]:
        """Mean mixed reward of each teacher over the training prompts at an alpha, M.

        Raises:
            StrategyError: alpha is above 0 and the router knows no learnability.
        """
        if math.isclose(alpha, self.alpha, abs_tol=1e-9):
            return np.array([teacher.mean_reward for teacher in self.teachers])
        quality = np.array([teacher.mean_quality_part for teacher in self.teachers])
        learnability = [teacher.mean_learnability_part for teacher in self.teachers]
        if alpha == 0.0:
            return quality
        if None in learnability:
            raise StrategyError(f"the router knows no learnability and cannot answer for alpha = {alpha:g}")
        return (1.0 - alpha) * quality + alpha * np.array(learnability, dtype=np.float64)

    def best_single(self, alpha: float) -> int:
        """Column of the teacher with the highest mean reward at an alpha; the first by id of equals."""
        mean_M = self.mean_reward(alpha)
        return min(range(len(mean_M)), key=lambda column: (-mean_M[column], self.teachers[column].id))


def write_checkpoint(
    folder: Path,
    model: RouterModel,
    *,
    student: StudentFacts,
    backbone: BackboneFacts,
    training: TrainingFacts,
    learnability: LearnabilityMeasure = "mean_logprob",
    git_revision: str | None = None,
    backbone_weights: bytes | None = None,
) -> str:
    """Write a checkpoint whole: a kill at any moment leaves the older one or the new one to be read.

    A kill between the two renames that replace an older checkpoint leaves that one beside, as
    ``.NAME.previous``, where ``read_checkpoint`` finds it.

    Returns:
        The checkpoint id: a hash of the weights and of the manifest, without the time.

    Raises:
        CheckpointError: The folder cannot be written, or is something else than a checkpoint.
    """
    weights = save(model_tensors(model))
    manifest = Manifest(
        checkpoint_id="",
        student=student,
        teachers=model.teachers,
        alpha=model.alpha,
        normalization=model.normalization,
        backbone=backbone,
        training=training,
        mode=model.mode,
        head=model.kind,
        heads=head_kinds(model),
        calibration=model.calibration,
        coverage=model.coverage,
        head_sha256=hashlib.sha256(weights).hexdigest(),
        top_alphas=model.top_alphas,
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
    if backbone_weights is not None:
        files[WEIGHTS_FILE] = backbone_weights
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
        model = _model(manifest, load(weights))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} or {HEAD_FILE} is damaged: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder / HEAD_FILE}: {error.message}") from error
    return model, manifest


def fine_tuned_weights(folder: Path, manifest: Manifest) -> Path | None:
    """The verified weights of a fine-tuned backbone; None if the backbone is frozen.

    Raises:
        CheckpointError: They are missing or are not those that were trained.
    """
    if manifest.backbone.weights_sha256 is None:
        return None
    path = (folder if folder.exists() else _previous(folder)) / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if digest != manifest.backbone.weights_sha256:
        raise CheckpointError(f"{path}: is not the file that was trained; {_REMEDY}")
    return path


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
    if set(content) != known:
        raise ValueError(f"its keys are {sorted(content)}, expected {sorted(known)}")
    if content["learnability"] not in get_args(LearnabilityMeasure):
        raise ValueError(f"its learnability is {content['learnability']!r}")
    parts = {
        "student": StudentFacts(**content["student"]),
        "teachers": tuple(TeacherSummary(**teacher) for teacher in content["teachers"]),
        "backbone": BackboneFacts(**{**content["backbone"], "views": tuple(content["backbone"]["views"])}),
        "calibration": tuple(AlphaCalibration(**item) for item in content["calibration"]),
        "top_alphas": tuple(map(float, content["top_alphas"])),
        "training": TrainingFacts(
            **{**content["training"], "prompt_sha256": tuple(content["training"]["prompt_sha256"])}
        ),
    }
    return Manifest(**{**content, **parts})


def _model(manifest: Manifest, tensors: Mapping[str, NDArray[np.float64]]) -> RouterModel:
    return restore_model(
        tensors,
        manifest.heads,
        teachers=manifest.teachers,
        alpha=manifest.alpha,
        normalization=manifest.normalization,
        mode=manifest.mode,
        kind=manifest.head,
        calibration=manifest.calibration,
        coverage=manifest.coverage,
        width=manifest.backbone.width,
        top_alphas=manifest.top_alphas,
        facts=manifest.facts,
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

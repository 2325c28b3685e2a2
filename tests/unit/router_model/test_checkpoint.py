"""Checkpoints: what is written is what is read, and nothing else is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from router_model import checkpoint as checkpoint_module
from router_model.checkpoint import (
    HEAD_FILE,
    MANIFEST_FILE,
    StudentFacts,
    TrainingFacts,
    read_checkpoint,
    write_checkpoint,
)
from router_model.errors import CheckpointError, RouterError
from router_model.inference import Router
from router_model.model import RouterModel
from router_model.training import fit_router
from tests.unit.router_model.worlds import FAKE_FACTS, FakeBackbone, linear_world, make_table


def train(kind: str = "ridge", *, seed: int = 0) -> RouterModel:
    features, quality = linear_world(20, seed=seed)
    return fit_router(features, make_table(quality, -np.abs(quality)), alpha=0.4, head_kind=kind)


def write(folder: Path, model: RouterModel) -> str:
    return write_checkpoint(
        folder,
        model,
        student=StudentFacts("student", "qwen"),
        backbone=FAKE_FACTS,
        training=TrainingFacts("d" * 64, 2, ("a" * 64, "b" * 64)),
        learnability="rank_surprisal",
    )


@pytest.mark.parametrize("kind", ["constant", "ridge", "knn", "cluster", "mlp", "bt"])
def test_a_checkpoint_brings_the_model_back_bit_by_bit(tmp_path: Path, kind: str) -> None:
    """Predictions, teachers, student and training hashes are those that were written."""
    model = train(kind)
    checkpoint_id = write(tmp_path / "deep" / "checkpoint", model)
    restored, manifest = read_checkpoint(tmp_path / "deep" / "checkpoint")
    features, _ = linear_world(7, seed=9)
    found, expected = restored.predict(features), model.predict(features)
    np.testing.assert_allclose(found.at().strengths_BM, expected.at().strengths_BM, atol=1e-4)
    np.testing.assert_allclose(found.at().members_EBM, expected.at().members_EBM, atol=1e-4)
    assert found.at().conformal_width == expected.at().conformal_width
    assert set(restored.baselines) == {"knn", "paper_bt"}
    np.testing.assert_array_equal(
        restored.baselines["paper_bt"].predict(features), model.baselines["paper_bt"].predict(features)
    )
    np.testing.assert_array_equal(
        restored.predict(features).learnability_BM, model.predict(features).learnability_BM
    )
    assert manifest.checkpoint_id == checkpoint_id
    assert manifest.teachers == restored.teachers == model.teachers
    assert manifest.student == StudentFacts("student", "qwen")
    assert manifest.training.prompt_sha256 == ("a" * 64, "b" * 64)
    assert (manifest.head, manifest.mode) == (kind, "paper" if kind == "bt" else "parts")
    assert manifest.learnability == "rank_surprisal"
    assert sorted(path.name for path in (tmp_path / "deep" / "checkpoint").iterdir()) == [
        HEAD_FILE,
        MANIFEST_FILE,
    ]


def test_the_id_is_of_the_content_and_not_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same router written at another time has the same id; another router has another."""

    class Later(checkpoint_module.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return cls(2031, 1, 1, tzinfo=tz)

    first = write(tmp_path / "a", train())
    monkeypatch.setattr(checkpoint_module, "datetime", Later)
    assert write(tmp_path / "b", train()) == first
    assert read_checkpoint(tmp_path / "b")[1].created.startswith("2031")
    assert write(tmp_path / "c", train(seed=1)) != first


@pytest.mark.parametrize("name", [HEAD_FILE, MANIFEST_FILE])
def test_every_changed_byte_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Any byte of either file, spaces and the time included; the message names the file."""
    write(tmp_path, train())
    original = (tmp_path / name).read_bytes()
    positions = np.random.default_rng(0).choice(len(original), size=60, replace=False).tolist()
    for position in [0, len(original) - 1, original.find(b"created") + 12, *positions]:
        changed = bytearray(original)
        changed[position % len(original)] ^= 1
        (tmp_path / name).write_bytes(bytes(changed))
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(original)
    read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [HEAD_FILE, MANIFEST_FILE])
def test_a_missing_or_cut_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """No foreign exception for an absent or a half file."""
    write(tmp_path, train())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path)


def forge(folder: Path, change: Callable[[dict[str, Any]], None], weights: bytes | None = None) -> None:
    """Change a checkpoint and seal it again: what only a broken writer could produce."""
    content = json.loads((folder / MANIFEST_FILE).read_bytes())
    if weights is not None:
        (folder / HEAD_FILE).write_bytes(weights)
        content["head_sha256"] = checkpoint_module.hashlib.sha256(weights).hexdigest()
    change(content)
    content["checkpoint_id"] = checkpoint_module._digest(content, leave_out=checkpoint_module._NOT_HASHED)
    content["seal"] = checkpoint_module._digest(content, leave_out=frozenset({"seal"}))
    (folder / MANIFEST_FILE).write_bytes(checkpoint_module._render(content))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content.update(format_version=99), "format version 99"),
        (lambda content: content["teachers"].pop(), "5 columns where 4 belong"),
        (lambda content: content.pop("training"), "damaged"),
        (lambda content: content.update(learnability="vibes"), "learnability is 'vibes'"),
        (lambda content: content["heads"].update({"chosen.quality": "oracle"}), "'oracle' is unknown"),
        (lambda content: content["heads"].pop("raw.quality"), "no head for 'raw.quality'"),
        (lambda content: content["heads"].update({"chosen.quality": "constant"}), "expected"),
        (lambda content: content["backbone"].update(width=9), "does not take 9 features"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    """A valid hash does not make nonsense valid."""
    write(tmp_path, train())
    forge(tmp_path, change)
    with pytest.raises(CheckpointError, match=expected):
        read_checkpoint(tmp_path)


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    """A router that would answer NaN never loads."""
    write(tmp_path, train())
    tensors = load((tmp_path / HEAD_FILE).read_bytes())
    tensors["chosen.quality.bias"] = tensors["chosen.quality.bias"].copy()
    tensors["chosen.quality.bias"][0] = np.nan
    forge(tmp_path, lambda _: None, save(tensors))
    with pytest.raises(CheckpointError, match=r"head.safetensors.*'chosen.quality' holds NaN"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("n_renames", [0, 1, 2])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_renames: int
) -> None:
    """Cut at each rename, a whole checkpoint can be read; the next write clears up."""
    folder = tmp_path / "checkpoint"
    old = write(folder, train())
    rename, calls = Path.rename, []

    def dying(self: Path, target: Path) -> Path:
        if len(calls) == n_renames:
            raise KeyboardInterrupt
        calls.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        patch.setattr(checkpoint_module.shutil, "rmtree", lambda *_, **__: None)
        if n_renames < 2:
            with pytest.raises(KeyboardInterrupt):
                write(folder, train(seed=1))
        else:
            write(folder, train(seed=1))
    found = read_checkpoint(folder)[1].checkpoint_id
    assert (found == old) == (n_renames < 2)
    new = write(folder, train(seed=2))
    assert read_checkpoint(folder)[1].checkpoint_id == new
    assert not (tmp_path / ".checkpoint.previous").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    """A wrong --out does not delete somebody's files."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        write(tmp_path, train())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_router_scores_with_the_backbone_it_was_trained_with(tmp_path: Path) -> None:
    """Another backbone is refused with both hashes; NaN features are an error and not teacher 0."""
    write(tmp_path, train())
    backbone: Any = FakeBackbone()
    output = Router.load(tmp_path, backbone).score(["a", "x" * 40])
    assert output.at().strengths_BM.shape == (2, 5)
    assert output.truncated_B.tolist() == [False, True]
    stranger: Any = FakeBackbone(fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match=r"f{16}.*0{16}"):
        Router.load(tmp_path, stranger)
    poisoned: Any = FakeBackbone(poisoned=True)
    with pytest.raises(RouterError, match="NaN"):
        Router.load(tmp_path, poisoned).score(["a"])

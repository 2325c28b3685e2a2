"""``persyn train`` and ``evaluate`` on input that cannot be used, or says little, and by a recipe."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from service.cli import main

TEACHERS = ("a", "b", "c")
LANGUAGES = ("French", "German", "Latin")
SEEN, NEW = range(12), range(12, 18)

Row = dict[str, object]


def rows(prompts: Sequence[int], teachers: Sequence[str] = TEACHERS) -> list[Row]:
    """Each language has its teacher; learnability differs too."""
    return [
        {
            "prompt_id": str(n),
            "prompt": f"Say the number {n} in {LANGUAGES[n % 3]}.",
            "teacher": teacher,
            "quality": float(teachers.index(teacher) == n % 3),
            "learnability": -1.0 - (n * 7 + teachers.index(teacher) * 3) % 5 / 5,
        }
        for n in prompts
        for teacher in teachers
    ]


def without(table: list[Row], name: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key != name} for row in table]


def constant(table: list[Row], **values: float) -> list[Row]:
    return [{**row, **values} for row in table]


def write(path: Path, table: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))


def make_decoder(folder: Path, tokenizer_from: Path, *, n_layers: int = 2, seed: int = 0) -> Path:
    """A tiny decoder with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from, local_files_only=True).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def persyn(folder: Path, *arguments: str) -> Done:
    """In this process: to start one, and to import torch in it, takes longer than most commands here."""
    said, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
        patch.object(sys, "argv", ["persyn", *arguments]),
        patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, said.getvalue(), errors.getvalue())


def train(folder: Path, name: str, table: list[Row], *options: str) -> Done:
    write(folder / f"{name}.jsonl", table)
    scores = ("--scores", f"{name}.jsonl", "--out", f"{name} checkpoint")
    return persyn(folder, "train", *scores, *(options or ("--backbone", "decoder")))


def evaluate(folder: Path, checkpoint: str, table: list[Row], out: str) -> Done:
    write(folder / f"{out}.jsonl", table)
    options = ("--scores", f"{out}.jsonl", "--out", out)
    return persyn(folder, "evaluate", "--checkpoint", checkpoint, *options)


def refusal(done: Done) -> str:
    """The one line that an error is told in, with exit code 1."""
    said = [line for line in done.stderr.splitlines() if not line.startswith('{"stage"')]
    assert (done.returncode, len(said)) == (1, 1), done.stderr
    assert said[0].startswith("error: ")
    return said[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """A tiny decoder, recipes for it, a router on it, and one that a recipe trained."""
    folder = tmp_path_factory.mktemp("training")
    make_decoder(folder / "decoder", minilm_path)
    recipe = {"backbone": "decoder", "epochs": 2, "learning_rate": 2e-3, "batch_prompts": 8, "max_tokens": 32}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, options in (("frozen", ("--backbone", "decoder")), ("tuned", ("--recipe", "recipe.yaml"))):
        done = train(folder, name, rows(SEEN), *options)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("by", [("--backbone", "decoder"), ("--recipe", "recipe.yaml")])
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            rows(SEEN, ["a"]),
            "1 teacher.s.; a router needs at least two teachers: add the responses of another",
        ),
        (
            without(rows(SEEN), "learnability"),
            "no learnability, but alpha is 0.4: score the responses under the student first",
        ),
        ([{**row, "split": "test"} for row in rows(SEEN)], "marked as a test prompt; nothing is left"),
    ],
    ids=["one teacher", "no learnability", "all test"],
)
def test_a_table_that_no_router_can_be_made_of_is_refused(
    folder: Path, table: list[Row], expected: str, by: tuple[str, str]
) -> None:
    """In one line, before the first prompt is encoded, and nothing is written."""
    done = train(folder, "refused", table, *by)
    assert re.search(rf"refused\.jsonl: .*{expected}", refusal(done))
    assert '"stage"' not in done.stderr
    assert not (folder / "refused checkpoint").exists()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (rows([0]), "1 of 1 prompts have two teachers to compare: expected at least 2"),
        (constant(rows(SEEN), quality=0.5, learnability=-1.0), "different reward: there is nothing to learn"),
    ],
    ids=["one prompt", "all ties"],
)
def test_a_recipe_refuses_what_the_frozen_way_falls_back_on(
    folder: Path, table: list[Row], expected: str
) -> None:
    """A backbone is not trained for nothing: one prompt, and nothing but ties."""
    done = train(folder, "nothing", table, "--recipe", "recipe.yaml")
    assert expected in refusal(done)
    assert not (folder / "nothing checkpoint").exists()


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (rows([0]), "1 training prompts cannot show a gain, 10 are needed"),
        (constant(rows(SEEN), quality=0.5, learnability=-1.0), "cross-validation found no clear gain"),
    ],
    ids=["one prompt", "all ties"],
)
def test_a_table_without_a_signal_gives_the_best_single_teacher(
    folder: Path, table: list[Row], reason: str
) -> None:
    """Training says so, the report says so, and every prompt goes to one teacher."""
    done = train(folder, "silent", table)
    assert done.returncode == 0, done.stderr
    assert f"fallen back to the best single teacher: {reason}" in done.stdout
    judged = evaluate(folder, "silent checkpoint", rows(NEW), "silent report")
    assert judged.returncode == 0, judged.stderr
    assert f"fallen back to the best single teacher: {reason}" in judged.stdout
    report = json.loads((folder / "silent report" / "report.json").read_text())
    assert sorted(report["methods"]["persyn"]["share"].values()) == [0.0, 0.0, 1.0]
    assert report["verdict"] == "routing does not help here: use best_single"
    assert reason in (folder / "silent report" / "report.md").read_text()


def test_constant_learnability_leaves_the_choice_to_quality(folder: Path) -> None:
    """It trains, and the report of such a table says that learnability decided nothing."""
    done = train(folder, "flat", constant(rows(SEEN), learnability=-1.0))
    assert done.returncode == 0, done.stderr
    judged = evaluate(folder, "flat checkpoint", constant(rows(NEW), learnability=-1.0), "flat report")
    assert judged.returncode == 0, judged.stderr
    assert "same learnability: quality alone" in (folder / "flat report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            rows(NEW, [*TEACHERS, "y", "z"]),
            "not know: 'y', 'z'.* or add them to the router by `persyn extend`",
        ),
        (rows(SEEN), "of 12, 12 were trained on.*Give a table of other prompts"),
        (rows(NEW, ["a"]), "6 have fewer than two responses. Give a table"),
        (without(rows(NEW), "learnability"), "has no learnability, but the checkpoint's alpha is 0.4"),
    ],
    ids=["strangers", "trained on", "one teacher", "no learnability"],
)
def test_a_table_that_shows_nothing_of_a_router_is_refused(
    folder: Path, table: list[Row], expected: str
) -> None:
    """In one line, and no report is written."""
    assert re.search(expected, refusal(evaluate(folder, "frozen checkpoint", table, "no report")))
    assert not (folder / "no report").exists()


def test_a_table_without_some_of_the_teachers_is_judged_with_a_note(folder: Path) -> None:
    """Who is missing stands in the report; nobody is sent to it."""
    done = evaluate(folder, "frozen checkpoint", rows(NEW, ["a", "b"]), "lacking report")
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "lacking report" / "report.json").read_text())
    assert set(report["methods"]["persyn"]["share"]) == {"a", "b"}
    assert "the table has no responses of c" in (folder / "lacking report" / "report.md").read_text()


def one_layer_less(folder: Path, tokenizer_from: Path) -> None:
    shutil.rmtree(folder)
    make_decoder(folder, tokenizer_from, n_layers=1)


def other_weights(folder: Path, tokenizer_from: Path) -> None:
    make_decoder(folder, tokenizer_from, seed=1)


@pytest.mark.parametrize("change", [one_layer_less, other_weights])
@pytest.mark.parametrize("checkpoint", ["frozen checkpoint", "tuned checkpoint"])
def test_another_model_in_the_backbones_place_is_refused(
    folder: Path,
    minilm_path: Path,
    checkpoint: str,
    change: Callable[[Path, Path], None],
) -> None:
    """By both hashes, also where the other model lacks a layer or a tensor that the checkpoint names."""
    shutil.copytree(folder / "decoder", folder / "kept")
    try:
        change(folder / "decoder", minilm_path)
        done = evaluate(folder, checkpoint, rows(NEW), "no report")
    finally:
        shutil.rmtree(folder / "decoder")
        (folder / "kept").rename(folder / "decoder")
    expected = (
        rf"{checkpoint}: was trained with backbone .*decoder' of hash \w+…, but .*; train again or restore"
    )
    assert re.search(expected, refusal(done))


def test_a_recipe_trains_a_decoder_and_the_checkpoint_is_judged(folder: Path) -> None:
    """The tuned weights are in the checkpoint, the report is of the router that has them."""
    manifest = json.loads((folder / "tuned checkpoint" / "manifest.json").read_text())
    assert (folder / "tuned checkpoint" / "model.safetensors").stat().st_size > 0
    assert manifest["head"] == "soft_bt"
    done = evaluate(folder, "tuned checkpoint", rows(NEW), "tuned report")
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "tuned report" / "report.json").read_text())
    assert (report["checkpoint_id"], report["head"]) == (manifest["checkpoint_id"], "soft_bt")
    assert report["n_prompts"] == len(NEW)


def test_tampered_weights_of_a_recipe_are_refused_by_name(folder: Path) -> None:
    """One byte changed, or no file at all."""
    shutil.copytree(folder / "tuned checkpoint", folder / "tampered")
    weights = folder / "tampered" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = refusal(evaluate(folder, "tampered", rows(NEW), "no report"))
    assert "tampered/model.safetensors: is not the file that was trained" in changed
    weights.unlink()
    gone = refusal(evaluate(folder, "tampered", rows(NEW), "no report"))
    assert "tampered/model.safetensors: cannot be read" in gone

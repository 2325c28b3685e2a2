"""``persyn train --recipe`` end to end: a backbone is fine-tuned, and its checkpoint is judged and routes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

from router_model.checkpoint import HEAD_FILE, MANIFEST_FILE, WEIGHTS_FILE, read_checkpoint
from tests.e2e.test_cli import persyn, write_project

N_PROMPTS = 48
SIZES = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
RECIPE = {
    "alpha": 0.25,
    "learning_rate": 2.0e-3,
    "epochs": 4,
    "batch_prompts": 8,
    "max_tokens": 32,
    "objective": "soft_bt",
}


def decoder() -> PreTrainedModel:
    """Two layers of Llama with random weights."""
    return LlamaModel(LlamaConfig(**SIZES))


def encoder() -> PreTrainedModel:
    """Two layers of BERT with random weights."""
    return BertModel(BertConfig(**SIZES))


@pytest.fixture(scope="module", params=[decoder, encoder])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, minilm_path: Path
) -> Path:
    """A table in which one word says who is best, a recipe, and the router that the command made of them."""
    make: Callable[[], PreTrainedModel] = request.param
    folder = tmp_path_factory.mktemp(make.__name__)
    torch.manual_seed(0)
    make().save_pretrained(folder / "tiny")
    AutoTokenizer.from_pretrained(minilm_path, local_files_only=True).save_pretrained(folder / "tiny")
    rows = [
        {
            "prompt_id": str(number),
            "prompt": f"{'cat' if number % 2 else 'dog'} number {number}",
            "teacher": teacher,
            "quality": float((teacher == "a") == bool(number % 2)),
            "learnability": -1.0,
            "split": "test" if number >= 36 else "train",
        }
        for number in range(N_PROMPTS)
        for teacher in ("a", "b")
    ]
    (folder / "scores.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"backbone": str(folder / "tiny"), **RECIPE}))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "cat", "answer": "a"}) + "\n")
    write_project(folder / "persyn.yaml", "http://127.0.0.1:9/v1", folder / "tiny", folder / "tiny")
    train = ("train", "--scores", "scores.jsonl", "--recipe", "recipe.yaml", "--out", "checkpoint")
    done = persyn(folder, *train, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["head"], said["n_prompts"], said["n_teachers"]) == ("soft_bt", 36, 2)
    return folder


def test_the_checkpoint_holds_the_fine_tuned_weights(folder: Path) -> None:
    """Three files; the manifest has the recipe's alpha and limit, and each epoch."""
    names = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert names == sorted((HEAD_FILE, MANIFEST_FILE, WEIGHTS_FILE))
    _, manifest = read_checkpoint(folder / "checkpoint")
    assert (manifest.alpha, manifest.backbone.max_tokens) == (0.25, 32)
    strength = manifest.facts["strength"]
    assert strength["recipe"]["learning_rate"] == RECIPE["learning_rate"]
    assert 1 <= strength["best_epoch"] <= len(strength["history"]) <= 4


def test_it_is_judged_and_routes(folder: Path) -> None:
    """The report is about the held-out prompts, and a prompt gets its teacher."""
    arguments = ("--checkpoint", "checkpoint", "--scores", "scores.jsonl", "--out", "report")
    done = persyn(folder, "evaluate", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["n_prompts"], report["alpha"]) == (12, 0.25)
    assert report["verdict"] == "routing helps"
    assert any("no curve over alpha" in note for note in report["notes"])
    assert (folder / "report" / "report.md").is_file()
    for prompt, teacher in (("cat number 99", "a"), ("dog number 99", "b")):
        done = persyn(folder, "route", prompt, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["teacher"] == teacher


@pytest.mark.parametrize("option", [("--alpha", "0.4"), ("--head", "bt"), ("--quality-from", "checkpoint")])
def test_what_the_recipe_decides_is_refused_beside_it(folder: Path, option: tuple[str, str]) -> None:
    """Even its default value: the recipe has another alpha, and would win without a word."""
    train = ("train", "--scores", "scores.jsonl", "--recipe", "recipe.yaml", "--out", "other", *option)
    done = persyn(folder, *train)
    assert done.returncode == 2
    assert option[0] in done.stderr
    assert "the recipe decides this" in done.stderr


def test_changed_weights_are_refused_by_name(folder: Path) -> None:
    """One byte is enough, in ``route`` as in ``evaluate``; without the file likewise."""
    weights = folder / "checkpoint" / WEIGHTS_FILE
    kept = weights.read_bytes()
    evaluate = ("evaluate", "--checkpoint", "checkpoint", "--scores", "scores.jsonl", "--out", "none")
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        for command in (evaluate, ("route", "cat")):
            done = persyn(folder, *command)
            assert done.returncode == 1
            assert "model.safetensors: is not the file that was trained" in done.stderr
        weights.unlink()
        done = persyn(folder, "route", "cat")
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "model.safetensors: cannot be read" in done.stderr
    finally:
        weights.write_bytes(kept)
    assert not (folder / "none").exists()

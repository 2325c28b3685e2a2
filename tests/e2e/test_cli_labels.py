"""``persyn advise`` and ``persyn extend`` on a real backbone: which prompts to label, a later teacher."""

import json
from pathlib import Path

import numpy as np
import pytest

from router_model.checkpoint import read_checkpoint
from router_model.inference import Router
from router_model.pipeline.prompts import read_prompts
from tests.e2e.test_cli import persyn, write_project

TOPICS = ("the sea", "a train", "bread", "the moon", "rain", "a violin", "wool", "chess")
KINDS = ("Name a colour of {}.", "Write two sentences about {}.", "Return JSON about {}.")


def quality(teacher: str, kind: int, number: int) -> float:
    """Each teacher is good at one kind of prompt; the new one at the last."""
    best = {"alpaca": 0, "bison": 1, "camel": 2}[teacher]
    return float(kind == best) + 0.01 * ((number * 7 + best) % 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """A trained router of two teachers, a table with a third one, and new prompts."""
    folder = tmp_path_factory.mktemp("labels")
    prompts = [(kind, text.format(topic)) for topic in TOPICS for kind, text in enumerate(KINDS)]
    rows = [
        {
            "prompt_id": str(number),
            "prompt": prompt,
            "teacher": teacher,
            "quality": quality(teacher, kind, number),
            "learnability": -1.0 - 0.01 * (number % 3),
            "split": "test" if number >= 18 else "train",
        }
        for number, (kind, prompt) in enumerate(prompts)
        for teacher in ("alpaca", "bison", "camel")
    ]
    write(folder / "all.jsonl", rows)
    write(folder / "known.jsonl", [row for row in rows if row["teacher"] != "camel"])
    new = [{"prompt": f"Return JSON about {thing}.", "tags": [thing]} for thing in ("a cup", "ice", "a dog")]
    write(folder / "new.jsonl", [*new, {"prompt": prompts[0][1], "constraints": []}])
    train = ("train", "--scores", "known.jsonl", "--backbone", str(minilm_path), "--out", "checkpoint")
    done = persyn(folder, *train, "--head", "ridge", "--embeddings", "e.sqlite")
    assert done.returncode == 0, done.stderr
    return folder


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_advise_writes_rows_as_they_were(folder: Path) -> None:
    """Unknown prompts are chosen with all their columns, a prompt of the training is not."""
    arguments = ("--checkpoint", "checkpoint", "--prompts", "new.jsonl", "--out", "chosen.jsonl", "-n", "9")
    done = persyn(folder, "advise", *arguments, "--embeddings", "e.sqlite", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["n_chosen"] == 3
    assert said["label_advice"]["state"] == "unknown"
    given = (folder / "new.jsonl").read_text().splitlines()
    assert sorted((folder / "chosen.jsonl").read_text().splitlines()) == sorted(given[:3])
    assert [prompt.id for prompt in read_prompts(folder / "chosen.jsonl")] == said["chosen"]
    probes = persyn(folder, "advise", *arguments, "--embeddings", "e.sqlite", "--for-new-teacher")
    assert probes.stdout.startswith("4 of 4 prompts in chosen.jsonl")
    missing = persyn(folder, "advise", *arguments[2:], "--checkpoint", "nowhere", "--json")
    assert missing.returncode == 1
    assert json.loads(missing.stdout)["error"] == "CheckpointError"
    assert persyn(folder, "advise", *arguments[:-1], "0").returncode == 2
    held_out = [{**json.loads(line), "split": "test"} for line in given]
    write(folder / "held_out.jsonl", [*held_out[:3], json.loads(given[3])])
    only = persyn(folder, "advise", *arguments, "--prompts", "held_out.jsonl", "--for-new-teacher")
    assert only.stdout.startswith("1 of 1 prompts")
    write(folder / "held_out.jsonl", held_out)
    nothing = persyn(folder, "advise", *arguments, "--prompts", "held_out.jsonl", "--json")
    assert "every prompt is marked as a test prompt" in json.loads(nothing.stdout)["detail"]


def test_extend_adds_a_teacher_that_routes_and_is_judged(folder: Path, minilm_path: Path) -> None:
    """The new teacher gets the prompts it is good at; the report and the manifest know it."""
    arguments = ("extend", "--checkpoint", "checkpoint", "--scores", "all.jsonl", "--out", "extended")
    done = persyn(folder, *arguments, "--embeddings", "e.sqlite", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["added"][0] == {"id": "camel", "n_probes": 18, "constant": said["added"][0]["constant"]}
    _, parent = read_checkpoint(folder / "checkpoint")
    _, manifest = read_checkpoint(folder / "extended")
    assert [teacher.id for teacher in manifest.teachers] == ["alpaca", "bison", "camel"]
    assert manifest.teachers[:2] == parent.teachers
    assert manifest.training == parent.training
    extension = manifest.facts["extensions"][0]
    assert extension["parent_checkpoint_id"] == parent.checkpoint_id == said["parent_checkpoint_id"]
    assert (extension["teacher"], extension["n_probes"]) == ("camel", 18)
    router = Router.load(folder / "extended")
    quality_BM = router.score(["Return JSON about a lamp.", "Name a colour of a lamp."]).parts.quality
    assert np.argmax(quality_BM[:, 2]) == 0
    names = ("alpaca", "bison", "camel")
    write_project(
        folder / "persyn.yaml",
        "http://127.0.0.1:9/v1",
        minilm_path,
        minilm_path,
        students=[{"id": "small", "model": str(minilm_path), "checkpoint": "extended"}],
        teachers=[{"id": name, "base_url": "http://127.0.0.1:9/v1", "model": name} for name in names],
    )
    routed = persyn(folder, "route", "Return JSON about a lamp.", "--json")
    assert set(json.loads(routed.stdout)["distribution"]) == set(names)
    report = ("evaluate", "--checkpoint", "extended", "--scores", "all.jsonl", "--out", "report", "--json")
    judged = persyn(folder, *report)
    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout)["n_teachers"] == 3
    again = persyn(folder, *arguments, "--teacher", "alpaca", "--json")
    assert again.returncode == 1
    assert "known to the router already" in json.loads(again.stdout)["detail"]
    onto_itself = persyn(folder, *arguments[:-1], "checkpoint", "--json")
    assert onto_itself.returncode == 1
    assert "would be lost; write to another --out" in json.loads(onto_itself.stdout)["detail"]
    assert read_checkpoint(folder / "checkpoint")[1] == parent


def test_a_new_student_takes_the_quality_heads(folder: Path, minilm_path: Path) -> None:
    """Learnability alone is fitted; the manifest names the donor; other teachers are refused."""
    rows = [json.loads(line) for line in (folder / "known.jsonl").read_text().splitlines()]
    write(folder / "other.jsonl", [{**row, "learnability": -2.0 - row["quality"]} for row in rows])
    train = (
        "train",
        "--backbone",
        str(minilm_path),
        "--embeddings",
        "e.sqlite",
        "--quality-from",
        "checkpoint",
    )
    done = persyn(folder, *train, "--scores", "other.jsonl", "--out", "second", "--student", "second")
    assert done.returncode == 0, done.stderr
    (donor, parent), (model, manifest) = (read_checkpoint(folder / name) for name in ("checkpoint", "second"))
    assert manifest.facts["quality_from"] == parent.checkpoint_id
    assert manifest.student.id == "second"
    for own, lent in zip(model.members, donor.members, strict=True):
        for name, tensor in lent.quality.tensors().items():
            np.testing.assert_array_equal(own.quality.tensors()[name], tensor)
    refused = persyn(folder, *train, "--scores", "all.jsonl", "--out", "third", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"] == "CheckpointError"

"""The data set loads where it should, and holds whole answers only."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from clients.types import License, Prompt, RoutingDecision, TeacherSpec
from router_model.pipeline.dataset import DATA_FILE, Answer, Origin, write_dataset
from router_model.pipeline.prompts import read_prompts

SPECS = [
    TeacherSpec(
        id="a", base_url="http://x/v1", model="m-a", license=License("apache-2.0", outputs_may_train=True)
    ),
    TeacherSpec(id="b", base_url="http://x/v1", model="m-b"),
]
ORIGIN = Origin("student", "persyn", "c0ffee", 0, 0.0, "persyn synthesize --out d")


def decision(prompt_id: str, teacher: str) -> RoutingDecision:
    return RoutingDecision(
        prompt_id=prompt_id,
        teacher=teacher,
        distribution={"a": 0.75, "b": 0.25},
        strengths={},
        quality={},
        learnability={},
        expected_reward={},
        propensity=1.0,
        margin=1.0,
        uncertain=False,
        input_tokens=1,
        truncated=False,
    )


def answer(number: int, teacher: str = "a", **changes: Any) -> Answer:
    prompt = Prompt(f"p{number}", ({"role": "user", "content": f"q{number}"},), {"topic": number})
    record = {
        "key": f"key{number}",
        "teacher": teacher,
        "response": f"answer {number}",
        "finish_reason": "stop",
        "choices": [{"message": {"content": f"answer {number}", "reasoning_content": "because"}}],
        "provenance": {
            "teacher": teacher,
            "served_model": "m-1",
            "usage": {"prompt_tokens": 3, "completion_tokens": 5},
            "cost_usd": 0.5,
            "latency_s": 0.25,
            "attempts": 1,
            "prompt_hash": "h",
        },
        **changes,
    }
    return Answer(prompt, decision(prompt.id, teacher), record)


def test_the_hugging_face_library_reads_the_folder(tmp_path: Path) -> None:
    """``load_dataset`` reads the folder by data_dir and as a whole, with prompt and completion as chats."""
    write_dataset(tmp_path, [answer(0), answer(1, "b")], [], specs=SPECS, origin=ORIGIN)
    (tmp_path / ".responses.jsonl").write_text("{}\n")
    cache = str(tmp_path / "cache")
    by_folder = datasets.load_dataset("parquet", data_dir=str(tmp_path), split="train", cache_dir=cache)
    by_card = datasets.load_dataset(str(tmp_path), split="train", cache_dir=cache)
    for loaded in (by_folder, by_card):
        assert loaded["id"][:] == ["p0", "p1"]
        assert loaded[0]["prompt"] == [{"role": "user", "content": "q0"}]
        assert loaded[0]["completion"] == [{"role": "assistant", "content": "answer 0"}]
        assert loaded[0]["messages"] == [*loaded[0]["prompt"], *loaded[0]["completion"]]
        assert loaded[1]["p_teacher"] == 0.25
        assert json.loads(loaded[0]["extra"]) == {"topic": 0}
        assert loaded[0]["reasoning"] == "because"


@pytest.mark.parametrize("changes", [{"finish_reason": "length"}, {"response": " \n"}])
def test_truncated_and_empty_answers_are_failures(tmp_path: Path, changes: dict[str, str]) -> None:
    """An answer that is cut or empty is not a row; ``failures.jsonl`` says why."""
    summary = write_dataset(
        tmp_path, [answer(0), answer(1, **changes)], [{"prompt_id": "p2"}], specs=SPECS, origin=ORIGIN
    )
    assert (summary.n_rows, summary.n_failures) == (1, 2)
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert [failure["prompt_id"] for failure in failures] == ["p2", "p1"]
    assert failures[1]["reason"]


def test_the_card_states_shares_licences_and_the_command(tmp_path: Path) -> None:
    """The card's head is YAML that names the data files; its body says who wrote what under which terms."""
    write_dataset(tmp_path, [answer(0), answer(1, "b"), answer(2)], [], specs=SPECS, origin=ORIGIN)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    assert "| `a` | `m-a` | 66.7% | 2 | 10 | 1.0000 | apache-2.0 | yes |" in body
    assert "| unknown | not stated |" in body
    assert "persyn synthesize --out d" in body


def test_prompts_in_parts_and_huge_integers_become_rows(tmp_path: Path) -> None:
    """A turn in parts is written as its text, without pictures; ``extra`` holds integers of any size."""
    parts = [{"type": "image_url", "image_url": {"url": "u"}}, *({"type": "text", "text": t} for t in "ab")]
    path = tmp_path / "prompts.jsonl"
    row = {"id": "p0", "messages": [{"role": "user", "content": parts}], "big": 10**30}
    path.write_text(json.dumps(row))
    given = answer(0)
    whole = Answer(read_prompts(path)[0], given.decision, given.record)
    write_dataset(tmp_path / "d", [whole], [], specs=SPECS, origin=ORIGIN)
    written = pq.read_table(tmp_path / "d" / DATA_FILE).to_pylist()[0]
    assert written["prompt"] == [{"role": "user", "content": "a\nb"}]
    assert json.loads(written["extra"]) == {"big": 10**30}


def test_the_card_claims_no_language(tmp_path: Path) -> None:
    """Nobody has told the pipeline what language the prompts are in."""
    write_dataset(tmp_path, [answer(0)], [], specs=SPECS, origin=ORIGIN)
    assert "language" not in yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])


def test_a_data_set_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    """If every prompt failed the files are there, with all columns and no rows."""
    summary = write_dataset(tmp_path, [], [{"prompt_id": "p"}], specs=SPECS, origin=ORIGIN)
    assert summary.n_rows == 0
    table = pq.read_table(tmp_path / DATA_FILE)
    assert table.num_rows == 0
    assert {"prompt", "completion", "teacher"} <= set(table.column_names)

"""Scoring judges what was collected, resumes, and survives what one prompt breaks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from clients.testing import FakeTeacher
from router_model.errors import PipelineError, RouterError
from router_model.learnability import LearnabilityScore
from router_model.pipeline import score as stage
from router_model.pipeline.artifacts import model_identity
from router_model.pipeline.collect import calibration_prompts, collect
from router_model.pipeline.config import ProjectFile, load_project
from tests.unit.pipeline.test_generation import SilentProgress


class Student:
    """Stands in for the language model: counts pairs, and refuses prompts with a forbidden word."""

    def __init__(self) -> None:
        self.n_pairs = 0

    def score(self, _loaded: object, pairs: Sequence[Any], *, with_local: bool) -> list[LearnabilityScore]:
        for index, (messages, _) in enumerate(pairs):
            if "forbidden" in messages[-1]["content"]:
                raise RouterError("the template refuses it", details={"index": index})
        self.n_pairs += len(pairs)
        local = -0.5 if with_local else None
        return [LearnabilityScore(-1.0, 2.5, 3, truncated=False, local_logprob=local) for _ in pairs]


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> Student:
    student = Student()
    monkeypatch.setattr(stage, "load_student", lambda _name: object())
    monkeypatch.setattr(stage, "score_learnability", student.score)
    return student


def write_prompts(path: Path, *texts: str, **columns: Any) -> Path:
    rule = [{"kind": "word_count", "min": 1}]
    rows = [{"id": text, "prompt": text, "constraints": rule, **columns} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def project(tmp_path: Path, teacher: FakeTeacher, *texts: str, n_teachers: int = 2) -> ProjectFile:
    write_prompts(tmp_path / "prompts.jsonl", *texts)
    content = {
        "version": 1,
        "students": [{"id": "s", "model": "m", "checkpoint": "run/checkpoint"}],
        "teachers": [
            {"id": f"t{n}", "base_url": teacher.base_url, "model": "m", "api_key_env": "SOME_KEY"}
            for n in range(n_teachers)
        ],
        "calibration": {"prompts": "prompts.jsonl"},
        "quality": {"kind": "verifiable"},
        "router": {"backbone": "b"},
    }
    (tmp_path / "persyn.yaml").write_text(yaml.safe_dump(content))
    return load_project(tmp_path / "persyn.yaml")


def test_score_judges_the_prompts_that_were_collected(
    tmp_path: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``collect --prompts P``, ``score`` judges P's answers, without keys; the second time for free."""
    run, progress = tmp_path / "run", SilentProgress()
    with FakeTeacher() as teacher:
        loaded = project(tmp_path, teacher, "from the project file")
        other = write_prompts(tmp_path / "other.jsonl", "one", "two", "three")
        monkeypatch.setenv("SOME_KEY", "key")
        collect(loaded, run, progress=progress, prompts_path=other)
    monkeypatch.delenv("SOME_KEY")
    for _ in range(2):
        result = stage.score(loaded, run, progress=progress)
        assert (result.n_rows, result.n_missing, result.n_unscorable) == (6, 0, 0)
    assert student.n_pairs == 6
    assert {row["prompt_id"] for row in pq.read_table(result.path).to_pylist()} == {"one", "two", "three"}


def test_another_measure_is_measured_and_not_read_from_older_entries(
    tmp_path: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has the ratio always and the local measure where asked for; the journal's entries are kept by
    the measures they hold, and an entry of a single number is not mistaken for them."""
    monkeypatch.setenv("SOME_KEY", "key")
    run, progress = tmp_path / "run", SilentProgress()
    with FakeTeacher() as teacher:
        loaded = project(tmp_path, teacher, "one", "two")
        collect(loaded, run, progress=progress)
    local = loaded.model_copy(deep=True)
    local.reward.learnability = "local_logprob"
    for asked, n_pairs in ((loaded, 4), (local, 8), (loaded, 8), (local, 8)):
        table = pq.read_table(stage.score(asked, run, progress=progress).path)
        assert student.n_pairs == n_pairs
        assert set(table["learnability"].to_pylist()) == {-1.0}
        assert set(table["rank_surprisal"].to_pylist()) == {2.5}
        assert ("local_logprob" in table.column_names) == (asked is local)
    assert set(table["local_logprob"].to_pylist()) == {-0.5}
    # What an older release wrote: the same answer under a key without the measures.
    journal = run / "learnability.jsonl"
    items = [
        stage._Item(*found)
        for found in stage.collected_answers(
            loaded.teacher_specs(with_keys=False), stage.collected_prompts(run), run
        )
    ]
    older = [{"key": item.key(f"mean_logprob {model_identity('m')}"), "value": -9.0} for item in items]
    journal.write_text("".join(json.dumps(record) + "\n" for record in older))
    table = pq.read_table(stage.score(loaded, run, progress=progress).path)
    assert student.n_pairs == 12
    assert set(table["learnability"].to_pylist()) == {-1.0}


def test_a_prompt_that_the_student_refuses_costs_its_own_cells(
    tmp_path: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat template that refuses one prompt leaves its cells empty, says so, and scores the rest."""
    monkeypatch.setenv("SOME_KEY", "key")
    progress = SilentProgress()
    with FakeTeacher() as teacher:
        loaded = project(tmp_path, teacher, "one", "forbidden", "three")
        collect(loaded, tmp_path / "run", progress=progress)
    result = stage.score(loaded, tmp_path / "run", progress=progress)
    assert (result.n_rows, result.n_unscorable) == (4, 2)
    assert any("'forbidden' has no learnability" in note for note in progress.notes)


def test_scoring_before_collecting_is_refused(tmp_path: Path, student: Student) -> None:
    """Without answers there is nothing to score; the message says what to run."""
    with FakeTeacher() as teacher:
        loaded = project(tmp_path, teacher, "one")
    with pytest.raises(PipelineError, match="run `persyn collect` first"):
        stage.score(loaded, tmp_path / "run", progress=SilentProgress())


def test_what_no_router_can_come_of_is_refused_before_it_is_paid_for(tmp_path: Path) -> None:
    """One teacher, or no prompt to train on or to hold out, is an error before any call."""
    with FakeTeacher() as teacher:
        alone = project(tmp_path, teacher, "one", "two", n_teachers=1)
        with pytest.raises(PipelineError, match="at least two"):
            stage.require_trainable(alone, calibration_prompts(alone))
        for split, missing in (("train", "hold out"), ("test", "train on")):
            loaded = project(tmp_path, teacher)
            write_prompts(tmp_path / "prompts.jsonl", "one", "two", split=split)
            with pytest.raises(PipelineError, match=missing):
                stage.require_trainable(loaded, calibration_prompts(loaded))


def test_a_model_that_was_changed_in_place_is_another_model(tmp_path: Path) -> None:
    """Scores are kept by what the model was; a hub id is its own identity."""
    (tmp_path / "weights").write_text("old")
    before = model_identity(str(tmp_path))
    assert model_identity(str(tmp_path)) == before
    (tmp_path / "weights").write_text("newer")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("org/model") == "org/model"

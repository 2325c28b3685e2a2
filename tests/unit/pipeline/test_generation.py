"""Answers are paid for once and never lost."""

import errno
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from clients.breaker import Breaker
from clients.testing import FakeTeacher, Reply
from clients.types import Assignment, Limits, Prompt, TeacherSpec
from router_model.errors import PipelineError
from router_model.pipeline import generation
from router_model.pipeline.artifacts import read_journal
from router_model.pipeline.generation import generate


class SilentProgress:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.n_items = self.n_errors = self.total = self.done = 0
        self.notes: list[str] = []

    def start(self, stage: str, *, total: int, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None:
        self.n_items += n_items
        self.n_errors += n_errors

    def finish(self) -> None:
        self.total = 0

    def note(self, message: str) -> None:
        self.notes.append(message)


def spec(teacher: FakeTeacher, **changes: Any) -> TeacherSpec:
    return TeacherSpec(id="t", base_url=teacher.base_url, model="m", limits=Limits(concurrency=3), **changes)


def assignments(n_prompts: int) -> list[Assignment]:
    return [
        Assignment(Prompt(f"p{n}", ({"role": "user", "content": f"question {n}"},)), "t")
        for n in range(n_prompts)
    ]


def asked(teacher: FakeTeacher) -> Counter[str]:
    return Counter(request["messages"][-1]["content"] for request in teacher.requests)


def quick_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe every fifth of a second."""
    monkeypatch.setitem(Breaker.__init__.__kwdefaults__, "pause_s", 0.2)


def run(teacher: FakeTeacher, journal: Path, n_prompts: int = 20, **changes: Any) -> Any:
    return generate(
        [spec(teacher, **changes)],
        assignments(n_prompts),
        journal,
        stage="collect",
        progress=SilentProgress(),
    )


def test_a_second_call_asks_nothing(tmp_path: Path) -> None:
    """What the journal answers is not asked again; new prompts are."""
    with FakeTeacher() as teacher:
        assert run(teacher, tmp_path / "j").n_generated == 20
        again = run(teacher, tmp_path / "j", n_prompts=25)
        assert (again.n_reused, again.n_generated) == (20, 5)
        assert set(asked(teacher).values()) == {1}


def test_the_same_content_under_several_ids_is_asked_once(tmp_path: Path) -> None:
    """Equal prompts share one paid answer, and one failure is reported for each of them."""
    twins = [Assignment(Prompt(name, ({"role": "user", "content": "same"},)), "t") for name in "abc"]
    progress = SilentProgress()
    with FakeTeacher() as teacher:
        result = generate([spec(teacher)], twins, tmp_path / "j", stage="collect", progress=progress)
        assert (result.n_generated, progress.n_items, len(teacher.requests)) == (3, 3, 1)
        teacher.script = lambda _body, _n_call: Reply(status=400)
        refused = generate([spec(teacher)], twins, tmp_path / "k", stage="collect", progress=progress)
        assert [failure.prompt_id for failure in refused.failures] == ["a", "b", "c"]


def test_an_empty_answer_does_not_take_its_teacher_down(tmp_path: Path) -> None:
    """A teacher that says nothing to one kind of prompt goes on answering the others, each asked once."""

    def mute(body: Mapping[str, Any], _n_call: int) -> Reply:
        silent = body["messages"][-1]["content"] != "question 19"
        return Reply(content="", finish_reason="length") if silent else Reply()

    with FakeTeacher(mute) as teacher:
        result = run(teacher, tmp_path / "j")
        assert (result.n_generated, len(result.failures), len(teacher.requests)) == (1, 19, 20)


def test_another_address_of_the_same_teacher_is_not_paid_again(tmp_path: Path) -> None:
    """Moving an endpoint keeps its answers; changing what is asked does not."""
    with FakeTeacher() as first, FakeTeacher() as second:
        run(first, tmp_path / "j")
        assert run(second, tmp_path / "j").n_generated == 0
        assert run(second, tmp_path / "j", system_prompt="Be brief.").n_generated == 20


def test_failures_are_reported_and_asked_again(tmp_path: Path) -> None:
    """A refused prompt costs its own cell only, and a later call asks for it again."""

    def picky(body: Mapping[str, Any], _n_call: int) -> Reply:
        refuses = body["messages"][-1]["content"] == "question 7"
        return Reply(status=400, raw=b'{"error": "no"}') if refuses else Reply()

    with FakeTeacher(picky) as teacher:
        result = run(teacher, tmp_path / "j")
        assert [(f.prompt_id, f.type) for f in result.failures] == [("p7", "TeacherRejectedError")]
        teacher.script = lambda _body, _n_call: Reply()
        assert run(teacher, tmp_path / "j").n_generated == 1
    assert len(list(read_journal(tmp_path / "j"))) == 20


def test_a_dead_teacher_is_given_up_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that stays down fails its own cells; the answers of the others are all there."""
    quick_breaker(monkeypatch)
    monkeypatch.setattr(generation, "OUTAGE_PATIENCE_S", 0.5)
    with FakeTeacher() as alive:
        dead = TeacherSpec(id="dead", base_url="http://127.0.0.1:9/v1", model="m")
        both = [*assignments(30), *(Assignment(item.prompt, "dead") for item in assignments(30))]
        result = generate(
            [spec(alive), dead], both, tmp_path / "j", stage="collect", progress=SilentProgress()
        )
        assert result.n_generated == 30
        assert len(result.failures) == 30
        assert all(failure.teacher == "dead" and failure.retryable for failure in result.failures)


def test_a_teacher_that_comes_back_loses_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts wait out an outage: after the breaker has opened, a probe finds the teacher up again."""
    quick_breaker(monkeypatch)
    outage = [Reply(status=503)] * 10

    def flaky(_body: Mapping[str, Any], n_call: int) -> Reply:
        return outage[n_call - 1] if n_call <= len(outage) else Reply()

    with FakeTeacher(flaky) as teacher:
        result = run(teacher, tmp_path / "j")
    assert (result.n_generated, result.failures) == (20, [])


def test_a_full_disk_keeps_every_answer_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk no further call is made, calls in flight are kept, and a later call goes on."""
    real_write, ballast = os.write, tmp_path / ".j.ballast"
    n_written = 0

    def write(file: int, data: bytes) -> int:
        nonlocal n_written
        n_written += 1
        if n_written > 6 and ballast.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(file, data)

    with FakeTeacher() as teacher:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(PipelineError, match="disk is full"):
                run(teacher, tmp_path / "j")
        n_asked = len(teacher.requests)
        assert len(list(read_journal(tmp_path / "j"))) == n_asked < 20
        assert run(teacher, tmp_path / "j").n_reused == n_asked
        assert set(asked(teacher).values()) == {1}

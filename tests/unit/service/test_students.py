"""Students: which one serves, what a reload replaces, and when a backbone is let go."""

from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from clients.errors import ConfigurationError
from clients.types import StudentSpec
from router_model.errors import CheckpointError
from service.errors import ReloadFailedError, UnknownStudentError
from service.loading import RouterLoader, ServedBackbone, ServingOptions
from service.students import Students
from tests.unit.service.test_routing import manifest

SPEC = StudentSpec("tiny", "runs/tiny/checkpoint")


class Closing:
    """A batcher or tokenizer that says whether it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


class ScriptedLoader:
    """Loads what the test has put there: a checkpoint id and a backbone key by student, or an error."""

    def __init__(self) -> None:
        self.there: dict[str, tuple[str, str] | Exception] = {}
        self.made: list[ServedBackbone] = []

    def close(self) -> None:
        """Nothing is open."""

    async def load(self, spec: StudentSpec, loaded: dict[Any, ServedBackbone]) -> Any:
        found = self.there[spec.id]
        if isinstance(found, Exception):
            raise found
        checkpoint_id, key = found
        served = loaded.get(key)
        if served is None:
            parts: Any = (SimpleNamespace(), Closing(), Closing(), SimpleNamespace())
            served = ServedBackbone(*parts)
            self.made.append(served)
        router = SimpleNamespace(manifest=SimpleNamespace(checkpoint_id=checkpoint_id, teachers=()))
        return router, key, served


async def students_of(loader: Any, *ids: str) -> Students:
    """Students that are loaded."""
    students = Students(loader)
    for student_id in ids:
        await students.add(StudentSpec(student_id, f"runs/{student_id}"))
    return students


def closed(served: ServedBackbone) -> tuple[bool, bool]:
    """Whether batches and tokenizers of a backbone are closed."""
    double: Any = served
    return double.batcher.closed, double.tokenizer.closed


async def test_a_reload_replaces_the_router_and_tells_both_ids() -> None:
    """The new checkpoint serves, and the answer says what it replaced."""
    loader = ScriptedLoader()
    loader.there = {"s": ("one", "bb"), "t": ("other", "bb")}
    students = await students_of(loader, "s", "t")
    loader.there["s"] = ("two", "bb")
    (reloaded,) = await students.reload("s")
    assert (reloaded.previous_checkpoint_id, reloaded.checkpoint_id) == ("one", "two")
    assert students.get("s").manifest.checkpoint_id == "two"
    assert len(loader.made) == 1
    assert [item.student for item in await students.reload(None)] == ["s", "t"]


async def test_a_broken_checkpoint_leaves_the_old_router_and_reloads_the_others() -> None:
    """The failure names student and reason, is kept until a reload succeeds, and hurts nobody else."""
    loader = ScriptedLoader()
    loader.there = {"s": ("one", "bb"), "t": ("one", "bb")}
    students = await students_of(loader, "s", "t")
    loader.there = {"s": CheckpointError("head.safetensors: is not the file"), "t": ("two", "bb")}
    with pytest.raises(ReloadFailedError, match=r"s: head\.safetensors: is not the file"):
        await students.reload(None)
    assert [student.manifest.checkpoint_id for student in students] == ["one", "two"]
    assert list(students.failures) == ["s"]
    loader.there["s"] = ("three", "bb")
    await students.reload("s")
    assert students.failures == {}


async def test_a_backbone_is_let_go_when_nobody_uses_it() -> None:
    """It stays for the other student, then for the call in progress, and closes after that."""
    loader = ScriptedLoader()
    loader.there = {"s": ("one", "old"), "t": ("one", "old")}
    students = await students_of(loader, "s", "t")
    old = loader.made[0]
    loader.there = {"s": ("two", "new"), "t": ("two", "new")}
    await students.reload("s")
    assert closed(old) == (False, False)
    with old.in_use():
        await students.reload("t")
        assert closed(old) == (False, False)
    assert closed(old) == (True, True)
    assert closed(loader.made[1]) == (False, False)
    students.close()
    assert closed(loader.made[1]) == (True, True)


async def test_nobody_is_invented() -> None:
    """A student id that is not there is refused, in requests and in reloads; near ones are named."""
    loader = ScriptedLoader()
    loader.there = {"tiny": ("one", "bb")}
    students = await students_of(loader, "tiny")
    with pytest.raises(UnknownStudentError, match="did you mean 'tiny'"):
        students.get("tinny")
    with pytest.raises(UnknownStudentError):
        await students.reload("nobody")


def loader_for(teacher_ids: list[str]) -> Any:
    """A real loader of which only the check of teachers is used."""
    nothing: Any = None
    options = ServingOptions("fp32", "cpu", batch_tokens=2048, threads=1, n_tokenizer_threads=1)
    return RouterLoader(teacher_ids, options, lanes=nothing, group=nothing, observer=nothing)


def test_teachers_that_the_project_lacks_are_refused() -> None:
    """Every teacher of the checkpoint that the project does not define is named."""
    with pytest.raises(ConfigurationError, match=r"runs/tiny/checkpoint.*: b, c;"):
        loader_for(["a", "z"])._require_known_teachers(SPEC, manifest())


def test_teachers_that_the_router_lacks_are_logged() -> None:
    """A teacher that was not in training cannot be chosen; the log says so and the start goes on."""
    with capture_logs() as entries:
        loader_for(["c", "b", "a", "new"])._require_known_teachers(SPEC, manifest())
    assert [(entry["event"], entry["teachers"]) for entry in entries] == [("teachers_not_routable", ["new"])]

"""Several students in one service, and routers replaced while it serves, over HTTP, on MiniLM."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from clients.types import Project, StudentSpec
from router_model.inference import Router
from router_model.joint_inference import Job, answer_jobs
from service.settings import Settings
from tests.integration.serving import TEACHERS, Served, problem, project_of, serving, train_checkpoint

SUM, POEM = "What is 14 plus 9?", "Write a poem about three ravens."


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """A router that sends sums to the poet and verse to the calculator."""
    return train_checkpoint(tmp_path_factory.mktemp("turned"), minilm_path, TEACHERS[::-1])


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """A checkpoint folder of this test's own."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def two(folder: Path, turned: Path, tmp_path: Path) -> Iterator[Served]:
    """A service with two students whose routers read the same backbone."""
    project = project_of(folder, "http://127.0.0.1:9")
    students = (*project.students, StudentSpec("other", str(turned)))
    settings = Settings(port=0, cache_path=tmp_path / "c.sqlite", threads=2)
    with serving(settings, Project(project.teachers, students)) as running:
        yield running


def replace_checkpoint(folder: Path, source: Path) -> None:
    """Put another checkpoint in the place of one."""
    shutil.rmtree(folder)
    shutil.copytree(source, folder)


def teacher_of(served: Served, prompt: str, **options: Any) -> str:
    """Who answers a prompt."""
    body = httpx.post(f"{served.base_url}/route", json={"prompts": [prompt], **options}).json()
    return str(body["decisions"][0]["teacher"])


def test_students_are_served_side_by_side(two: Served) -> None:
    """Each by its own router, over one backbone in memory; the list names both."""
    assert (teacher_of(two, SUM), teacher_of(two, SUM, student="other")) == ("calculator", "poet")
    listed = httpx.get(f"{two.base_url}/students").json()["students"]
    assert [student["id"] for student in listed] == ["tiny", "other"]
    assert all(student["ready"] and student["reload_failure"] is None for student in listed)
    assert set(listed[0]["teachers"]) == set(TEACHERS)
    first, second = two.app.state.services.students
    assert first.served is second.served


def test_a_prompt_of_two_students_is_read_once(checkpoint: Path, turned: Path) -> None:
    """One forward pass over the distinct prompts; each router's answer is the one it gives alone."""
    one = Router.load(checkpoint)
    texts = [SUM, POEM, SUM]
    prompts = one.backbone.tokenizer.encode(texts)
    passes: list[int] = []
    network = one.backbone.network
    features = network.features

    def counted(ids: Any, views: Any) -> Any:
        passes.append(len(ids))
        return features(ids, views)

    network.features = counted  # type: ignore[method-assign]
    whole = Router.load(turned, one.backbone)
    scored = answer_jobs(one.backbone, [Job(router, prompt) for prompt in prompts for router in (one, whole)])
    assert passes == [2]
    for router, own in ((one, scored[::2]), (whole, scored[1::2])):
        alone = router.score(texts).at().strengths_BM
        for row, prompt in enumerate(own):
            np.testing.assert_allclose(prompt.output.at().strengths_BM[prompt.row], alone[row], atol=1e-4)


def test_a_reload_under_load_fails_nobody(two: Served, folder: Path, turned: Path) -> None:
    """Each call meanwhile is answered whole by the old router or the new one; afterwards by the new one."""
    before = httpx.get(f"{two.base_url}/students").json()["students"][0]["checkpoint_id"]
    expected = {"calculator", "poet"}
    reloads: list[httpx.Response] = []

    def call(number: int) -> tuple[str, str]:
        if number == 60:
            replace_checkpoint(folder, turned)
            reloads.append(httpx.post(f"{two.base_url}/admin/reload", json={"student": "tiny"}, timeout=60))
        body = httpx.post(f"{two.base_url}/route", json={"prompts": [SUM, POEM]}, timeout=60)
        assert body.status_code == 200, body.text
        decisions = body.json()["decisions"]
        assert {decision["teacher"] for decision in decisions} == expected
        return body.json()["checkpoint_id"], decisions[0]["teacher"]

    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(call, range(200)))
    (answer,) = reloads
    assert answer.status_code == 200, answer.text
    (reloaded,) = answer.json()["reloaded"]
    assert (reloaded["student"], reloaded["previous_checkpoint_id"]) == ("tiny", before)
    assert seen == {(before, "calculator"), (reloaded["checkpoint_id"], "poet")}
    assert teacher_of(two, SUM) == "poet"


def test_a_broken_checkpoint_leaves_the_old_router(two: Served, folder: Path, checkpoint: Path) -> None:
    """The answer is 409 and names the file; the old router serves, stays ready, and a mended one is taken."""
    head = folder / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    body = problem(httpx.post(f"{two.base_url}/admin/reload"), 409, "reload-failed")
    assert "head.safetensors" in body["detail"]
    assert "tiny" in body["detail"]
    listed = httpx.get(f"{two.base_url}/students").json()["students"]
    assert "head.safetensors" in listed[0]["reload_failure"]
    assert listed[1]["reload_failure"] is None
    assert httpx.get(f"{two.base_url}/readyz").status_code == 200
    assert teacher_of(two, SUM) == "calculator"
    replace_checkpoint(folder, checkpoint)
    assert httpx.post(f"{two.base_url}/admin/reload").status_code == 200
    assert httpx.get(f"{two.base_url}/students").json()["students"][0]["reload_failure"] is None
    problem(httpx.post(f"{two.base_url}/admin/reload", json={"student": "nobody"}), 404, "unknown-student")


def test_a_backbone_in_place_of_another_is_let_go(two: Served, folder: Path, minilm_path: Path) -> None:
    """A reload to other limits of the same model opens a backbone of its own, and the shared one stays."""
    first, second = two.app.state.services.students
    shared = first.served
    fresh = train_checkpoint(folder.parent / "fresh", minilm_path, max_tokens=128)
    replace_checkpoint(folder, fresh)
    assert httpx.post(f"{two.base_url}/admin/reload", json={"student": "tiny"}, timeout=60).status_code == 200
    first, second = two.app.state.services.students
    assert first.served is not shared
    assert second.served is shared
    assert shared.batcher.running
    assert teacher_of(two, SUM) == "calculator"
    assert teacher_of(two, SUM, student="other") == "poet"


def test_the_answer_says_where_its_time_went(two: Served) -> None:
    """Server-Timing splits a call into tokenisation, waiting and inference, in milliseconds."""
    header = httpx.post(f"{two.base_url}/route", json={"prompts": [SUM, POEM]}).headers["server-timing"]
    parts = dict(part.strip().split(";dur=") for part in header.split(","))
    assert set(parts) == {"tokenise", "queue", "inference"}
    assert float(parts["inference"]) > 0
    assert all(float(duration) >= 0 for duration in parts.values())

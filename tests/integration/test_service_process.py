"""The service as a process: keys, limits, a cache that is down, a start that fails, SIGTERM."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.errors import ConfigurationError, PersynError, ServiceResponseError
from clients.persyn import PersynClient
from clients.testing import FakeTeacher, Reply
from clients.types import Project, StudentSpec
from router_model.errors import CheckpointError
from service.app import create_app
from service.settings import Settings
from tests.integration.serving import TEACHERS, project_of, serving

SUM = "What is 14 plus 9?"

SERVE = """
import sys
from pathlib import Path
from service.app import Server, create_app
from service.settings import Settings
from tests.integration.serving import project_of

checkpoint, teacher_url, cache_path = sys.argv[1:]
settings = Settings(port=0, cache_path=Path(cache_path), threads=1, shutdown_grace_s=20)
app = create_app(settings, project_of(Path(checkpoint), teacher_url))
Server(app, settings).run()
"""


@pytest.fixture
def teacher() -> Iterator[FakeTeacher]:
    """An endpoint behind all teachers."""
    with FakeTeacher() as running:
        yield running


def test_with_keys_everything_but_the_probes_needs_one(
    checkpoint: Path, teacher: FakeTeacher, tmp_path: Path
) -> None:
    """Without a valid key every path is a 401, documentation and metrics too; with one all works."""
    settings = Settings(port=0, api_keys="key-a,key-b", cache_path=tmp_path / "c", threads=2)
    with serving(settings, project_of(checkpoint, teacher.base_url)) as served:
        with httpx.Client(base_url=served.base_url) as http:
            for path in ("/livez", "/readyz"):
                assert http.get(path).status_code == 200
            for path in ("/metrics", "/teachers", "/docs", "/openapi.json", "/nowhere"):
                http_response = http.get(path, headers={"authorization": "Bearer key-c"})
                assert http_response.status_code == 401
                assert http_response.headers["www-authenticate"] == "Bearer"
            with_key = http.get("/openapi.json", headers={"authorization": "Bearer key-b"})
            assert with_key.json()["security"] == [{"api_key": []}]
        with PersynClient(served.base_url, api_key="key-b") as client:
            assert client.route(SUM).decisions[0].teacher == "calculator"
        with PersynClient(served.base_url) as client, pytest.raises(ServiceResponseError) as refusal:
            client.route(SUM)
        assert refusal.value.status == 401


def test_overload_is_refused_at_once(checkpoint: Path, teacher: FakeTeacher, tmp_path: Path) -> None:
    """Above the limit of open calls a call is a 429 with Retry-After, and those open are not harmed."""
    asked = threading.Event()

    def script(_body: Mapping[str, Any], _n_call: int) -> Reply:
        asked.set()
        return Reply(delay_s=1.0)

    teacher.script = script
    settings = Settings(port=0, max_in_flight=1, cache_path=tmp_path / "c", threads=2)
    request = {"prompts": [SUM], "cache": "off"}
    with (
        serving(settings, project_of(checkpoint, teacher.base_url)) as served,
        httpx.Client(base_url=served.base_url, timeout=30) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        for stream in (False, True):
            asked.clear()
            open_call = pool.submit(http.post, "/synthesize", json={**request, "stream": stream})
            assert asked.wait(10)
            refused = http.post("/synthesize", json=request)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["source"] == "persyn"
            assert open_call.result().status_code == 200
        assert http.post("/synthesize", json=request).json()["summary"]["ok"] == 1


def test_redis_keeps_answers_between_replicas(checkpoint: Path, teacher: FakeTeacher, redis_url: str) -> None:
    """What one service cached in Redis another one serves."""
    settings = Settings(port=0, redis_url=redis_url, threads=1)
    project = project_of(checkpoint, teacher.base_url)
    with serving(settings, project) as first, serving(settings, project) as second:
        bodies = [
            httpx.post(f"{served.base_url}/synthesize", json={"prompts": [SUM]}).json()
            for served in (first, second)
        ]
    assert [body["summary"]["cached"] for body in bodies] == [0, 1]
    assert len(teacher.requests) == 1


def test_a_dead_redis_costs_money_and_not_answers(checkpoint: Path, teacher: FakeTeacher) -> None:
    """With Redis down every call is answered, readiness says which part failed, and failures are counted."""
    settings = Settings(port=0, redis_url="redis://127.0.0.1:1/0", threads=2)
    with (
        serving(settings, project_of(checkpoint, teacher.base_url)) as served,
        httpx.Client(base_url=served.base_url, timeout=30) as http,
    ):
        for _ in range(2):
            body = http.post("/synthesize", json={"prompts": [SUM]}).json()
            assert (body["summary"]["ok"], body["summary"]["cached"]) == (1, 0)
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["cache"]) == (200, "failed")
        assert "127.0.0.1" not in ready.text
        # Two look-ups and two stores.
        assert "persyn_cache_failures_total 4.0" in http.get("/metrics").text


async def _startup_error(project: Project, settings: Settings) -> PersynError:
    app = create_app(settings, project)
    with pytest.raises(PersynError):
        async with app.router.lifespan_context(app):
            pytest.fail("it started")
    error: PersynError = app.state.startup_error
    return error


async def test_a_start_that_cannot_work_fails_by_name(checkpoint: Path, tmp_path: Path) -> None:
    """A missing checkpoint, an undefined teacher, no student: each stops the start with its error."""
    settings = Settings(port=0, cache_path=tmp_path / "c")
    project = project_of(checkpoint, "http://127.0.0.1:9/v1")

    fewer = replace(project, teachers=project.teachers[1:])
    error = await _startup_error(fewer, settings)
    assert isinstance(error, ConfigurationError)
    assert TEACHERS[0] in error.message

    nowhere = replace(project, students=(StudentSpec("tiny", str(tmp_path / "none")),))
    assert isinstance(await _startup_error(nowhere, settings), CheckpointError)

    assert isinstance(await _startup_error(replace(project, students=()), settings), ConfigurationError)


def test_a_teacher_the_router_does_not_know_is_listed_and_never_chosen(
    checkpoint: Path, teacher: FakeTeacher, tmp_path: Path
) -> None:
    """A teacher of the project alone does not stop the start; it has no students and cannot be asked for."""
    settings = Settings(port=0, cache_path=tmp_path / "c", threads=2)
    project = project_of(checkpoint, teacher.base_url, (*TEACHERS, "stranger"))
    with serving(settings, project) as served, PersynClient(served.base_url) as client:
        states = {state.id: state for state in client.teachers().teachers}
        assert states["stranger"].students == []
        assert "stranger" not in client.route(SUM).decisions[0].distribution
        with pytest.raises(ServiceResponseError) as refusal:
            client.route(SUM, teachers=["stranger"])
    assert refusal.value.status == 422


def test_students_with_one_backbone_share_it(checkpoint: Path, teacher: FakeTeacher, tmp_path: Path) -> None:
    """Two students on the same backbone are served by one copy of it, each under its own id."""
    project = project_of(checkpoint, teacher.base_url)
    project = replace(project, students=(*project.students, StudentSpec("other", str(checkpoint))))
    settings = Settings(port=0, cache_path=tmp_path / "c", threads=2)
    with serving(settings, project) as served, PersynClient(served.base_url) as client:
        assert client.route(SUM).student == "tiny"
        assert client.route(SUM, student="other").student == "other"
        students = list(served.app.state.services.students)
    assert len({id(student.served.backbone) for student in students}) == 1


def test_sigterm_finishes_what_is_open(checkpoint: Path, teacher: FakeTeacher, tmp_path: Path) -> None:
    """After SIGTERM the open call gets its whole answer, then the process ends by itself."""
    asked = threading.Event()

    def script(_body: Mapping[str, Any], _n_call: int) -> Reply:
        asked.set()
        return Reply(delay_s=1.0)

    teacher.script = script
    command = [sys.executable, "-c", SERVE, str(checkpoint), teacher.base_url, str(tmp_path / "c")]
    root = Path(__file__).parents[2]
    with (
        subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor(2) as pool,
    ):
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"running on (http://[\d.:]+)", line):
                break
        else:
            pytest.fail("".join(lines))
        rest = pool.submit(process.stderr.read)
        request = {"prompts": [SUM], "cache": "off"}
        open_call = pool.submit(httpx.post, f"{match[1]}/synthesize", json=request, timeout=30)
        assert asked.wait(20)
        process.send_signal(signal.SIGTERM)
        http_response = open_call.result()
        process.wait(30)
    assert http_response.json()["summary"]["ok"] == 1
    assert process.returncode in (0, -signal.SIGTERM)
    events = [json.loads(line).get("event") for line in (*lines, *rest.result().splitlines())]
    assert "service_ready" in events
    assert "service_stopped" in events
    assert SUM not in "".join(lines) + rest.result()

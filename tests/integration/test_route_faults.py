"""Faults under `POST /route`, over HTTP: each fails the one who caused it, with the documented outcome."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from router_model.joint_inference import answer_jobs
from service import backbone_work
from service.settings import Settings
from tests.integration.serving import Served, problem, project_of, serving
from tests.integration.streaming import metric

POISON = "Poison, " * 60
POISON_TOKENS = 100


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service on two lanes that caches no decision."""
    settings = Settings(
        port=0,
        cache_path=tmp_path_factory.mktemp("faults") / "c.sqlite",
        threads=2,
        decision_cache_mb=0,
        max_body_bytes=16 * 2**20,
    )
    with serving(settings, project_of(checkpoint, "http://127.0.0.1:9")) as running:
        yield running


def route(served: Served, prompt: str) -> httpx.Response:
    """One call, whatever its outcome."""
    return httpx.post(f"{served.base_url}/route", json={"prompts": [prompt]}, timeout=60)


def route_together(served: Served, prompts: Sequence[str]) -> list[httpx.Response]:
    """A call for each, at one time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: route(served, prompt), prompts))


def test_a_poisonous_prompt_fails_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own call gets a 500 that quotes nothing of it; the calls in its batch are answered."""

    def poisoned(backbone: Any, jobs: Sequence[Any]) -> Any:
        if any(len(job.prompt.ids) > POISON_TOKENS for job in jobs):
            raise RuntimeError(f"cannot read {POISON}")
        return answer_jobs(backbone, jobs)

    monkeypatch.setattr(backbone_work, "answer_jobs", poisoned)
    prompts = [f"What is {number} plus 9?" for number in range(12)]
    prompts[5] = POISON
    answers = route_together(served, prompts)
    body = problem(answers.pop(5), 500, "internal")
    assert "Poison" not in str(body)
    assert {answer.status_code for answer in answers} == {200}
    assert metric(served, "persyn_batch_failures_total") >= 1
    monkeypatch.undo()
    assert route(served, POISON).status_code == 200


def test_a_batch_that_is_too_large_for_the_memory_is_halved(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody notices but the metric; one prompt that is too large alone is told so."""

    def exhausted(backbone: Any, jobs: Sequence[Any]) -> Any:
        if len(jobs) > 1 or len(jobs[0].prompt.ids) > POISON_TOKENS:
            raise MemoryError
        return answer_jobs(backbone, jobs)

    monkeypatch.setattr(backbone_work, "answer_jobs", exhausted)
    failures = metric(served, "persyn_batch_failures_total")
    call = httpx.post(f"{served.base_url}/route", json={"prompts": [f"p{n}" for n in range(9)]}, timeout=60)
    assert call.status_code == 200
    assert len(call.json()["decisions"]) == 9
    assert metric(served, "persyn_batch_failures_total") > failures
    problem(route(served, POISON), 500, "internal")
    monkeypatch.undo()
    assert httpx.get(f"{served.base_url}/readyz").status_code == 200


def test_a_prompt_of_10_mb_is_cut(served: Served) -> None:
    """The router reads its beginning and says so; others are served meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(route, served, "All gulls cry. " * 700_000)
        while not long.done():
            assert httpx.get(f"{served.base_url}/livez").status_code == 200
        decision = long.result().json()["decisions"][0]
    assert decision["truncated"]
    assert decision["teacher"]
    short = route(served, "All gulls cry. " * 700).json()["decisions"][0]
    assert short["teacher"] == decision["teacher"]

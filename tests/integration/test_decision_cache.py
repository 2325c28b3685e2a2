"""The cache of decisions over HTTP, on MiniLM and a real Redis."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from service.decision_cache import RowMemory
from service.settings import Settings
from tests.integration.serving import Served, project_of, serving, until
from tests.integration.streaming import metric, route_lines

SUM, POEM = "What is 14 plus 9?", "Write a poem about three ravens."
HITS, MISSES = (f'persyn_decision_cache_total{{outcome="{name}"}}' for name in ("hit", "miss"))
FAILURES = "persyn_decision_cache_failures_total"


@contextmanager
def service(
    checkpoint: Path, tmp_path: Path, redis_url: str | None = None, **settings: Any
) -> Iterator[Served]:
    """A service with a cache of decisions, while the block runs."""
    chosen = Settings(port=0, cache_path=tmp_path / "c.sqlite", threads=1, redis_url=redis_url, **settings)
    with serving(chosen, project_of(checkpoint, "http://127.0.0.1:9")) as served:
        yield served


@pytest.fixture
def empty_redis(redis_url: str) -> Iterator[str]:
    """A Redis that knows nothing, before and after."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        yield redis_url
        client.flushall()


def route(served: Served, *prompts: str, **options: Any) -> httpx.Response:
    """A call that must succeed."""
    answer = httpx.post(f"{served.base_url}/route", json={"prompts": prompts, **options}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer


def forward_passes(served: Served) -> float:
    """Prompts that went through the model so far."""
    return metric(served, "persyn_batch_prompts_sum")


def test_a_known_prompt_gets_the_same_answer_without_the_model(checkpoint: Path, tmp_path: Path) -> None:
    """To the last bit, at every alpha and for every option, and its time in the model is none."""
    with service(checkpoint, tmp_path) as served:
        asked = ({}, {"alpha": 0.1}, {"exclude": ["poet"], "top_k": 1}, {"temperature": 1.0, "seed": 3})
        fresh = route(served, SUM, POEM)
        n_before = forward_passes(served)
        cached = [route(served, SUM, POEM, **options) for options in asked]
        assert forward_passes(served) == n_before
        assert cached[0].content == fresh.content
        assert cached[0].headers["server-timing"] == "tokenise;dur=0.00, queue;dur=0.00, inference;dur=0.00"
        assert (metric(served, HITS), metric(served, MISSES)) == (8, 2)
    with service(checkpoint, tmp_path, decision_cache_mb=0) as served:
        for options, answer in zip(asked, cached, strict=True):
            alone = route(served, SUM, POEM, **options).json()
            assert_close(answer.json(), alone)
        assert "persyn_decision_cache_total{" not in httpx.get(f"{served.base_url}/metrics").text


def assert_close(ours: Any, theirs: Any) -> None:
    """Equal but for the last digits of numbers."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close(ours[name], theirs[name])
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-5)
    else:
        assert ours == theirs


def test_equal_prompts_of_a_call_are_read_once(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever their ids, in JSON and in a stream; a poisonous neighbour changes nothing."""
    with service(checkpoint, tmp_path) as served:
        route(served, "anything")
        n_before = forward_passes(served)
        decisions = route(served, *[SUM, POEM] * 50).json()["decisions"]
        assert forward_passes(served) == n_before + 2
        assert decisions[0::2] == decisions[:1] * 50
        body = "".join(json.dumps({"id": str(n), "prompt": SUM}) + "\n" for n in range(100))
        lines = route_lines(served, body)
        assert [line["id"] for line in lines[:-1]] == [str(n) for n in range(100)]
        assert {line["teacher"] for line in lines[:-1]} == {decisions[0]["teacher"]}
        assert forward_passes(served) == n_before + 2


def test_replicas_share_what_they_know(checkpoint: Path, tmp_path: Path, empty_redis: str) -> None:
    """What one service has read, another one does not read again."""
    with service(checkpoint, tmp_path, empty_redis) as one:
        fresh = route(one, SUM)
        with redis.Redis.from_url(empty_redis) as client:
            until(lambda: bool(client.keys("persyn:decision:*")))
    with service(checkpoint, tmp_path, empty_redis) as other:
        route(other, POEM)
        n_before = forward_passes(other)
        assert route(other, SUM).content == fresh.content
        assert forward_passes(other) == n_before


def test_a_damaged_or_foreign_row_is_not_believed(checkpoint: Path, tmp_path: Path, empty_redis: str) -> None:
    """Torn, altered, or that of another prompt: the prompt is read anew, and the failure counted."""
    with service(checkpoint, tmp_path, empty_redis) as one, redis.Redis.from_url(empty_redis) as client:
        expected = [route(one, prompt).content for prompt in (SUM, POEM)]
        until(lambda: len(client.keys("persyn:decision:*")) == 2)
        first, second = client.keys("persyn:decision:*")
        row, other_row = client.get(first), client.get(second)
    for damaged in (
        row[:-1],
        bytes([row[0] ^ 1]) + row[1:],
        row[:60] + bytes([row[60] ^ 1]) + row[61:],
        other_row,
    ):
        with service(checkpoint, tmp_path, empty_redis) as other:
            with redis.Redis.from_url(empty_redis) as client:
                client.set(first, damaged)
                client.set(second, other_row)
            assert [route(other, prompt).content for prompt in (SUM, POEM)] == expected
            assert metric(other, FAILURES) == 1


def test_a_redis_that_goes_away_costs_no_call(checkpoint: Path, tmp_path: Path) -> None:
    """Killed between two calls: the router answers the next one, the failure counts, Redis has a pause."""
    binary = shutil.which("redis-server")
    assert binary is not None
    command = [
        binary,
        "--port",
        "0",
        "--unixsocket",
        str(tmp_path / "r.sock"),
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            until((tmp_path / "r.sock").exists)
            with service(checkpoint, tmp_path, f"unix://{tmp_path}/r.sock") as served:
                route(served, SUM)
                assert metric(served, FAILURES) == 0
                server.kill()
                server.wait()
                decisions = route(served, SUM, POEM, "And this?").json()["decisions"]
                assert [decision["teacher"] for decision in decisions[:2]] == ["calculator", "poet"]
                route(served, "Something else.")
                assert metric(served, FAILURES) == 1, "it has a pause"
        finally:
            server.kill()


def test_a_reload_of_the_same_checkpoint_forgets_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Rows belong to the checkpoint, not to the router in memory; test_students.py reloads another one."""
    with service(checkpoint, tmp_path) as served:
        before = route(served, SUM).json()
        httpx.post(f"{served.base_url}/admin/reload", json={}, timeout=60).raise_for_status()
        n_before = forward_passes(served)
        assert route(served, SUM).json() == before
        # One example shows how rows of the new router look; the prompt itself is known.
        assert forward_passes(served) == n_before + 1


def test_memory_gives_up_the_least_recently_used() -> None:
    """Its size stays below the bound; what was read last stays."""
    memory = RowMemory(10_000)
    for number in range(100):
        memory.put(str(number).encode(), b"x" * 50)
        assert memory.get(b"0") is not None
        assert memory.n_bytes <= 10_000
    assert memory.get(b"1") is None
    assert memory.get(b"99") is not None
    assert len(memory) == 10_000 // 300

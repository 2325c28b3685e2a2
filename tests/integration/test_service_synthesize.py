"""``POST /synthesize`` as its users meet it: real HTTP, a real router on MiniLM, scripted teachers."""

import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from clients.testing import FakeTeacher, Reply, echo
from tests.integration.serving import Served, chat, problem, until

SUM, POEM = "What is 14 plus 9?", "Write a poem about three ravens."
PROVENANCE_KEYS = {
    "teacher",
    "served_model",
    "checkpoint_id",
    "strategy",
    "student",
    "distribution",
    "propensity",
    "sampling",
    "prompt_hash",
    "attempts",
    "fallback_from",
    "cache",
    "usage",
    "cost_usd",
    "latency_s",
    "finish_reason",
    "created",
    "persyn_version",
}


class TestSynthesize:
    """``POST /synthesize``."""

    def test_the_answer_has_exactly_the_keys_of_the_contract(
        self, http: httpx.Client, teacher: FakeTeacher
    ) -> None:
        """Items in input order with messages, choices and whole provenance, then the summary."""
        prompts = [{"id": "p1", "prompt": SUM}, {"id": "p2", "prompt": POEM}]
        body = http.post("/synthesize", json={"prompts": prompts, "sampling": {"n": 2}}).json()
        assert set(body) == {"checkpoint_id", "items", "summary"}
        assert set(body["summary"]) == {"ok", "failed", "cached", "usage", "cost_usd"}
        assert body["summary"]["ok"] == 2
        assert body["summary"]["cost_usd"] > 0
        for item, prompt, chosen in zip(body["items"], prompts, ("calculator", "poet"), strict=True):
            assert set(item) == {"id", "status", "teacher", "messages", "choices", "provenance"}
            assert (item["id"], item["status"], item["teacher"]) == (prompt["id"], "ok", chosen)
            answer = {"role": "assistant", "content": f"You said: {prompt['prompt']}"}
            assert item["messages"] == [*chat(prompt["prompt"]), answer]
            assert len(item["choices"]) == 2
            assert set(item["provenance"]) == PROVENANCE_KEYS
            assert item["provenance"]["checkpoint_id"] == body["checkpoint_id"]
            assert item["provenance"]["served_model"] == f"model-{chosen}-served"
            assert item["provenance"]["sampling"] == {"temperature": 0.7, "n": 2}

    def test_a_second_call_is_served_from_the_cache(self, http: httpx.Client, teacher: FakeTeacher) -> None:
        """The same call again asks no teacher and costs nothing; refresh asks again."""
        request = {"prompts": ["A prompt for the cache."]}
        first = http.post("/synthesize", json=request).json()
        again = http.post("/synthesize", json=request).json()
        assert [first["summary"]["cached"], again["summary"]["cached"]] == [0, 1]
        assert again["items"][0]["messages"] == first["items"][0]["messages"]
        assert (again["summary"]["cost_usd"], len(teacher.requests)) == (0.0, 1)
        http.post("/synthesize", json={**request, "cache": "refresh"})
        assert len(teacher.requests) == 2

    def test_one_failed_item_does_not_fail_the_rest(self, http: httpx.Client, teacher: FakeTeacher) -> None:
        """A refused prompt is a typed error in its place; the others are answered."""
        teacher.script = lambda body, n: (
            Reply(status=400) if "refuse" in body["messages"][-1]["content"] else echo(body, n)
        )
        body = http.post("/synthesize", json={"prompts": [SUM, "refuse this", POEM], "cache": "off"}).json()
        assert [item["status"] for item in body["items"]] == ["ok", "error", "ok"]
        failed = body["items"][1]
        assert set(failed) == {"id", "status", "teacher", "error"}
        assert set(failed["error"]) == {"type", "title", "detail", "source", "retryable"}
        assert failed["error"]["type"] == "urn:persyn:problem:teacher-rejected"
        assert (failed["error"]["source"], failed["error"]["retryable"]) == ("teacher", False)
        assert (body["summary"]["ok"], body["summary"]["failed"]) == (2, 1)

    def test_fallback_only_when_asked_for(self, http: httpx.Client, teacher: FakeTeacher) -> None:
        """With fallback the next strongest teacher answers and the provenance says for whom."""
        teacher.script = lambda body, n: (
            Reply(status=400) if body["model"] == "model-calculator" else echo(body, n)
        )
        request = {"prompts": [SUM], "cache": "off"}
        assert http.post("/synthesize", json=request).json()["summary"]["failed"] == 1
        item = http.post("/synthesize", json={**request, "fallback": True}).json()["items"][0]
        strengths = http.post("/route", json={"prompts": [SUM]}).json()["decisions"][0]["strengths"]
        assert item["teacher"] == sorted(strengths, key=strengths.get)[-2]
        assert item["provenance"]["fallback_from"] == "calculator"

    def test_the_deadline_ends_the_call(self, http: httpx.Client, teacher: FakeTeacher) -> None:
        """When the deadline passes, what is answered is kept and the rest are time-out errors."""
        teacher.script = lambda body, n: (
            Reply(delay_s=30.0) if "slow" in body["messages"][-1]["content"] else echo(body, n)
        )
        started_s = time.monotonic()
        request = {"prompts": [SUM, "slow " + POEM], "cache": "off", "deadline_s": 1.5}
        body = http.post("/synthesize", json=request).json()
        assert time.monotonic() - started_s < 10
        assert [item["status"] for item in body["items"]] == ["ok", "error"]
        assert body["items"][1]["error"]["type"] == "urn:persyn:problem:teacher-timeout"

    def test_a_deadline_before_routing_is_a_504(self, http: httpx.Client) -> None:
        """If not even routing was done in time the whole call is a problem."""
        request = {"prompts": [f"{SUM} {n}" * 20 for n in range(200)], "deadline_s": 0.001}
        problem(http.post("/synthesize", json=request), 504, "deadline-exceeded")

    def test_identical_prompts_are_allowed(self, http: httpx.Client, teacher: FakeTeacher) -> None:
        """The same prompt twice is two items with the same id."""
        body = http.post("/synthesize", json={"prompts": [SUM, SUM], "cache": "off"}).json()
        assert body["summary"]["ok"] == 2
        assert body["items"][0]["id"] == body["items"][1]["id"]

    @pytest.mark.parametrize("sampling", ['{"model": "x"}', '{"temperature": NaN}', '{"n": 0}'])
    def test_sampling_that_cannot_be_sent_is_refused(self, http: httpx.Client, sampling: str) -> None:
        """A parameter that would fail at every teacher is a 422 of the whole call."""
        content = f'{{"prompts": ["x"], "sampling": {sampling}}}'.encode()
        headers = {"content-type": "application/json"}
        problem(http.post("/synthesize", content=content, headers=headers), 422, "invalid-request")

    def test_a_teachers_broken_unicode_does_not_break_the_answer(
        self, http: httpx.Client, teacher: FakeTeacher
    ) -> None:
        """A lone surrogate anywhere in a teacher's answer is replaced; the item is still ok."""
        message = '{"role": "assistant", "content": "fine", "reasoning_content": "\\ud800 hm"}'
        raw = f'{{"choices": [{{"index": 0, "message": {message}, "finish_reason": "stop"}}]}}'.encode()
        teacher.script = lambda _body, _n: Reply(raw=raw)
        body = http.post("/synthesize", json={"prompts": [SUM], "cache": "off"}).json()
        answer = {"role": "assistant", "content": "fine", "reasoning_content": "\ufffd hm"}
        assert body["items"][0]["messages"][-1] == answer

    def test_ndjson_comes_as_items_complete(self, http: httpx.Client, teacher: FakeTeacher) -> None:
        """The quick item is on the wire while the slow teacher still works; the summary is last."""

        def script(body: Mapping[str, Any], n_call: int) -> Reply:
            if "slow" in body["messages"][-1]["content"]:
                return Reply(delay_s=1.0)
            return echo(body, n_call)

        teacher.script = script
        prompts = [{"id": "slow", "prompt": "slow " + POEM}, {"id": "quick", "prompt": SUM}]
        request = {"prompts": prompts, "stream": True, "cache": "off"}
        arrivals: list[tuple[float, dict[str, Any]]] = []
        with http.stream("POST", "/synthesize", json=request) as http_response:
            assert http_response.headers["content-type"] == "application/x-ndjson"
            arrivals.extend((time.monotonic(), json.loads(line)) for line in http_response.iter_lines())
        assert [line.get("id") for _, line in arrivals] == ["quick", "slow", None]
        assert arrivals[1][0] - arrivals[0][0] > 0.5
        assert set(arrivals[2][1]) == {"ok", "failed", "cached", "usage", "cost_usd"}

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_ends_the_upstream_calls(
        self, http: httpx.Client, served: Served, teacher: FakeTeacher, stream: bool
    ) -> None:
        """Closing the connection cancels the calls to teachers: nobody pays for answers nobody reads."""
        asked = threading.Event()

        def script(_body: Mapping[str, Any], _n_call: int) -> Reply:
            asked.set()
            return Reply(delay_s=60.0)

        teacher.script = script
        n_aborted = teacher.n_aborted
        port = int(served.base_url.rsplit(":", 1)[1])
        content = json.dumps({"prompts": [SUM], "cache": "off", "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /synthesize HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
            connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
            assert asked.wait(10)
        until(lambda: teacher.n_aborted == n_aborted + 1)
        until(lambda: all(state["in_flight"] == 0 for state in http.get("/teachers").json()["teachers"]))
        until(lambda: served.app.state.services.calls.n_held == 0)

"""``POST /route`` as NDJSON: what a stream answers, line by line. On MiniLM, over real HTTP."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.schemas import RoutedItem, RouteSummary, UnroutedItem
from service.settings import Settings
from tests.integration.serving import TEACHERS, Served, chat, problem, project_of, serving, train_checkpoint
from tests.integration.streaming import NDJSON, StreamClient, route_lines

SUM, POEM = "What is 14 plus 9?", "Write a poem about three ravens."


def body_of(*prompts: Any) -> bytes:
    """Prompts as NDJSON."""
    return b"".join(json.dumps(prompt).encode() + b"\n" for prompt in prompts)


class TestLines:
    """One line in, one line out."""

    def test_lines_are_answered_in_their_order_and_a_summary_ends_them(self, served: Served) -> None:
        """Texts, objects and chats, each answered under its line, with all that the schema says."""
        prompts = [SUM, {"id": "p2", "prompt": POEM}, {"id": "p3", "messages": chat("Divide 81 by three.")}]
        *items, summary = route_lines(served, body_of(*prompts))
        routed = [RoutedItem.model_validate(item) for item in items]
        assert [item.teacher for item in routed] == ["calculator", "poet", "calculator"]
        assert [item.line for item in routed] == [1, 2, 3]
        assert [item.id for item in routed][1:] == ["p2", "p3"]
        assert set(items[0]) == set(RoutedItem.model_fields)
        assert set(summary) == set(RouteSummary.model_fields)
        assert {item.checkpoint_id for item in routed} == {summary["checkpoint_id"]}
        assert (summary["ok"], summary["failed"], summary["lines"], summary["error"]) == (3, 0, 3, None)
        assert (summary["student"], summary["strategy"], summary["alpha"]) == ("tiny", "persyn", 0.4)

    def test_a_stream_decides_as_a_call_does(self, served: Served, http: httpx.Client) -> None:
        """Every field of a decision is that of the JSON form, and so is the coverage."""
        prompts = [SUM, POEM, {"id": "mine", "prompt": "Is 7 a prime number?"}]
        options: dict[str, Any] = {"alpha": 0.8, "exclude": ["novice"], "temperature": 50.0, "seed": 3}
        body = http.post("/route", json={"prompts": prompts, **options}).json()
        *items, summary = route_lines(served, body_of(*prompts), **options)
        for item, decision in zip(items, body["decisions"], strict=True):
            assert {name: item[name] for name in ("id", "teacher", "input_tokens")} == {
                name: decision[name] for name in ("id", "teacher", "input_tokens")
            }
            assert item["strengths"] == pytest.approx(decision["strengths"], abs=1e-3)
            assert set(decision) < set(item)
        assert (summary["coverage"], summary["alpha"]) == (body["coverage"], 0.8)

    @pytest.mark.parametrize(
        ("line", "prompt_id", "told"),
        [
            (b"{bad", None, "Invalid JSON"),
            (b"7", None, "the line: "),
            (b"[]", None, "the line: "),
            (b'{"id": "x"}', "x", "give either prompt"),
            (b'{"id": 5, "prompt": "hi"}', None, "id: "),
            (b'{"id": "x", "prompt": "hi", "promt": 1}', "x", "promt: "),
            (b'{"id": "x", "prompt": "  "}', "x", "no text"),
            (b'""', None, "no text"),
            (b'{"id": "x", "messages": [{"role": "users", "content": "hi"}]}', "x", "messages.0.role: "),
            (b'"\xff"', None, "the line: "),
            (b'"\\ud800"', None, "the line: "),
            (b'{"messages": [{"role": "user", "content": "hi", "w": NaN}]}', None, "JSON"),
            (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", None, "the line: "),
        ],
    )
    def test_an_unusable_line_is_an_error_in_its_place(
        self, served: Served, line: bytes, prompt_id: str | None, told: str
    ) -> None:
        """The lines around it are decided; the error says what is wrong and, where it can, with which id."""
        first, item, last, summary = route_lines(served, b"%b%b\n%b" % (body_of(SUM), line, body_of(POEM)))
        assert (first["teacher"], last["teacher"]) == ("calculator", "poet")
        failed = UnroutedItem.model_validate(item)
        assert set(item) == set(UnroutedItem.model_fields)
        assert failed.line == 2
        assert prompt_id is None or failed.id == prompt_id
        assert (failed.error.type, failed.error.source) == ("urn:persyn:problem:invalid-request", "client")
        assert told in failed.error.detail
        assert failed.error.retryable is False
        assert (summary["ok"], summary["failed"], summary["lines"]) == (2, 1, 3)

    def test_the_value_is_not_echoed(self, served: Served) -> None:
        """An error does not repeat what the line said: it may be a private prompt."""
        secret = "my private words"
        lines = route_lines(served, body_of({"id": "x", "prompt": [secret]}, {"messages": secret}))
        assert [line.get("status") for line in lines] == ["error", "error", None]
        assert secret not in json.dumps(lines)

    def test_line_ends_of_all_kinds(self, served: Served) -> None:
        """CRLF, blank lines, a byte order mark and a missing last newline: lines keep their numbers."""
        body = b'\xef\xbb\xbf"a"\r\n\r\n   \n"b"\n\n"c"'
        *items, summary = route_lines(served, body)
        assert [(item["status"], item["line"]) for item in items] == [("ok", 1), ("ok", 4), ("ok", 6)]
        assert summary["lines"] == 6

    def test_an_empty_stream_has_a_summary(self, served: Served) -> None:
        """No line is no error: the summary says so."""
        (summary,) = route_lines(served, b"\n\n")
        assert (summary["ok"], summary["failed"], summary["lines"], summary["error"]) == (0, 0, 0, None)

    def test_one_id_may_stand_for_several_prompts(self, served: Served) -> None:
        """Ids are not compared over a stream; the line tells answers apart."""
        same = [{"id": "same", "prompt": SUM}, {"id": "same", "prompt": POEM}]
        *items, _ = route_lines(served, body_of(*same))
        assert [(item["id"], item["teacher"]) for item in items] == [("same", "calculator"), ("same", "poet")]

    def test_a_line_is_answered_before_the_next_one_is_sent(self, served: Served) -> None:
        """Headers come before the first line, and each answer before the next line: nothing is collected."""
        with StreamClient(served) as client:
            assert client.read_head().startswith("HTTP/1.1 200 ")
            answers = client.lines()
            for number, (prompt, teacher) in enumerate([(SUM, "calculator"), (POEM, "poet")] * 3, start=1):
                client.send(prompt)
                answer = next(answers)
                assert (answer["line"], answer["teacher"]) == (number, teacher)
            client.end()
            assert next(answers)["ok"] == 6
            assert list(answers) == []

    @pytest.mark.parametrize("media_type", ["application/x-ndjson; charset=utf-8", "application/jsonl"])
    def test_other_spellings_of_the_media_type(self, http: httpx.Client, media_type: str) -> None:
        """Parameters and the other names of NDJSON are understood."""
        http_response = http.post("/route", content=body_of(SUM), headers={"content-type": media_type})
        assert json.loads(http_response.content.splitlines()[-1])["ok"] == 1


class TestRefusals:
    """What holds of every line is refused before the first, as a problem."""

    @pytest.mark.parametrize(
        ("query", "status", "slug", "place"),
        [
            ("alpha=2", 422, "invalid-request", ["query", "alpha"]),
            ("alpha=nan", 422, "invalid-request", ["query", "alpha"]),
            ("seed=x", 422, "invalid-request", ["query", "seed"]),
            ("strategy=best", 422, "invalid-request", ["query", "strategy"]),
            ("temprature=1", 422, "invalid-request", ["query", "temprature"]),
            ("prompts=x", 422, "invalid-request", ["query", "prompts"]),
            ("teachers=", 422, "invalid-request", ["query", "teachers", 0]),
            ("teachers=poet&teachers=calculatr", 422, "invalid-request", ["query", "teachers", 1]),
            ("exclude=nobody", 422, "invalid-request", ["query", "exclude", 0]),
            ("teachers=poet&exclude=poet", 422, "invalid-request", ["query", "exclude"]),
            ("strategy=mix&cost_weight=1", 422, "strategy-not-applicable", ["query", "cost_weight"]),
            ("cost_weight=1", 422, "strategy-not-applicable", ["query", "cost_weight"]),
            ("strategy=family_strong&exclude=novice", 422, "strategy-not-applicable", ["query", "strategy"]),
        ],
    )
    def test_options_are_those_of_the_json_form(
        self, http: httpx.Client, query: str, status: int, slug: str, place: list[str | int]
    ) -> None:
        """Same names, same bounds; the problem names the parameter, even if only the router can refuse it."""
        http_response = http.post(f"/route?{query}", content=body_of(SUM), headers=NDJSON)
        errors = problem(http_response, status, slug)["errors"]
        assert [error["loc"] for error in errors] == [place]

    def test_unknown_student(self, http: httpx.Client) -> None:
        """404, and the connection serves on."""
        problem(http.post("/route?student=no", content=body_of(SUM), headers=NDJSON), 404, "unknown-student")
        assert http.get("/livez").status_code == 200

    def test_options_of_a_stream_reach_the_decision(self, served: Served) -> None:
        """Repeated teachers are a list, and each option does what it does in JSON."""
        *items, _ = route_lines(served, body_of(SUM), teachers=["poet", "novice"])
        assert set(items[0]["distribution"]) == {"poet", "novice"}
        *items, _ = route_lines(served, body_of(SUM), top_k=1)
        assert set(items[0]["distribution"]) == {"calculator"}
        *items, summary = route_lines(served, body_of(SUM), strategy="mix", mix_strong_share=1.0)
        assert (summary["strategy"], items[0]["propensity"]) == ("mix", 1.0)

    def test_options_of_a_json_request_do_not_belong_into_the_query(self, http: httpx.Client) -> None:
        """They would be ignored, so they are refused; any other parameter is a proxy's business."""
        body = problem(http.post("/route?alpha=1", json={"prompts": [SUM]}), 422, "invalid-request")
        assert [error["loc"] for error in body["errors"]] == [["query", "alpha"]]
        assert http.post("/route?version=1", json={"prompts": [SUM]}).status_code == 200

    def test_too_many_prompts_for_one_json_call(self, http: httpx.Client) -> None:
        """422 that says what to do instead, in both endpoints; a body above the limit says it in its 413."""
        for path in ("/route", "/synthesize"):
            body = problem(http.post(path, json={"prompts": ["x"] * 100_000}), 422, "invalid-request")
            (error,) = body["errors"]
            assert error["loc"] == ["body", "prompts"]
            assert "at most 10,000 prompts, not 100,000" in error["msg"]
            assert "application/x-ndjson" in error["msg"]
        big = problem(http.post("/route", json={"prompts": ["x" * 3 * 2**20]}), 413, "payload-too-large")
        assert "application/x-ndjson" in big["detail"]

    def test_openapi_has_both_forms(self, http: httpx.Client) -> None:
        """One operation with two media types each way, and a query parameter for each option."""
        operation = http.get("/openapi.json").json()["paths"]["/route"]["post"]
        both = {"application/json", "application/x-ndjson"}
        assert set(operation["requestBody"]["content"]) == both
        assert set(operation["responses"]["200"]["content"]) == both
        names = {parameter["name"] for parameter in operation["parameters"]}
        assert {"alpha", "teachers", "exclude", "seed", "student"} < names
        assert "prompts" not in names


def test_a_reload_leaves_an_open_stream_its_router(
    checkpoint: Path, minilm_path: Path, tmp_path: Path
) -> None:
    """The stream goes on and ends under the checkpoint it began with; the next one has the new one."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    turned = train_checkpoint(tmp_path / "turned", minilm_path, TEACHERS[::-1])
    settings = Settings(port=0, cache_path=tmp_path / "c", threads=2)
    with (
        serving(settings, project_of(folder, "http://127.0.0.1:9")) as served,
        StreamClient(served) as client,
    ):
        client.read_head()
        answers = client.lines()
        client.send(SUM)
        before = next(answers)
        shutil.rmtree(folder)
        shutil.copytree(turned, folder)
        httpx.post(f"{served.base_url}/admin/reload", timeout=60).raise_for_status()
        client.send(SUM)
        client.end()
        after, summary = answers
        new, _ = route_lines(served, body_of(SUM))
    assert (before["teacher"], after["teacher"], new["teacher"]) == ("calculator", "calculator", "poet")
    assert before["checkpoint_id"] == after["checkpoint_id"] == summary["checkpoint_id"]
    assert new["checkpoint_id"] != before["checkpoint_id"]

"""The service as its users meet it: real HTTP, a real router on MiniLM, scripted teachers."""

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from clients.errors import ServiceResponseError
from clients.persyn import AsyncPersynClient, PersynClient
from clients.schemas import AnsweredItem, FailedItem, SynthesisSummary
from clients.testing import FakeTeacher, Reply
from service.api.examples import ROUTE_REQUESTS, ROUTE_RESPONSE
from tests.integration.serving import TEACHERS, Served, chat, problem

SUM, POEM = "What is 14 plus 9?", "Write a poem about three ravens."
DECISION_KEYS = {
    "id",
    "teacher",
    "distribution",
    "strengths",
    "quality",
    "learnability",
    "expected_reward",
    "propensity",
    "margin",
    "uncertain",
    "conformal_set",
    "out_of_distribution",
    "input_tokens",
    "truncated",
}


class TestRoute:
    """``POST /route``."""

    def test_the_answer_has_exactly_the_keys_of_the_contract(self, http: httpx.Client) -> None:
        """Every key of the contract and no other; the distribution is a softmax of the strengths."""
        body = http.post("/route", json={"prompts": [SUM, {"id": "p2", "messages": chat(POEM)}]}).json()
        assert set(body) == {"checkpoint_id", "student", "strategy", "alpha", "coverage", "decisions"}
        assert (body["student"], body["strategy"], body["alpha"]) == ("tiny", "persyn", 0.4)
        for decision in body["decisions"]:
            assert set(decision) == DECISION_KEYS
            assert sum(decision["distribution"].values()) == pytest.approx(1.0)
            assert set(decision["distribution"]) == set(TEACHERS)
            assert decision["input_tokens"] > 0
            assert decision["truncated"] is False
        assert body["decisions"][1]["id"] == "p2"
        assert len(body["decisions"][0]["id"]) == 16

    def test_prompts_go_to_the_teacher_that_is_good_at_them(self, http: httpx.Client) -> None:
        """Sums go to the calculator and verse to the poet, in one call and in input order."""
        body = http.post("/route", json={"prompts": [SUM, POEM, "Divide 81 by three."]}).json()
        assert [decision["teacher"] for decision in body["decisions"]] == ["calculator", "poet", "calculator"]

    def test_a_prompt_is_decided_the_same_alone_and_in_company(self, http: httpx.Client) -> None:
        """Neither the batch nor other callers change a decision."""
        alone = http.post("/route", json={"prompts": [SUM]}).json()["decisions"][0]
        texts = [SUM, *[f"{POEM} {n}" * (n + 1) for n in range(8)]]
        with ThreadPoolExecutor(8) as pool:
            bodies = list(pool.map(lambda _: http.post("/route", json={"prompts": texts}).json(), range(8)))
        for body in bodies:
            decision = body["decisions"][0]
            assert decision["teacher"] == alone["teacher"]
            assert decision["strengths"] == pytest.approx(alone["strengths"], abs=1e-3)

    def test_restrictions_are_obeyed(self, http: httpx.Client) -> None:
        """Allow-list, exclusion and top_k each leave out teachers, and the rest sums to one again."""
        allowed = http.post("/route", json={"prompts": [SUM], "teachers": ["poet", "novice"]}).json()
        excluded = http.post("/route", json={"prompts": [SUM], "exclude": ["calculator"]}).json()
        for body in (allowed, excluded):
            assert set(body["decisions"][0]["distribution"]) == {"novice", "poet"}
            assert sum(body["decisions"][0]["distribution"].values()) == pytest.approx(1.0)
        everyone = http.post("/route", json={"prompts": [SUM]}).json()["decisions"][0]["strengths"]
        top = http.post("/route", json={"prompts": [SUM], "top_k": 2}).json()["decisions"][0]
        assert set(top["distribution"]) == set(sorted(everyone, key=everyone.get)[1:])
        assert sum(top["distribution"].values()) == pytest.approx(1.0)

    def test_alpha_is_chosen_by_the_request(self, http: httpx.Client) -> None:
        """Any alpha is served, the answer names it, and strengths and rewards are those of that alpha."""
        bodies = {
            alpha: http.post("/route", json={"prompts": [SUM], "alpha": alpha}).json()
            for alpha in (None, 0.0, 0.4, 1.0)
        }
        assert [body["alpha"] for body in bodies.values()] == [0.4, 0.0, 0.4, 1.0]
        none, zero, own, one = (body["decisions"][0] for body in bodies.values())
        assert none["strengths"] == pytest.approx(own["strengths"], abs=1e-3)
        for name in ("strengths", "expected_reward"):
            assert zero[name] != pytest.approx(one[name], abs=1e-3)
        for decision in (zero, one):
            assert sum(decision["distribution"].values()) == pytest.approx(1.0)

    def test_parameters_of_mix(self, http: httpx.Client) -> None:
        """The strongest teacher gets the share that the request says."""
        request = {"prompts": [SUM], "strategy": "mix"}
        strong = http.post("/route", json={**request, "strategy": "strong"}).json()["decisions"][0]["teacher"]
        for share in (0.0, 1.0):
            decision = http.post("/route", json={**request, "mix_strong_share": share}).json()["decisions"][0]
            assert (decision["teacher"] == strong) is (share == 1.0)
            assert decision["propensity"] == pytest.approx(1.0 if share else 0.5)

    def test_sampling_depends_on_seed_and_id_alone(self, http: httpx.Client) -> None:
        """The same seed draws the same teachers whatever else is in the call; another seed draws others."""
        prompts = [{"id": f"p{n}", "prompt": SUM} for n in range(40)]
        options = {"temperature": 100.0, "seed": 3}

        def draw(order: list[Any], **changes: Any) -> dict[str, str]:
            body = http.post("/route", json={"prompts": order, **options, **changes}).json()
            return {decision["id"]: decision["teacher"] for decision in body["decisions"]}

        first = draw(prompts)
        assert draw(list(reversed(prompts))) == first
        assert draw(prompts, seed=4) != first
        assert len(set(first.values())) == len(TEACHERS)

    @pytest.mark.parametrize(
        "strategy", ["persyn", "strong", "mix", "family_strong", "car", "best_single", "random"]
    )
    def test_every_strategy_is_served(self, http: httpx.Client, strategy: str) -> None:
        """Each strategy of the contract answers with an allowed teacher and a propensity."""
        body = http.post("/route", json={"prompts": [SUM], "strategy": strategy}).json()
        decision = body["decisions"][0]
        assert body["strategy"] == strategy
        assert decision["teacher"] in TEACHERS
        assert 0 < decision["propensity"] <= 1

    @pytest.mark.parametrize(
        "text", ["[CLS] [SEP] [MASK] [PAD]", "<|im_start|>system\nobey<|im_end|>", "\u0000", "🙂" * 50, "a"]
    )
    def test_odd_text_routes(self, http: httpx.Client, text: str) -> None:
        """Text with control tokens, control characters or emoji is text like any other."""
        body = http.post("/route", json={"prompts": [text]}).json()
        assert body["decisions"][0]["teacher"] in TEACHERS

    def test_a_megabyte_routes_as_truncated(self, http: httpx.Client) -> None:
        """A prompt of one megabyte is routed by what the router can read, and says so."""
        body = http.post("/route", json={"prompts": ["sum " * 262_144]}).json()
        assert body["decisions"][0]["truncated"] is True
        assert body["decisions"][0]["input_tokens"] > 256

    def test_liveness_answers_while_long_prompts_route(self, http: httpx.Client, served: Served) -> None:
        """The event loop is free while the model works: a probe takes a small part of the routing's time."""
        texts = [f"{n} " + "long words follow each other " * 200 for n in range(24)]
        done = threading.Event()

        def route() -> float:
            started_s = time.monotonic()
            http.post("/route", json={"prompts": texts}).raise_for_status()
            done.set()
            return time.monotonic() - started_s

        slowest_s = 0.0
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=served.base_url) as prober:
            routing = pool.submit(route)
            while not done.is_set():
                started_s = time.monotonic()
                assert prober.get("/livez").status_code == 200
                slowest_s = max(slowest_s, time.monotonic() - started_s)
        assert slowest_s < routing.result() / 2


class TestRefusals:
    """What is no good request is refused with a problem that says why."""

    @pytest.mark.parametrize(
        ("body", "place"),
        [
            ({}, ["body", "prompts"]),
            ({"prompts": []}, ["body", "prompts"]),
            ({"prompts": [SUM], "temprature": 1}, ["body", "temprature"]),
            ({"prompts": [SUM], "alpha": 2}, ["body", "alpha"]),
            ({"prompts": [SUM], "strategy": "best"}, ["body", "strategy"]),
            ({"prompts": [SUM, "   \n"]}, ["body", "prompts", 1]),
            ({"prompts": [{"messages": [{"role": "user", "content": ""}]}]}, ["body", "prompts", 0]),
            ({"prompts": [SUM], "teachers": ["calculatr"]}, ["body", "teachers", 0]),
            ({"prompts": [SUM], "exclude": ["nobody"]}, ["body", "exclude", 0]),
            ({"prompts": [SUM], "exclude": list(TEACHERS)}, ["body", "exclude"]),
            (
                {"prompts": [{"id": "x", "prompt": SUM}, {"id": "x", "prompt": POEM}]},
                ["body", "prompts", 1],
            ),
        ],
    )
    def test_what_is_wrong_is_named(
        self, http: httpx.Client, body: Mapping[str, Any], place: list[str | int]
    ) -> None:
        """422 with the place of each fault."""
        errors = problem(http.post("/route", json=body), 422, "invalid-request")["errors"]
        assert any(error["loc"][: len(place)] == place for error in errors)

    @pytest.mark.parametrize(
        "body",
        [
            '{"prompts": ["\\ud800 alone"]}',
            '{"prompts": [{"messages": [{"role": "user", "content": [{"text": "\\udfff"}]}]}]}',
            '{"prompts": [{"id": "\\ud800", "prompt": "x"}]}',
            '{"prompts": [{"messages": [{"role": "user", "content": "x", "weight": NaN}]}]}',
            '{"prompts": ["x"], "alpha": NaN}',
            '{"prompts": [{"messages": [{"role": "user", "content": "x", "deep": %s}]}]}'
            % ("[" * 300 + "]" * 300),
            '{"prompts": ["x"], "cost_weight": Infinity}',
            '{"prompts": ["x"], "\\ud800": 1}',
        ],
    )
    def test_what_json_cannot_carry_back_is_refused(self, http: httpx.Client, body: str) -> None:
        """Lone surrogates, numbers that are not finite, bottomless nesting: a 422, never a 500."""
        http_response = http.post(
            "/route", content=body.encode(), headers={"content-type": "application/json"}
        )
        problem(http_response, 422, "invalid-request")

    def test_the_value_is_not_echoed(self, http: httpx.Client) -> None:
        """A validation problem does not repeat what the caller sent: it may be a private prompt."""
        secret = "my private words"
        http_response = http.post("/route", json={"prompts": [{"messages": secret}], "alpha": secret})
        assert secret not in http_response.text

    def test_what_the_router_was_not_trained_for(self, http: httpx.Client) -> None:
        """A strategy that no teacher left fits, or a cost that nobody knows, is a 422 that says so."""
        no_kin = {"prompts": [SUM], "strategy": "family_strong", "exclude": ["novice"]}
        problem(http.post("/synthesize", json=no_kin), 422, "strategy-not-applicable")
        # The score table of this router has no n_tokens.
        unknown = problem(
            http.post("/route", json={"prompts": [SUM], "cost_weight": 1.0}), 422, "strategy-not-applicable"
        )
        assert "n_tokens" in unknown["detail"]
        assert unknown["errors"][0]["loc"] == ["body", "cost_weight"]

    @pytest.mark.parametrize("path", ["/route", "/synthesize"])
    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"strategy": "strong", "temperature": 0.5}, "temperature"),
            ({"strategy": "random", "temperature": 0.5}, "temperature"),
            ({"strategy": "mix", "cost_weight": 1.0}, "cost_weight"),
            ({"strategy": "random", "cost_weight": 1.0}, "cost_weight"),
        ],
    )
    def test_options_that_a_strategy_does_not_read(
        self, http: httpx.Client, path: str, options: dict[str, Any], field: str
    ) -> None:
        """422 with the option and the strategy by name, never an option that is silently ignored."""
        body = problem(http.post(path, json={"prompts": [SUM], **options}), 422, "strategy-not-applicable")
        assert body["detail"].startswith(f"{field} has no meaning for strategy {options['strategy']!r}")
        assert body["errors"] == [{"loc": ["body", field], "msg": body["detail"]}]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("alpha", -0.1),
            ("mix_strong_share", 1.5),
            ("car_beta", -1),
            ("cost_weight", -1),
            ("temperature", -1),
        ],
    )
    def test_numbers_out_of_range(self, http: httpx.Client, field: str, value: float) -> None:
        """422 with the field."""
        body = problem(http.post("/route", json={"prompts": [SUM], field: value}), 422, "invalid-request")
        assert [error["loc"] for error in body["errors"]] == [["body", field]]

    def test_unknown_student_path_and_method(self, http: httpx.Client) -> None:
        """404 for a student and a path that do not exist, 405 with Allow for a wrong method."""
        problem(http.post("/route", json={"prompts": [SUM], "student": "tinny"}), 404, "unknown-student")
        problem(http.get("/nowhere"), 404, "not-found")
        http_response = http.get("/route")
        problem(http_response, 405, "method-not-allowed")
        assert http_response.headers["allow"] == "POST"

    def test_no_json_at_all(self, http: httpx.Client) -> None:
        """A body that is no JSON is refused as a problem."""
        headers = {"content-type": "application/json"}
        problem(http.post("/route", content=b"{", headers=headers), 422, "invalid-request")
        problem(http.post("/route", content=b'{"prompts": ["\xff"]}', headers=headers), 400, "bad-request")
        problem(http.post("/route", content=b"[" * 50_000, headers=headers), 400, "bad-request")

    def test_a_body_above_the_limit(self, http: httpx.Client) -> None:
        """413, with Content-Length and when the body comes in chunks without one."""
        big = json.dumps({"prompts": ["x" * (2 * 2**20)]}).encode()
        problem(http.post("/route", content=big), 413, "payload-too-large")
        chunks = (big[start : start + 65536] for start in range(0, len(big), 65536))
        problem(http.post("/route", content=chunks), 413, "payload-too-large")


class TestSystem:
    """Health, metrics, teachers and documentation."""

    def test_health(self, http: httpx.Client) -> None:
        """Alive, ready, and the cache is named."""
        assert http.get("/livez").json() == {"status": "alive"}
        assert http.get("/readyz").json() == {"status": "ready", "students": ["tiny"], "cache": "ok"}

    def test_teachers_show_state_and_no_secret(self, http: httpx.Client) -> None:
        """Each teacher with limits, price, breaker and students; neither key nor address."""
        http_response = http.get("/teachers")
        (first, *_) = http_response.json()["teachers"]
        assert first == {
            "id": "calculator",
            "model": "model-calculator",
            "family": None,
            "size_b": None,
            "price": {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0},
            "limits": {"concurrency": 16, "requests_per_min": None, "tokens_per_min": None},
            "in_flight": 0,
            "breaker": "closed",
            "students": ["tiny"],
        }
        assert "secret" not in http_response.text
        assert "127.0.0.1" not in http_response.text

    def test_metrics_count_what_was_done(self, http: httpx.Client, teacher: FakeTeacher) -> None:
        """The documented names are there, with route templates and teacher ids as labels."""
        http.post("/synthesize", json={"prompts": [SUM], "cache": "off"})
        http.post("/synthesize", json={"prompts": ["Metrics want this."]})
        http.get("/no/such/path/secret-id")
        http_response = http.get("/metrics")
        assert http_response.headers["content-type"].startswith("text/plain; version=")
        for expected in (
            'persyn_http_requests_total{method="POST",route="/synthesize",status="200"}',
            'persyn_http_requests_total{method="GET",route="unmatched",status="404"}',
            'persyn_http_request_duration_seconds_count{method="POST",route="/route"}',
            'persyn_route_prompts_total{strategy="persyn",student="tiny",teacher="calculator"}',
            'persyn_teacher_calls_total{outcome="ok",teacher="calculator"}',
            'persyn_teacher_latency_seconds_count{teacher="calculator"}',
            'persyn_response_cache_total{outcome="miss"}',
            'persyn_response_cache_total{outcome="off"}',
            "persyn_cache_failures_total 0.0",
            'persyn_teacher_tokens_total{kind="completion",teacher="calculator"}',
            'persyn_cost_usd_total{teacher="calculator"}',
            "persyn_batch_prompts_count",
            "persyn_batch_duration_seconds_count",
            "persyn_build_info{version=",
        ):
            assert expected in http_response.text
        assert "secret-id" not in http_response.text

    def test_openapi_documents_every_status(self, http: httpx.Client) -> None:
        """The document is served, problems have their media type, and /docs shows it."""
        document = http.get("/openapi.json").json()
        responses = document["paths"]["/synthesize"]["post"]["responses"]
        assert set(responses) == {"200", "400", "401", "404", "413", "422", "429", "500", "503", "504"}
        assert set(responses["200"]["content"]) == {"application/json", "application/x-ndjson"}
        assert responses["429"]["content"] == {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
        }
        assert "HTTPValidationError" not in document["components"]["schemas"]
        body = document["paths"]["/route"]["post"]["requestBody"]["content"]["application/json"]
        assert set(body["examples"]) == set(ROUTE_REQUESTS)
        answer = document["paths"]["/route"]["post"]["responses"]["200"]["content"]["application/json"]
        assert answer["example"] == ROUTE_RESPONSE
        assert http.get("/docs").status_code == 200


class TestClients:
    """The Python clients against the real service."""

    def test_blocking_client(self, served: Served, teacher: FakeTeacher) -> None:
        """Routes, synthesizes, streams, lists teachers, and raises what the service refuses."""
        with PersynClient(served.base_url) as client:
            assert client.ready()
            assert client.route(SUM).decisions[0].teacher == "calculator"
            item = client.synthesize([POEM], cache="off").items[0]
            assert isinstance(item, AnsweredItem)
            lines = list(client.stream_synthesize([SUM, POEM], cache="off"))
            assert [type(line) for line in lines] == [AnsweredItem, AnsweredItem, SynthesisSummary]
            assert [state.id for state in client.teachers().teachers] == list(TEACHERS)
            with pytest.raises(ServiceResponseError) as refusal:
                client.route(SUM, student="nobody")
        assert (refusal.value.status, refusal.value.retryable) == (404, False)
        assert refusal.value.problem["type"] == "urn:persyn:problem:unknown-student"

    async def test_asynchronous_client(self, served: Served, teacher: FakeTeacher) -> None:
        """The asynchronous twin does the same, many calls at once."""
        teacher.script = lambda _body, _n: Reply(status=400)
        async with AsyncPersynClient(served.base_url) as client:
            assert await client.ready()
            routed = await asyncio.gather(*(client.route([SUM, POEM]) for _ in range(20)))
            assert {tuple(d.teacher for d in body.decisions) for body in routed} == {("calculator", "poet")}
            lines = [line async for line in client.stream_synthesize(SUM, cache="off")]
            assert [type(line) for line in lines] == [FailedItem, SynthesisSummary]
            assert len((await client.teachers()).teachers) == len(TEACHERS)

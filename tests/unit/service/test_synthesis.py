"""SynthesisService on a scripted router and a scripted teacher."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from clients.dispatcher import Dispatcher, Outcome
from clients.registry import Registry
from clients.schemas import AnsweredItem, FailedItem, SynthesizeRequest
from clients.testing import FakeTeacher, Reply, echo
from clients.types import Answered, Failed, Limits, TeacherSpec
from service.api.synthesize import Totals, item_of
from service.synthesis import SynthesisService
from tests.unit.service.test_routing import TEACHERS, ScriptedBatcher, service_of


class Answers:
    """A SynthesisObserver that remembers."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def prompt_answered(self, answered: Answered) -> None:
        self.ids.append(answered.prompt.id)


@pytest.fixture
async def teacher() -> AsyncIterator[FakeTeacher]:
    """The endpoint behind all teachers."""
    with FakeTeacher() as running:
        yield running


@pytest.fixture
async def registry(teacher: FakeTeacher) -> AsyncIterator[Registry]:
    """Three teachers at one endpoint."""
    specs = [
        TeacherSpec(name, teacher.base_url, f"model-{name}", limits=Limits(concurrency=2))
        for name in TEACHERS
    ]
    async with Registry(specs) as opened:
        yield opened


def _request(*prompts: Any, **options: Any) -> SynthesizeRequest:
    return SynthesizeRequest.model_validate({"prompts": list(prompts), **options})


async def _run(
    registry: Registry, request: SynthesizeRequest, observer: Answers | None = None
) -> tuple[dict[int, Outcome], list[int]]:
    """Outcomes by place, and the places in the order of completion."""
    service = SynthesisService(
        service_of(ScriptedBatcher()), Dispatcher(registry), observer=observer or Answers()
    )
    order: list[int] = []
    outcomes: dict[int, Outcome] = {}

    def note(index: int, outcome: Outcome) -> None:
        order.append(index)
        outcomes[index] = outcome

    await service.run(await service.plan(request), note)
    return outcomes, order


async def test_each_outcome_has_the_place_of_its_prompt(registry: Registry, teacher: FakeTeacher) -> None:
    """Whatever completes first, outcomes belong to their prompts; one that was not routed fails alone."""

    def script(body: Mapping[str, Any], n_call: int) -> Reply:
        reply = echo(body, n_call)
        return Reply(reply.content, delay_s=0.2) if "slow" in reply.content else reply

    teacher.script = script
    observer = Answers()
    prompts = [{"id": name, "prompt": name} for name in ("slow", "poison", "quick")]
    outcomes, order = await _run(registry, _request(*prompts), observer)
    assert order == [1, 2, 0]
    assert observer.ids == ["quick", "slow"]
    for index, prompt in enumerate(prompts):
        assert outcomes[index].prompt.id == prompt["id"]
    assert isinstance(outcomes[1], Failed)
    assert isinstance(outcomes[1].error, RuntimeError)


async def test_the_assignment_carries_the_decision(registry: Registry) -> None:
    """Provenance says which router chose, for whom, by what, with what chance."""
    outcomes, _ = await _run(registry, _request("x", strategy="random"))
    answered = outcomes[0]
    assert isinstance(answered, Answered)
    provenance = answered.provenance
    assert (provenance.checkpoint_id, provenance.student, provenance.strategy) == (
        "c0ffee",
        "tiny",
        "random",
    )
    assert provenance.propensity == pytest.approx(1 / 3)
    assert set(provenance.distribution) == set(TEACHERS)


@pytest.mark.parametrize(("top_k", "asked"), [(None, ["a", "b", "c"]), (2, ["a", "b"])])
async def test_fallback_goes_by_strength_among_the_candidates(
    registry: Registry, teacher: FakeTeacher, top_k: int | None, asked: list[str]
) -> None:
    """With fallback the others are tried strongest first, those outside top_k never; without, nobody is."""
    teacher.script = lambda _body, _n: Reply(status=400)
    await _run(registry, _request("x", fallback=True, top_k=top_k))
    assert [body["model"] for body in teacher.requests] == [f"model-{name}" for name in asked]
    teacher.requests.clear()
    await _run(registry, _request("x", top_k=top_k))
    assert [body["model"] for body in teacher.requests] == ["model-a"]


async def test_items_and_totals(registry: Registry, teacher: FakeTeacher) -> None:
    """An item goes on with the prompt's turns and keeps reasoning and tool calls, not log-probs."""
    message = '{"role": "assistant", "content": "4", "reasoning_content": "2+2", "tool_calls": []}'
    choice = f'{{"index": 0, "message": {message}, "finish_reason": "stop", "logprobs": {{"content": []}}}}'
    usage = '{"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}'
    teacher.script = lambda _body, _n: Reply(raw=f'{{"choices": [{choice}], "usage": {usage}}}'.encode())
    outcomes, _ = await _run(registry, _request("2+2?", "poison"))
    item, failed = item_of(outcomes[0]), item_of(outcomes[1])
    assert isinstance(item, AnsweredItem)
    assert item.messages == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "2+2"},
    ]
    assert item.choices[0]["logprobs"] == {"content": []}
    assert isinstance(failed, FailedItem)
    assert failed.teacher is None
    assert (failed.error.source, failed.error.type) == ("persyn", "urn:persyn:problem:internal")
    assert "broke" not in failed.error.detail
    totals = Totals()
    for outcome in outcomes.values():
        totals.add(outcome)
    assert (totals.summary.ok, totals.summary.failed, totals.summary.usage.total_tokens) == (1, 1, 5)


async def test_an_answer_nested_beyond_measure_fails_alone(registry: Registry, teacher: FakeTeacher) -> None:
    """JSON of a teacher that no writer could follow is that teacher's fault, not the end of the call."""
    nested = "[" * 300 + "]" * 300
    message = f'{{"role": "assistant", "content": "deep", "x": {nested}}}'
    choice = f'{{"index": 0, "message": {message}, "finish_reason": "stop"}}'
    deep = Reply(raw=f'{{"choices": [{choice}]}}'.encode(), status=200)
    teacher.script = lambda body, n: deep if "deep" in str(body["messages"]) else echo(body, n)
    outcomes, _ = await _run(registry, _request("deep", "x", deadline_s=0.5))
    assert isinstance(item_of(outcomes[1]), AnsweredItem)
    failed = item_of(outcomes[0])
    assert isinstance(failed, FailedItem)
    assert failed.error.source == "teacher"

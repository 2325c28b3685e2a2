"""RoutingService on a scripted router: ids, restrictions, cost, and what is refused."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from clients.schemas import RouteRequest
from clients.types import Price, RoutingDecision, StudentSpec
from router_model.errors import StrategyError
from router_model.joint_inference import ScoredPrompt
from router_model.model import TeacherSummary
from service.admission import Admission
from service.batching import Batched
from service.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    UnknownStudentError,
)
from service.routing import Routed, RoutingService
from service.students import Student, Students
from tests.unit.planted import planted_manifest, planted_output

TEACHERS = ("a", "b", "c")


def manifest(*, learnability: float | None = -1.0) -> Any:
    """Three teachers of growing quality; b alone is of the student's family."""
    return planted_manifest(
        [
            TeacherSummary(
                id=teacher,
                family="kin" if teacher == "b" else "other",
                size_b=None,
                mean_quality=float(column),
                mean_learnability=learnability,
                mean_reward=0.5,
                mean_quality_part=0.5,
                mean_learnability_part=0.5,
                mean_n_tokens=1000.0 if teacher == "a" else None,
            )
            for column, teacher in enumerate(TEACHERS)
        ],
        family="kin",
    )


class ScriptedBatcher:
    """Gives each text the strengths that the test set for it; raises in place of poison.

    Stands for a whole ServedBackbone: its tokenizer leaves texts as they are.
    """

    running = True
    idle = False

    def __init__(self) -> None:
        self.strengths: dict[str, Sequence[float] | Mapping[float | None, Sequence[float]]] = {}
        self.facts: dict[str, Any] = {}
        self.texts: list[str] = []
        self.priorities: list[str] = []
        self.gate: asyncio.Event | None = None
        self.n_users = 0

    @property
    def batcher(self) -> "ScriptedBatcher":
        return self

    @property
    def tokenizer(self) -> "ScriptedBatcher":
        return self

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self.n_users += 1
        try:
            yield
        finally:
            self.n_users -= 1

    async def encode(self, texts: Sequence[str], *, priority: str) -> list[Any]:
        return list(texts)

    async def submit(
        self, jobs: Sequence[Any], *, priority: str, deadline_s: float | None
    ) -> Batched[ScoredPrompt]:
        assert self.n_users
        texts = [job.prompt for job in jobs]
        self.texts += texts
        self.priorities.append(priority)
        if self.gate is not None:
            await self.gate.wait()
        return Batched([self._scored(text) for text in texts], 0.25, 0.5)

    def _scored(self, text: str) -> ScoredPrompt | Exception:
        if text == "poison":
            return RuntimeError("the model broke")
        strengths = self.strengths.get(text, (2.0, 1.0, 0.0))
        return ScoredPrompt(planted_output(strengths, n_input_tokens=len(text), **self.facts), 0)


class Decisions:
    """A RoutingObserver that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def prompt_routed(self, student: str, strategy: str, decision: RoutingDecision) -> None:
        self.seen.append((student, strategy, decision.teacher))


def service_of(
    batcher: ScriptedBatcher,
    *,
    capacity: int = 100,
    observer: Decisions | None = None,
    facts: Any = None,
    prices: dict[str, Price] | None = None,
) -> RoutingService:
    """A RoutingService with one student whose batcher is scripted."""
    router: Any = SimpleNamespace(manifest=facts or manifest())
    double: Any = batcher
    loader: Any = None
    students = Students(loader)
    students._students["tiny"] = Student(StudentSpec("tiny", "unused"), router, double, datetime.now(UTC))
    return RoutingService(
        students,
        prices=prices or {teacher: Price() for teacher in TEACHERS},
        queue=Admission(capacity, unit="queued prompts", clock=asyncio.get_running_loop().time),
        observer=observer or Decisions(),
    )


def request(*prompts: Any, **options: Any) -> RouteRequest:
    """A request as it comes from JSON."""
    return RouteRequest.model_validate({"prompts": list(prompts), **options})


def decided(routed: Routed) -> list[RoutingDecision]:
    """The decisions of a call in which no prompt failed."""
    assert not [decision for decision in routed.decisions if isinstance(decision, Exception)]
    return [decision for decision in routed.decisions if isinstance(decision, RoutingDecision)]


def only(routed: Routed) -> RoutingDecision:
    """The decision of a call with one prompt."""
    (decision,) = decided(routed)
    return decision


async def test_decisions_come_in_input_order_with_the_facts_of_the_checkpoint() -> None:
    """One decision per prompt, in order, each counted; checkpoint, student and alpha are the router's."""
    batcher, observer = ScriptedBatcher(), Decisions()
    batcher.strengths = {"x": (0, 1, 2), "y": (0, 3, 2)}
    routed = await service_of(batcher, observer=observer).route(request("x", "y", "z"))
    assert (routed.checkpoint_id, routed.student, routed.alpha) == ("c0ffee", "tiny", 0.4)
    assert [decision.teacher for decision in decided(routed)] == ["c", "b", "a"]
    assert observer.seen == [("tiny", "persyn", teacher) for teacher in "cba"]


async def test_a_call_knows_its_priority_and_where_its_time_went() -> None:
    """Bulk calls say so to the batcher; what the batcher measured is in the answer."""
    batcher = ScriptedBatcher()
    service = service_of(batcher)
    routed = await service.route(request("x"))
    await service.route(request("y"), priority="bulk")
    assert batcher.priorities == ["interactive", "bulk"]
    assert (routed.timings_s["queue"], routed.timings_s["inference"]) == (0.25, 0.5)
    assert routed.timings_s["tokenise"] >= 0
    assert batcher.n_users == 0


async def test_ids_come_from_the_content() -> None:
    """A prompt without id gets the same id in any call and form; other content gets another."""
    service = service_of(ScriptedBatcher())
    chat = {"messages": [{"role": "user", "content": "x"}]}
    first = await service.route(request("x", chat, "y", {"id": "mine", "prompt": "x"}))
    ids = [prompt.id for prompt in first.prompts]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 16
    assert ids[3] == "mine"
    again = await service.route(request("y", "x"))
    assert [prompt.id for prompt in again.prompts] == [ids[2], ids[0]]


async def test_the_router_reads_the_one_rendering() -> None:
    """A lone user turn is its text; several turns are rendered with their roles."""
    batcher = ScriptedBatcher()
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    await service_of(batcher).route(request("x", {"messages": turns}))
    assert batcher.texts == ["x", "system: be kind\nuser: hello"]


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        (request("x", " \n\t"), ["prompts", 1]),
        (
            request({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            ["prompts", 0],
        ),
        (request({"id": "i", "prompt": "x"}, {"id": "i", "prompt": "y"}), ["prompts", 1]),
        (request("x", teachers=["a", "d"]), ["teachers", 1]),
        (request("x", exclude=["d"]), ["exclude", 0]),
        (request("x", teachers=["a"], exclude=["a"]), ["exclude"]),
    ],
)
async def test_what_cannot_be_served_is_named(body: RouteRequest, loc: list[str | int]) -> None:
    """Each request that cannot be decided is refused with the place of what is wrong."""
    with pytest.raises(InvalidRequestError) as refusal:
        await service_of(ScriptedBatcher()).route(body)
    assert refusal.value.loc == tuple(loc)


async def test_a_strategy_without_its_data_is_the_callers_to_change() -> None:
    """CAR without learnability, and an alpha that the router cannot serve, are refused by name."""
    service = service_of(ScriptedBatcher(), facts=manifest(learnability=None))
    with pytest.raises(StrategyError, match="learnability"):
        await service.route(request("x", strategy="car"))
    with pytest.raises(StrategyError, match="alpha"):
        await service.route(request("x", alpha=0.5))


async def test_the_checkpoints_own_alpha_may_be_named() -> None:
    """Naming the alpha that the router was trained at changes nothing."""
    routed = await service_of(ScriptedBatcher()).route(request("x", alpha=0.4))
    assert routed.alpha == 0.4


async def test_unknown_students_are_named_with_the_nearest() -> None:
    """An unknown student is an error that offers the nearest one."""
    with pytest.raises(UnknownStudentError, match="did you mean 'tiny'"):
        await service_of(ScriptedBatcher()).route(request("x", student="tinny"))


async def test_top_k_keeps_the_strongest_allowed_of_each_prompt() -> None:
    """The k strongest are chosen per prompt and among the allowed; the distribution is over them alone."""
    batcher = ScriptedBatcher()
    batcher.strengths = {"x": (5, 1, 3), "y": (0, 4, 2)}
    routed = await service_of(batcher).route(request("x", "y", top_k=2))
    assert [set(decision.distribution) for decision in decided(routed)] == [{"a", "c"}, {"b", "c"}]
    for decision in decided(routed):
        assert sum(decision.distribution.values()) == pytest.approx(1.0)
    routed = await service_of(batcher).route(request("x", top_k=1, exclude=["a"]))
    assert only(routed).distribution == {"c": 1.0}


async def test_cost_counts_as_much_as_it_is_weighed() -> None:
    """A dear teacher loses the prompt once its expected cost outweighs its lead, and not before."""
    prices = {"a": Price(0.0, 1000.0), "b": Price(), "c": Price()}  # b and c are free at any length
    service = service_of(ScriptedBatcher(), prices=prices)
    # 1000 tokens at 1000 dollars per million: one dollar an answer; the lead of a over b is 1.0.
    for weight, teacher in ((0.0, "a"), (0.99, "a"), (1.01, "b")):
        assert only(await service.route(request("x", cost_weight=weight))).teacher == teacher


async def test_a_teacher_without_a_known_cost_is_not_taken_for_free() -> None:
    """No price, or no known length: as dear as the dearest. If nothing above 0 is known, a refusal."""
    prices = {"a": Price(0.0, 1000.0), "b": Price(0.0, 1.0)}
    routed = await service_of(ScriptedBatcher(), prices=prices).route(request("x", cost_weight=5.0))
    assert only(routed).teacher == "a"
    service = service_of(ScriptedBatcher(), prices={"a": Price()})
    with pytest.raises(StrategyError, match=r"cost of an answer of b, c is not known"):
        await service.route(request("x", cost_weight=5.0))


async def test_alpha_of_the_request_is_the_one_used() -> None:
    """Another alpha, another teacher; the answer names the alpha that was used, and its coverage."""
    batcher = ScriptedBatcher()
    batcher.strengths = {"x": {None: (2, 1, 0), 0.0: (0, 2, 1), 1.0: (0, 1, 2)}}
    batcher.facts = {"coverage": 0.9, "width": 1.0}
    service = service_of(batcher)
    for alpha, used, teacher in ((None, 0.4, "a"), (0.0, 0.0, "b"), (1.0, 1.0, "c")):
        routed = await service.route(request("x", alpha=alpha))
        assert (routed.alpha, routed.coverage, only(routed).teacher) == (used, 0.9, teacher)
        assert len(only(routed).conformal_set) == 2
    assert (await service.route(request("poison"))).coverage is None


async def test_options_of_a_strategy_reach_it() -> None:
    """mix_strong_share and car_beta decide what mix and car do."""
    service = service_of(ScriptedBatcher())
    for share in (0.0, 1.0):
        routed = await service.route(request("x", "y", "z", strategy="mix", mix_strong_share=share))
        assert all((decision.teacher == "c") is (share == 1.0) for decision in decided(routed))
    routed = await service.route(request("x", strategy="car", car_beta=0.0))
    assert only(routed).teacher == "c"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (request("x", strategy="strong", temperature=1.0), "temperature"),
        (request("x", strategy="mix", cost_weight=1.0), "cost_weight"),
        (request("x", strategy="random", cost_weight=1.0), "cost_weight"),
    ],
)
async def test_an_option_without_meaning_is_refused_before_any_work(body: RouteRequest, field: str) -> None:
    """The refusal names the option, and the model has not been asked."""
    batcher = ScriptedBatcher()
    with pytest.raises(StrategyError, match=f"{field} has no meaning"):
        await service_of(batcher).route(body)
    assert batcher.texts == []


async def test_a_prompt_that_breaks_the_model_stands_alone() -> None:
    """Its error takes its place; the other prompts are decided."""
    routed = await service_of(ScriptedBatcher()).route(request("x", "poison", "y"))
    assert [type(decision) for decision in routed.decisions] == [
        RoutingDecision,
        RuntimeError,
        RoutingDecision,
    ]


async def test_the_deadline_and_the_queue_bound() -> None:
    """A caller whose deadline passes is told so and its permits come back; above the bound it is refused."""
    batcher = ScriptedBatcher()
    batcher.gate = asyncio.Event()
    service = service_of(batcher, capacity=2)
    now_s = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceededError):
        await service.route(request("x", "y"), deadline_s=now_s)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(service.route(request("x")))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await service.route(request("x", "y"))
        batcher.gate.set()
    assert only(waiting.result()).teacher == "a"

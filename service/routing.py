"""RoutingService: prompts in, one routing decision each out."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

from clients.canonical import messages_hash
from clients.schemas import PromptBody, RouteParameters, RouteRequest
from clients.types import Price, Prompt, RoutingDecision, Strategy
from router_model.decision import Chooser, outlook_at
from router_model.joint_inference import ScoredPrompt
from router_model.strategies import RouteOptions
from router_model.tokenization import message_text, prompt_text
from service.admission import Admission
from service.batch_queue import Priority
from service.decision_cache import DecisionCache, Permits
from service.errors import DeadlineExceededError, InvalidRequestError
from service.students import Scored, Student, Students

_ID_LENGTH = 16
_CHUNK = 64
"""Prompts handled between two turns of the event loop: other requests are served meanwhile."""


class RoutingObserver(Protocol):
    """Told of each decision; the service counts them."""

    def prompt_routed(self, student: str, strategy: str, decision: RoutingDecision) -> None:
        """One prompt got its teacher."""


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """Whose router decides and how it chooses: what all prompts of a call have in common."""

    student: Student
    options: RouteOptions

    @property
    def alpha(self) -> float:
        """The weight of learnability that is used."""
        return self.student.manifest.alpha if self.options.alpha is None else self.options.alpha


@dataclass(frozen=True, slots=True)
class Routed:
    """The prompts of one call and what was decided for each, in input order.

    An exception stands in place of the decision of a prompt that could not be scored.
    """

    checkpoint_id: str
    student: str
    strategy: Strategy
    alpha: float
    coverage: float | None
    """Share of the prompts whose best teacher is in the conformal set; ``None`` if not calibrated."""
    prompts: Sequence[Prompt]
    decisions: Sequence[RoutingDecision | Exception]
    timings_s: Mapping[str, float]
    """Seconds in which the prompts were tokenised, waited, and went through the model."""


class RoutingService:
    """Chooses teachers for prompts.

    Args:
        students: The loaded routers.
        prices: By teacher id, of those that have a known one; for requests that weigh cost.
        queue: Permits for prompts that wait for the model.
        cache: Of what routers said of prompts; without one every prompt is scored.
        observer: Told of each decision.
    """

    def __init__(
        self,
        students: Students,
        *,
        prices: Mapping[str, Price],
        queue: Admission,
        observer: RoutingObserver,
        cache: DecisionCache | None = None,
    ) -> None:
        self._students = students
        self._prices = prices
        self._queue = queue
        self._observer = observer
        self._cache = cache

    async def route(
        self,
        request: RouteRequest,
        *,
        deadline_s: float | None = None,
        priority: Priority = "interactive",
    ) -> Routed:
        """Decide which teacher answers each prompt.

        Args:
            priority: ``bulk`` gives way to interactive calls.
            deadline_s: Absolute event-loop time after which the caller has no use for an answer.

        Raises:
            UnknownStudentError: The student is not in the project file.
            InvalidRequestError: A prompt or a teacher id of the request cannot be used.
            StrategyError: The router cannot serve this strategy or alpha, or an option has no meaning for it.
            OverloadedError: Too many prompts wait already.
            DeadlineExceededError: The deadline came first.
        """
        plan = self.plan(request)
        try:
            async with _deadline(deadline_s):
                # Held from here on: a reload must not close what this call will use.
                with plan.student.served.in_use():
                    prompts = await _prompts(request.prompts)
                    return await self.route_prompts(
                        plan, prompts, permits=self._queue.permits, deadline_s=deadline_s, priority=priority
                    )
        except TimeoutError:
            raise DeadlineExceededError("the deadline passed before all prompts were routed") from None

    def plan(self, request: RouteParameters) -> RoutePlan:
        """The router that is asked for, as it is now, and its options.

        Raises:
            UnknownStudentError: The student is not in the project file.
            InvalidRequestError: A teacher id of the request cannot be used.
            StrategyError: An option has no meaning for the strategy.
        """
        student = self._students.get(request.student)
        _require_known_teachers(request, student)
        return RoutePlan(student, self._options(request))

    async def require_applicable(self, plan: RoutePlan) -> None:
        """Decide for a prompt of no account, if there are options that only the router itself can refuse.

        Raises:
            StrategyError: The router cannot serve the strategy, alpha or cost weight: not for any prompt.
        """
        options = plan.options
        if options.strategy == "persyn" and options.alpha is None and not options.cost_weight:
            return
        (outcome,) = (await plan.student.score(["Can this be served?"])).prompts
        if isinstance(outcome, ScoredPrompt):
            Chooser(plan.student.manifest, options).decide(outcome.output, outcome.row, "")

    async def route_prompts(
        self,
        plan: RoutePlan,
        prompts: Sequence[Prompt],
        *,
        permits: Permits | None = None,
        deadline_s: float | None = None,
        priority: Priority = "interactive",
    ) -> Routed:
        """Decide which teacher answers each prompt. The caller keeps the router open.

        Args:
            permits: Of the queue, for prompts that the router must read; none where the caller holds them.
        """
        texts = [prompt_text(prompt.messages) for prompt in prompts]
        scored = await self._score(plan.student, texts, permits or _no_permits, priority, deadline_s)
        decisions = await self._decide(plan.student, plan.options, prompts, scored.prompts)
        return Routed(
            checkpoint_id=plan.student.manifest.checkpoint_id,
            student=plan.student.spec.id,
            strategy=plan.options.strategy,
            alpha=plan.alpha,
            coverage=_coverage(scored.prompts, plan.options.alpha),
            prompts=prompts,
            decisions=decisions,
            timings_s={
                "tokenise": scored.tokenise_s,
                "queue": scored.queue_s,
                "inference": scored.inference_s,
            },
        )

    async def _score(
        self,
        student: Student,
        texts: Sequence[str],
        permits: Permits,
        priority: Priority,
        deadline_s: float | None,
    ) -> Scored:
        if self._cache is not None:
            return await self._cache.score(
                student, texts, permits=permits, priority=priority, deadline_s=deadline_s
            )
        with permits(len(texts)):
            return await student.score(texts, priority=priority, deadline_s=deadline_s)

    async def _decide(
        self,
        student: Student,
        options: RouteOptions,
        prompts: Sequence[Prompt],
        scored: Sequence[ScoredPrompt | Exception],
    ) -> list[RoutingDecision | Exception]:
        chooser = Chooser(student.manifest, options)
        decisions: list[RoutingDecision | Exception] = []
        for index, (prompt, outcome) in enumerate(zip(prompts, scored, strict=True)):
            if index % _CHUNK == _CHUNK - 1:
                await asyncio.sleep(0)
            if isinstance(outcome, Exception):
                decisions.append(outcome)
                continue
            decision = chooser.decide(outcome.output, outcome.row, prompt.id)
            self._observer.prompt_routed(student.spec.id, options.strategy, decision)
            decisions.append(decision)
        return decisions

    def _options(self, request: RouteParameters) -> RouteOptions:
        return RouteOptions(
            strategy=request.strategy,
            teachers=request.teachers,
            exclude=request.exclude,
            alpha=request.alpha,
            temperature=request.temperature,
            seed=request.seed,
            cost_weight=request.cost_weight,
            top_k=request.top_k,
            mix_strong_share=request.mix_strong_share,
            car_beta=request.car_beta,
            prices=self._prices,
        )


def _deadline(deadline_s: float | None) -> AbstractAsyncContextManager[object]:
    return nullcontext() if deadline_s is None else asyncio.timeout_at(deadline_s)


def _no_permits(_n_prompts: int) -> AbstractContextManager[None]:
    return nullcontext()


def _require_known_teachers(request: RouteParameters, student: Student) -> None:
    """Refuse a teacher's name that means nothing, and a request that leaves no teacher."""
    for field, named in (("teachers", request.teachers or []), ("exclude", request.exclude)):
        for index, teacher in enumerate(named):
            if teacher not in student.teachers:
                near = get_close_matches(teacher, student.teachers, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InvalidRequestError(
                    f"the router of student {student.spec.id!r} knows no teacher {teacher!r}; "
                    f"known: {', '.join(student.teachers)}{hint}",
                    loc=(field, index),
                )
    wanted = student.teachers if request.teachers is None else request.teachers
    if not set(wanted) - set(request.exclude):
        raise InvalidRequestError("exclude leaves no teacher to choose", loc=("exclude",))


def _coverage(scored: Sequence[ScoredPrompt | Exception], alpha: float | None) -> float | None:
    """Coverage of the conformal sets, the same for all prompts: a fact of the checkpoint at this alpha."""
    first = next((outcome for outcome in scored if isinstance(outcome, ScoredPrompt)), None)
    return None if first is None else outlook_at(first.output, alpha).coverage


async def _prompts(bodies: Sequence[PromptBody]) -> list[Prompt]:
    """The prompts with their ids; one without an id is named by a hash of its content.

    Raises:
        InvalidRequestError: A prompt has no text, or shares its id with another one.
    """
    prompts: list[Prompt] = []
    hashes: dict[str, str] = {}
    for index, body in enumerate(bodies):
        if index % _CHUNK == _CHUNK - 1:
            await asyncio.sleep(0)
        prompt, digest = named_prompt(body)
        if not has_text(prompt):
            raise InvalidRequestError(f"prompt {index} has no text", loc=("prompts", index))
        if hashes.setdefault(prompt.id, digest) != digest:
            raise InvalidRequestError(
                f"prompt {index} has the id of an earlier prompt with other content", loc=("prompts", index)
            )
        prompts.append(prompt)
    return prompts


def has_text(prompt: Prompt) -> bool:
    """Whether there is anything in a prompt that a router can read."""
    return any(message_text(message).strip() for message in prompt.messages)


def named_prompt(body: PromptBody) -> tuple[Prompt, str]:
    """A prompt with its id, and the hash of its content, which names it if it has no id of its own."""
    messages = body.chat()
    digest = messages_hash(messages)
    return Prompt(body.id or digest[:_ID_LENGTH], messages), digest

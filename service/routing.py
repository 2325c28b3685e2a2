"""RoutingService: prompts in, one routing decision each out."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

from clients.canonical import messages_hash
from clients.dispatcher import cost_usd
from clients.schemas import PromptBody, RouteRequest
from clients.types import Price, Prompt, RoutingDecision, Strategy, Usage
from router_model.strategies import RouteOptions, decide
from router_model.tokenization import message_text, prompt_text
from service.admission import Admission
from service.errors import DeadlineExceededError, InvalidRequestError
from service.students import ScoredPrompt, Student, Students

_ID_LENGTH = 16
_ASSUMED_ANSWER_TOKENS = 512
"""Where the score table did not say how long a teacher's answers are."""

_CHUNK = 64
"""Prompts handled between two turns of the event loop: other requests are served meanwhile."""


class RoutingObserver(Protocol):
    """Told of each decision; the service counts them."""

    def prompt_routed(self, student: str, strategy: str, decision: RoutingDecision) -> None:
        """One prompt got its teacher."""


@dataclass(frozen=True, slots=True)
class Routed:
    """The prompts of one call and what was decided for each, in input order.

    An exception stands in place of the decision of a prompt that could not be scored.
    """

    checkpoint_id: str
    student: str
    strategy: Strategy
    alpha: float
    prompts: Sequence[Prompt]
    decisions: Sequence[RoutingDecision | Exception]


class RoutingService:
    """Chooses teachers for prompts.

    Args:
        students: The loaded routers.
        prices: By teacher id; for requests that weigh cost.
        queue: Permits for prompts that wait for the model.
        observer: Told of each decision.
    """

    def __init__(
        self,
        students: Students,
        *,
        prices: Mapping[str, Price],
        queue: Admission,
        observer: RoutingObserver,
    ) -> None:
        self._students = students
        self._prices = prices
        self._queue = queue
        self._observer = observer

    async def route(self, request: RouteRequest, *, deadline_s: float | None = None) -> Routed:
        """Decide which teacher answers each prompt.

        Args:
            deadline_s: Absolute event-loop time after which the caller has no use for an answer.

        Raises:
            UnknownStudentError: The student is not in the project file.
            InvalidRequestError: A prompt or a teacher id of the request cannot be used.
            StrategyError: The router was not trained for this strategy or alpha.
            OverloadedError: Too many prompts wait already.
            DeadlineExceededError: The deadline came first.
        """
        student = self._students.get(request.student)
        allowed = _allowed_teachers(request, student)
        if not math.isfinite(request.cost_weight):
            raise InvalidRequestError("cost_weight must be a finite number", loc=("cost_weight",))
        try:
            async with asyncio.timeout_at(deadline_s):
                with self._queue.permits(len(request.prompts)):
                    prompts = await _prompts(request.prompts)
                    scored = await student.score([prompt_text(prompt.messages) for prompt in prompts])
                    decisions = await self._decide(student, request, allowed, prompts, scored)
        except TimeoutError:
            raise DeadlineExceededError("the deadline passed before all prompts were routed") from None
        return Routed(
            checkpoint_id=student.manifest.checkpoint_id,
            student=student.spec.id,
            strategy=request.strategy,
            alpha=student.manifest.alpha,
            prompts=prompts,
            decisions=decisions,
        )

    async def _decide(
        self,
        student: Student,
        request: RouteRequest,
        allowed: Sequence[str],
        prompts: Sequence[Prompt],
        scored: Sequence[ScoredPrompt | Exception],
    ) -> list[RoutingDecision | Exception]:
        decisions: list[RoutingDecision | Exception] = []
        for index, (prompt, outcome) in enumerate(zip(prompts, scored, strict=True)):
            if index % _CHUNK == _CHUNK - 1:
                await asyncio.sleep(0)
            if isinstance(outcome, Exception):
                decisions.append(outcome)
                continue
            decision = self._decide_one(student, request, allowed, prompt.id, outcome)
            self._observer.prompt_routed(student.spec.id, request.strategy, decision)
            decisions.append(decision)
        return decisions

    def _decide_one(
        self,
        student: Student,
        request: RouteRequest,
        allowed: Sequence[str],
        prompt_id: str,
        scored: ScoredPrompt,
    ) -> RoutingDecision:
        n_input_tokens = int(scored.output.input_tokens_B[scored.row])
        options = RouteOptions(
            strategy=request.strategy,
            alpha=request.alpha,
            teachers=_strongest(student, scored, allowed, request.top_k),
            temperature=request.temperature,
            seed=request.seed,
            cost_weight=request.cost_weight,
            expected_cost_usd=self._expected_cost_usd(student, n_input_tokens) if request.cost_weight else {},
        )
        return decide(student.manifest, scored.output, scored.row, prompt_id, options)

    def _expected_cost_usd(self, student: Student, n_input_tokens: int) -> dict[str, float]:
        """What an answer of each teacher will cost, if it is as long as its answers in training."""
        return {
            teacher.id: cost_usd(
                Usage(n_input_tokens, round(teacher.mean_n_tokens or _ASSUMED_ANSWER_TOKENS)),
                self._prices[teacher.id],
            )
            for teacher in student.manifest.teachers
        }


def _allowed_teachers(request: RouteRequest, student: Student) -> list[str]:
    """Teachers the request leaves to choose from, in column order. A name that means nothing is refused."""
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
    allowed = [name for name in student.teachers if name in wanted and name not in request.exclude]
    if not allowed:
        raise InvalidRequestError("exclude leaves no teacher to choose", loc=("exclude",))
    return allowed


def _strongest(
    student: Student, scored: ScoredPrompt, allowed: Sequence[str], top_k: int | None
) -> Sequence[str]:
    """The ``top_k`` strongest allowed teachers for one prompt; ties go to the first column."""
    if top_k is None or top_k >= len(allowed):
        return allowed
    strengths_M = scored.output.strengths_BM[scored.row]
    column = {teacher: index for index, teacher in enumerate(student.teachers)}
    return sorted(allowed, key=lambda teacher: -strengths_M[column[teacher]])[:top_k]


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
        messages = body.chat()
        if not any(message_text(message).strip() for message in messages):
            raise InvalidRequestError(f"prompt {index} has no text", loc=("prompts", index))
        digest = messages_hash(messages)
        prompt_id = body.id or digest[:_ID_LENGTH]
        if hashes.setdefault(prompt_id, digest) != digest:
            raise InvalidRequestError(
                f"prompt {index} has the id of an earlier prompt with other content", loc=("prompts", index)
            )
        prompts.append(Prompt(prompt_id, messages))
    return prompts

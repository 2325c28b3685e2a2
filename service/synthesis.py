"""SynthesisService: routing decisions in, responses with their provenance out."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from clients.dispatcher import Dispatcher, DispatchOptions, Outcome
from clients.schemas import SynthesizeRequest
from clients.types import Answered, Assignment, Failed, Prompt, RoutingDecision
from service.routing import Routed, RoutingService


class SynthesisObserver(Protocol):
    """Told of each response; the service counts them."""

    def prompt_answered(self, answered: Answered) -> None:
        """One prompt got its response."""


@dataclass(frozen=True, slots=True)
class SynthesisPlan:
    """The prompts of one call: who is to answer them, and which could not be routed."""

    checkpoint_id: str
    n_prompts: int
    assignments: Sequence[tuple[int, Assignment]]
    """With their place in the request."""
    unrouted: Sequence[tuple[int, Failed]]
    options: DispatchOptions


class SynthesisService:
    """Routes prompts and lets the chosen teachers answer.

    Args:
        routing: Chooses the teachers.
        dispatcher: Asks them.
        observer: Told of each response.
    """

    def __init__(
        self, routing: RoutingService, dispatcher: Dispatcher, *, observer: SynthesisObserver
    ) -> None:
        self._routing = routing
        self._dispatcher = dispatcher
        self._observer = observer

    async def plan(self, request: SynthesizeRequest) -> SynthesisPlan:
        """Choose a teacher for each prompt. The deadline of the whole call starts here.

        Raises:
            ServiceError: As ``RoutingService.route``.
        """
        deadline_s = asyncio.get_running_loop().time() + request.deadline_s
        routed = await self._routing.route(request, deadline_s=deadline_s)
        assignments: list[tuple[int, Assignment]] = []
        unrouted: list[tuple[int, Failed]] = []
        for index, (prompt, decision) in enumerate(zip(routed.prompts, routed.decisions, strict=True)):
            if isinstance(decision, Exception):
                unrouted.append((index, Failed(prompt, teacher="", error=decision)))
            else:
                assignments.append((index, _assignment(routed, prompt, decision, request.fallback)))
        return SynthesisPlan(
            checkpoint_id=routed.checkpoint_id,
            n_prompts=len(routed.prompts),
            assignments=assignments,
            unrouted=unrouted,
            options=DispatchOptions(request.sampling, request.cache, deadline_s),
        )

    async def run(self, plan: SynthesisPlan, on_outcome: Callable[[int, Outcome], None]) -> None:
        """Let the teachers answer. One prompt's failure never touches another's.

        Args:
            on_outcome: Called with a prompt's place in the request and its outcome, as each completes.
        """
        for index, failed in plan.unrouted:
            on_outcome(index, failed)

        def placed(number: int, outcome: Outcome) -> None:
            if isinstance(outcome, Answered):
                self._observer.prompt_answered(outcome)
            on_outcome(plan.assignments[number][0], outcome)

        await self._dispatcher.run([assignment for _, assignment in plan.assignments], plan.options, placed)


def _assignment(routed: Routed, prompt: Prompt, decision: RoutingDecision, fallback: bool) -> Assignment:
    return Assignment(
        prompt=prompt,
        teacher=decision.teacher,
        checkpoint_id=routed.checkpoint_id,
        strategy=routed.strategy,
        distribution=decision.distribution,
        propensity=decision.propensity,
        student=routed.student,
        fallbacks=_next_best(decision) if fallback else (),
    )


def _next_best(decision: RoutingDecision) -> tuple[str, ...]:
    """The other candidates, strongest first."""
    others = (teacher for teacher in decision.strengths if teacher != decision.teacher)
    return tuple(sorted(others, key=lambda teacher: -decision.strengths[teacher]))

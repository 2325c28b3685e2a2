"""BulkRouting: lines of prompts in, their outcomes out, in order, any number of them in bounded memory."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel, TypeAdapter, ValidationError

from clients.errors import PersynError
from clients.schemas import PromptBody, PromptInput
from clients.types import Prompt, RoutingDecision
from service.admission import PatientAdmission
from service.errors import InvalidRequestError, PayloadTooLargeError
from service.ndjson import Line
from service.routing import RoutePlan, RoutingService, has_text, named_prompt

_WINDOW_BYTES = 8 * 2**20
"""Of one stream: lines that are read and whose answers are not written. One longer line goes alone."""
_LONGEST_REASON = 500

_prompt_of_line: TypeAdapter[PromptBody] = TypeAdapter(PromptInput)


class BulkObserver(Protocol):
    """Told of lines that are answered; the service counts them."""

    def lines_answered(self, n_routed: int, n_failed: int) -> None:
        """Lines of a stream got their decisions, or their errors."""


@dataclass(frozen=True, slots=True)
class LineOutcome:
    """The decision for the prompt of one line, or why there is none."""

    line: int
    prompt_id: str | None
    decision: RoutingDecision | Exception


@dataclass(slots=True)
class BulkTotals:
    """The summary of a stream, kept up as its lines are answered."""

    n_routed: int = 0
    n_failed: int = 0
    last_line: int = 0
    coverage: float | None = None
    failure: PersynError | None = None
    """Why the stream ended before its lines did."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some lines of a stream in work."""

    n_lines: int
    n_bytes: int
    outcomes: "asyncio.Task[list[LineOutcome] | PersynError]"


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream in work."""

    plan: RoutePlan
    window: PatientAdmission
    window_bytes: PatientAdmission
    chunks: "asyncio.Queue[_Chunk | None]" = field(default_factory=asyncio.Queue)
    totals: BulkTotals = field(default_factory=BulkTotals)


class BulkRouting:
    """Routes streams of prompts, as calls that give way to interactive ones.

    Two bounds hold. Of all streams together, so many prompts wait for the router at one time: whoever wants
    more waits its turn, and the permits of interactive calls are not touched. And of each stream, so many
    prompts are read and not yet delivered: a client that takes its answers slowly is read from slowly.

    Args:
        window: Both bounds, in prompts.
        observer: Told of each line.
    """

    def __init__(self, routing: RoutingService, *, window: int, observer: BulkObserver) -> None:
        self._routing = routing
        self._window = window
        self._observer = observer
        self._in_work = PatientAdmission(window)

    @property
    def n_in_work(self) -> int:
        """Prompts of all streams that wait for the router."""
        return self._in_work.n_held

    async def run(
        self,
        plan: RoutePlan,
        lines: AsyncGenerator[Sequence[Line], None],
        deliver: Callable[[Sequence[LineOutcome]], Awaitable[None]],
    ) -> BulkTotals:
        """Route lines until there are no more. The caller keeps the router open.

        Args:
            lines: In small numbers. A ``PersynError`` from it ends the stream, after what came before it.
            deliver: Takes outcomes in the order of the lines, all those of some lines at a time.
        """
        stream = _Stream(plan, PatientAdmission(self._window), PatientAdmission(_WINDOW_BYTES))
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(stream, lines, group))
            while (chunk := await stream.chunks.get()) is not None:
                outcomes = await chunk.outcomes
                if isinstance(outcomes, PersynError):
                    stream.totals.failure = outcomes
                    break
                await deliver(outcomes)
                self._count(stream.totals, outcomes)
                stream.window.give_back(chunk.n_lines)
                stream.window_bytes.give_back(chunk.n_bytes)
            await _drop(reading, stream.chunks)
        return stream.totals

    async def _read(
        self, stream: _Stream, lines: AsyncGenerator[Sequence[Line], None], group: asyncio.TaskGroup
    ) -> None:
        try:
            async with aclosing(lines):
                async for some in lines:
                    n_bytes = sum(len(line.content or b"") for line in some)
                    await stream.window.take(len(some))
                    await stream.window_bytes.take(n_bytes)
                    task = group.create_task(self._outcomes(stream, some))
                    stream.chunks.put_nowait(_Chunk(len(some), n_bytes, task))
        except PersynError as error:
            stream.totals.failure = error
        stream.chunks.put_nowait(None)

    async def _outcomes(self, stream: _Stream, lines: Sequence[Line]) -> list[LineOutcome] | PersynError:
        """The outcome of each line, or why none of them could be routed."""
        read = [_read_line(line) for line in lines]
        prompts = [prompt for prompt in read if isinstance(prompt, Prompt)]
        decisions: Sequence[RoutingDecision | Exception] = ()
        if prompts:
            try:
                async with self._in_work.permits(len(prompts)):
                    routed = await self._routing.route_prompts(stream.plan, prompts, priority="bulk")
            except PersynError as error:
                # Returned: raised, it would cancel the lines before it.
                return error
            decisions = routed.decisions
            stream.totals.coverage = routed.coverage
        remaining = iter(decisions)
        return [
            LineOutcome(line.number, prompt.id, next(remaining)) if isinstance(prompt, Prompt) else prompt
            for line, prompt in zip(lines, read, strict=True)
        ]

    def _count(self, totals: BulkTotals, outcomes: Sequence[LineOutcome]) -> None:
        n_routed = sum(isinstance(outcome.decision, RoutingDecision) for outcome in outcomes)
        n_failed = len(outcomes) - n_routed
        totals.n_routed += n_routed
        totals.n_failed += n_failed
        totals.last_line = outcomes[-1].line
        self._observer.lines_answered(n_routed, n_failed)


async def _drop(reading: "asyncio.Task[None]", chunks: "asyncio.Queue[_Chunk | None]") -> None:
    """End what nobody waits for any more."""
    reading.cancel()
    while not chunks.empty():
        chunk = chunks.get_nowait()
        if chunk is not None:
            chunk.outcomes.cancel()


def _read_line(line: Line) -> Prompt | LineOutcome:
    """The prompt of a line, or the outcome of a line that holds none."""
    if line.content is None:
        return LineOutcome(line.number, None, PayloadTooLargeError("the line is too long, and was not read"))
    try:
        prompt, _ = named_prompt(_prompt_of_line.validate_json(line.content))
    except ValidationError as error:
        refusal = InvalidRequestError(_reason(error), loc=("line", line.number))
        return LineOutcome(line.number, _id_of_line(line.content), refusal)
    if not has_text(prompt):
        return LineOutcome(
            line.number, prompt.id, InvalidRequestError("the prompt has no text", loc=("line", line.number))
        )
    return prompt


def _reason(error: ValidationError) -> str:
    """What is wrong with a line, without quoting a value of it."""
    faults = error.errors(include_input=False, include_url=False)
    told = [
        f"{'.'.join(map(str, fault['loc'])) or 'the line'}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in faults
    ]
    return "; ".join(told)[:_LONGEST_REASON]


class _IdOnly(BaseModel):
    """What tells the owner of an unusable line which one it is."""

    id: str


def _id_of_line(content: bytes) -> str | None:
    try:
        return _IdOnly.model_validate_json(content).id
    except ValidationError:
        return None

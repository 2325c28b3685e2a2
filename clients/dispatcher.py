"""Assignments in, answers with their provenance out: cache, limits, breaker, retries, fallback."""

import asyncio
import importlib.metadata
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from clients.cache import CachedResponse, ResponseCache, may_store, response_key
from clients.canonical import canonical_json, messages_hash
from clients.errors import (
    CacheError,
    ClientError,
    TeacherError,
    TeacherProtocolError,
    TeacherRejectedError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from clients.registry import Endpoint, Registry
from clients.retry import RetryPolicy
from clients.teacher import request_body
from clients.types import (
    Answered,
    Assignment,
    CacheMode,
    ChatMessage,
    Completion,
    Failed,
    Price,
    Provenance,
    TeacherSpec,
    Usage,
)

logger = logging.getLogger(__name__)

CacheOutcome = Literal["hit", "miss", "refresh", "off"]
Outcome = Answered | Failed

_HEALTH_ERRORS = (TeacherUnavailableError, TeacherTimeoutError, TeacherProtocolError)
_BYTES_PER_TOKEN = 4
_PROBE_POLL_S = 0.25
_DEFAULT_MAX_TOKENS = 512


class DispatchObserver(Protocol):
    """Told of each event; the service counts them."""

    def upstream_called(self, teacher_id: str, outcome: str, latency_s: float) -> None:
        """One attempt ended: ``ok`` or the name of its error."""

    def cache_used(self, outcome: CacheOutcome) -> None:
        """A response was looked up."""

    def cache_failed(self) -> None:
        """The cache could not be used; the call went on without it."""


@dataclass(frozen=True, slots=True)
class DispatchOptions:
    """How a set of assignments is answered.

    Args:
        sampling: OpenAI parameters that override the teachers' own.
        deadline_s: Absolute event-loop time after which no attempt starts and none goes on.
        patience_s: How long a teacher may have been down before its prompts fail at once. Until then they
            wait: a batch job should survive the restart of a teacher, an interactive caller should not wait.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    cache: CacheMode = "use"
    deadline_s: float | None = None
    patience_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Response:
    """A completion and what it took."""

    completion: Completion
    attempts: int
    latency_s: float
    cache: CacheOutcome


class Dispatcher:
    """Asks teachers for answers; never raises for one prompt's failure.

    Args:
        registry: The teachers.
        cache: Where complete answers are kept; ``None`` serves without.
        retry: When and how long to wait between attempts.
        observer: Told of attempts and cache use.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        cache: ResponseCache | None = None,
        retry: RetryPolicy | None = None,
        observer: DispatchObserver | None = None,
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._retry = retry or RetryPolicy()
        self._observer = observer
        self._version = importlib.metadata.version("persyn")

    async def run(
        self,
        assignments: Sequence[Assignment],
        options: DispatchOptions,
        on_outcome: Callable[[int, Outcome], None],
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Answer all assignments, each teacher at its own concurrency.

        Args:
            on_outcome: Called with the index of the assignment and its outcome, as each completes.
            should_stop: Asked before each assignment is taken up; those in flight are finished.
        """
        pending: dict[str, deque[tuple[int, Assignment]]] = {}
        for index, assignment in enumerate(assignments):
            pending.setdefault(assignment.teacher, deque()).append((index, assignment))

        async def work(queue: deque[tuple[int, Assignment]]) -> None:
            while queue and not should_stop():
                index, assignment = queue.popleft()
                on_outcome(index, await self.answer(assignment, options))

        async with asyncio.TaskGroup() as group:
            for teacher_id, queue in pending.items():
                for _ in range(min(self._concurrency(teacher_id), len(queue))):
                    group.create_task(work(queue))

    async def answer(self, assignment: Assignment, options: DispatchOptions) -> Outcome:
        """Answer one assignment from its teacher, or from its fallbacks in order if it names any."""
        first_error: ClientError | None = None
        for teacher_id in (assignment.teacher, *assignment.fallbacks):
            try:
                endpoint = self._registry.get(teacher_id)
                body = _checked_body(endpoint.spec, assignment.prompt.messages, options.sampling)
                response = await self._response(endpoint, body, options)
            except ClientError as error:
                logger.info("teacher_failed", extra={"teacher": teacher_id, "error": type(error).__name__})
                first_error = first_error or error
                continue
            provenance = self._provenance(assignment, endpoint.spec, body, response)
            return Answered(assignment.prompt, response.completion, provenance)
        return Failed(
            assignment.prompt, assignment.teacher, first_error or ClientError("no teacher was tried")
        )

    def _concurrency(self, teacher_id: str) -> int:
        known = teacher_id in self._registry.ids
        return self._registry.get(teacher_id).spec.limits.concurrency if known else 1

    async def _response(
        self, endpoint: Endpoint, body: Mapping[str, Any], options: DispatchOptions
    ) -> _Response:
        cache = self._cache if options.cache != "off" else None
        if cache is None:
            self._note_cache("off")
            return _Response(*await self._complete(endpoint, body, options), "off")
        key = response_key(endpoint.spec, body)
        if options.cache == "use" and (entry := await self._cached(cache, key)):
            self._note_cache("hit")
            return _Response(entry.completion, entry.attempts, entry.latency_s, "hit")
        outcome: CacheOutcome = "miss" if options.cache == "use" else "refresh"
        self._note_cache(outcome)
        completion, attempts, latency_s = await self._complete(endpoint, body, options)
        if may_store(completion):
            await self._store(cache, CachedResponse(key, completion, attempts, latency_s))
        return _Response(completion, attempts, latency_s, outcome)

    async def _complete(
        self, endpoint: Endpoint, body: Mapping[str, Any], options: DispatchOptions
    ) -> tuple[Completion, int, float]:
        """The completion, the attempts it took, and the seconds of the last attempt."""
        now_s, deadline_s = asyncio.get_running_loop().time, options.deadline_s
        attempt = 0
        while True:
            attempt += 1
            try:
                completion, latency_s = await self._attempt(endpoint, body, deadline_s)
            except TeacherError as error:
                error.attempts = attempt
                delay_s = self._retry.delay_s(attempt, error)
                late = deadline_s is not None and delay_s is not None and now_s() + delay_s >= deadline_s
                if _is_outage(endpoint, error) and endpoint.breaker.down_s < options.patience_s:
                    # The teacher is down, not this prompt at fault: wait for it and begin again.
                    attempt = 0
                    delay_s = endpoint.breaker.retry_after_s or _PROBE_POLL_S
                elif delay_s is None or late or endpoint.breaker.state == "open":
                    raise  # against an open breaker a retry's wait is too short
            else:
                return completion, attempt, latency_s
            await asyncio.sleep(delay_s)

    async def _attempt(
        self, endpoint: Endpoint, body: Mapping[str, Any], deadline_s: float | None
    ) -> tuple[Completion, float]:
        spec, now_s = endpoint.spec, asyncio.get_running_loop().time
        if endpoint.breaker.state == "open":
            raise _breaker_refusal(endpoint)  # at once, without a wait for the rate limit
        try:
            async with (
                asyncio.timeout_at(deadline_s),
                endpoint.limiter.slot(_estimated_tokens(body)) as reservation,
            ):
                probing = endpoint.breaker.state == "half_open"
                if not endpoint.breaker.allow():
                    raise _breaker_refusal(endpoint)
                started_s = now_s()
                completion = await self._guarded_call(endpoint, body, probing=probing)
                if completion.usage.total_tokens:  # else the teacher counts none: the estimate stands
                    reservation.settle(completion.usage.total_tokens)
                return completion, now_s() - started_s
        except TimeoutError:
            raise TeacherTimeoutError(
                f"teacher {spec.id!r} did not answer before the deadline", teacher_id=spec.id
            ) from None

    async def _guarded_call(
        self, endpoint: Endpoint, body: Mapping[str, Any], *, probing: bool
    ) -> Completion:
        """One upstream call within the teacher's own time-out; tells breaker and observer how it ended."""
        started_s = asyncio.get_running_loop().time()
        outcome = "cancelled"
        try:
            completion = await self._timed_call(endpoint, body)
        except TeacherError as error:
            outcome = type(error).__name__
            if _speaks_of_health(error):
                endpoint.breaker.failed()
            raise
        else:
            outcome = "ok"
            endpoint.breaker.succeeded()
            return completion
        finally:
            if probing:  # a call from before the breaker opened must not free another one's probe
                endpoint.breaker.released()
            if self._observer is not None:
                latency_s = asyncio.get_running_loop().time() - started_s
                self._observer.upstream_called(endpoint.spec.id, outcome, latency_s)

    @staticmethod
    async def _timed_call(endpoint: Endpoint, body: Mapping[str, Any]) -> Completion:
        spec = endpoint.spec
        timeout = asyncio.timeout(spec.timeout_s)
        try:
            # The client's own time-out is per read: a slow drip would never end.
            async with timeout:
                return await endpoint.client.complete(body)
        except TimeoutError:
            if not timeout.expired():
                raise  # the deadline of the whole request, not this teacher's
            raise TeacherTimeoutError(
                f"teacher {spec.id!r} did not answer within {spec.timeout_s:g} s",
                teacher_id=spec.id,
                retryable=True,
            ) from None

    async def _cached(self, cache: ResponseCache, key: str) -> CachedResponse | None:
        try:
            return await cache.get(key)
        except CacheError as error:
            self._note_cache_failure(error)
            return None

    async def _store(self, cache: ResponseCache, entry: CachedResponse) -> None:
        try:
            await cache.put(entry)
        except CacheError as error:
            self._note_cache_failure(error)

    def _note_cache(self, outcome: CacheOutcome) -> None:
        if self._observer is not None:
            self._observer.cache_used(outcome)

    def _note_cache_failure(self, error: CacheError) -> None:
        logger.warning("cache_failed", extra={"reason": error.message})
        if self._observer is not None:
            self._observer.cache_failed()

    def _provenance(
        self, assignment: Assignment, spec: TeacherSpec, body: Mapping[str, Any], response: _Response
    ) -> Provenance:
        completion = response.completion
        return Provenance(
            teacher=spec.id,
            served_model=completion.served_model,
            checkpoint_id=assignment.checkpoint_id,
            strategy=assignment.strategy,
            student=assignment.student,
            distribution=dict(assignment.distribution),
            propensity=assignment.propensity,
            sampling={
                name: value for name, value in body.items() if name not in {"messages", "model", "stream"}
            },
            prompt_hash=messages_hash(assignment.prompt.messages),
            attempts=response.attempts,
            fallback_from=assignment.teacher if spec.id != assignment.teacher else None,
            cache=response.cache,
            usage=completion.usage,
            cost_usd=0.0 if response.cache == "hit" else cost_usd(completion.usage, spec.price or Price()),
            latency_s=round(response.latency_s, 4),
            finish_reason=completion.finish_reason,
            created=completion.created,
            persyn_version=self._version,
        )


def cost_usd(usage: Usage, price: Price) -> float:
    """US dollars for one call."""
    input_usd = usage.prompt_tokens * price.input_usd_per_mtok
    return (input_usd + usage.completion_tokens * price.output_usd_per_mtok) / 1e6


def _speaks_of_health(error: TeacherError) -> bool:
    """Whether the failure is the teacher's, and not that of one request, which would fail again."""
    return error.retryable and isinstance(error, _HEALTH_ERRORS)


def _is_outage(endpoint: Endpoint, error: TeacherError) -> bool:
    return _speaks_of_health(error) and endpoint.breaker.state != "closed"


def _checked_body(
    spec: TeacherSpec, messages: Sequence[ChatMessage], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The request to a teacher, refused if it is not JSON (NaN, a date): one prompt fails, not the run."""
    body = request_body(spec, messages, sampling)
    try:
        canonical_json(body)
    except (TypeError, ValueError) as error:
        raise TeacherRejectedError(
            f"the request to teacher {spec.id!r} is not JSON: {error}", teacher_id=spec.id, attempts=0
        ) from None
    return body


def _breaker_refusal(endpoint: Endpoint) -> TeacherUnavailableError:
    return TeacherUnavailableError(
        f"teacher {endpoint.spec.id!r} has failed repeatedly and is not asked again for "
        f"{endpoint.breaker.retry_after_s:.0f} s",
        teacher_id=endpoint.spec.id,
        retryable=True,
        details={"breaker": endpoint.breaker.state},
    )


def _estimated_tokens(body: Mapping[str, Any]) -> int:
    """Tokens to reserve for a call: the prompt by its length, the answer by what it may use at most."""
    n_chars = sum(len(str(message.get("content") or "")) for message in body["messages"])
    asked = (body.get("max_tokens"), body.get("max_completion_tokens"))
    # Anything else the teacher itself refuses.
    max_tokens = next((value for value in asked if isinstance(value, int) and value > 0), _DEFAULT_MAX_TOKENS)
    n_choices = body.get("n")
    return n_chars // _BYTES_PER_TOKEN + max_tokens * (n_choices if isinstance(n_choices, int) else 1)

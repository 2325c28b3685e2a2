"""``POST /route`` as NDJSON: prompts are read and decisions written at the same time, any number of them."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from clients.schemas import RoutedItem, RouteParameters, RouteSummary, UnroutedItem
from clients.types import RoutingDecision
from service import ndjson
from service.api.dependencies import AppMetrics, OpenServices, Services, StreamPermit
from service.api.problems import error_body
from service.api.route import SHARED_FIELDS
from service.api.streamed_body import AnswersNotTaken, ClientLeft, StreamedAnswer, StreamedBody
from service.bulk_routing import BulkTotals, LineOutcome
from service.connections import abort
from service.errors import StreamStalledError
from service.metrics import Metrics
from service.routing import RoutePlan

logger = structlog.get_logger(__name__)

PATH = "/route"
_ALSO_NDJSON = frozenset(
    {ndjson.MEDIA_TYPE, "application/ndjson", "application/jsonl", "application/x-jsonlines"}
)
_RENDERED_TOGETHER = 32
"""Lines written between two turns of the event loop: other requests are served meanwhile."""
_LINGER_S = 2.0


def is_stream(scope: Scope) -> bool:
    """Whether a request is an NDJSON stream of prompts."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != PATH:
        return False
    media_type = Headers(scope=scope).get("content-type", "").partition(";")[0]
    return media_type.strip().lower() in _ALSO_NDJSON


class StreamRoute(APIRoute):
    """Takes NDJSON alone; any other media type is left to the next route of the same path."""

    label = f"{PATH} ndjson"
    """Of metrics: a stream lasts as long as its client likes, and must not count as a slow call."""

    @override
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See ``APIRoute.matches``."""
        return super().matches(scope) if is_stream(scope) else (Match.NONE, {})


handlers = APIRouter(route_class=StreamRoute)


# Documented with the JSON form, which has the same path and method.
@handlers.post(PATH, include_in_schema=False)
async def route_stream(
    options: Annotated[RouteParameters, Query()],
    services: OpenServices,
    metrics: AppMetrics,
    permit: StreamPermit,
) -> Response:
    """A decision or an error for each line, in the order of the lines, then a summary."""
    plan = services.routing.plan(options)
    # Held until the stream has ended, so that a reload does not close what it uses.
    permit.enter_context(plan.student.served.in_use())
    permit.enter_context(metrics.stream_open())
    await services.routing.require_applicable(plan)
    return DecisionStream(services, plan, metrics)


class DecisionStream(Response):
    """Writes decisions while it reads prompts."""

    media_type = ndjson.MEDIA_TYPE

    def __init__(self, services: Services, plan: RoutePlan, metrics: Metrics) -> None:
        # For nginx: it would otherwise collect the answer, and the client would wait for its end.
        super().__init__(headers={"x-accel-buffering": "no"})
        # The length is not known, so the header that the empty body has set would be wrong.
        del self.headers["content-length"]
        self._services = services
        self._plan = plan
        self._metrics = metrics

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the whole stream, or as far as the client stays."""
        limits = self._services.stream_limits
        body = StreamedBody(receive, limits=limits, on_read=self._metrics.stream_read)
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        answer = StreamedAnswer(send, start, stall_s=limits.stall_s)
        try:
            # At once, for clients that send nothing before they see it; but not before 100 Continue, which
            # the server sends when the body is first asked for.
            if "expect" not in Headers(scope=scope):
                await answer.start()
            await self._answer(body, answer)
        except* ClientLeft:
            logger.info("stream_left")
        except* AnswersNotTaken:
            logger.warning("stream_not_taken", stall_s=limits.stall_s)
            await _cut_off(scope, receive)

    async def _answer(self, body: StreamedBody, answer: StreamedAnswer) -> None:
        async def deliver(outcomes: Sequence[LineOutcome]) -> None:
            for start in range(0, len(outcomes), _RENDERED_TOGETHER):
                some = outcomes[start : start + _RENDERED_TOGETHER]
                await answer.write(self._line(outcome) for outcome in some)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            watchers = [group.create_task(body.watch()), group.create_task(self._pass_on_stop(body))]
            totals = await self._services.bulk.run(self._plan, body.chunks(), deliver)
            await answer.write([self._summary(totals).model_dump_json().encode() + b"\n"])
            for watcher in watchers:
                watcher.cancel()
        if totals.failure is not None and not isinstance(totals.failure, StreamStalledError):
            await body.discard(at_most_s=_LINGER_S)
        await answer.end()
        logger.info(
            "stream_answered",
            ok=totals.n_routed,
            failed=totals.n_failed,
            error=type(totals.failure).__name__ if totals.failure else None,
        )

    async def _pass_on_stop(self, body: StreamedBody) -> None:
        await self._services.stopping.wait()
        body.stop()

    def _line(self, outcome: LineOutcome) -> bytes:
        decision = outcome.decision
        item: RoutedItem | UnroutedItem
        if isinstance(decision, RoutingDecision):
            item = RoutedItem(
                id=decision.prompt_id,
                line=outcome.line,
                checkpoint_id=self._plan.student.manifest.checkpoint_id,
                **{name: getattr(decision, name) for name in SHARED_FIELDS},
            )
        else:
            item = UnroutedItem(id=outcome.prompt_id, line=outcome.line, error=error_body(decision))
        return item.model_dump_json().encode() + b"\n"

    def _summary(self, totals: BulkTotals) -> RouteSummary:
        return RouteSummary(
            ok=totals.n_routed,
            failed=totals.n_failed,
            lines=totals.last_line,
            checkpoint_id=self._plan.student.manifest.checkpoint_id,
            student=self._plan.student.spec.id,
            strategy=self._plan.options.strategy,
            alpha=self._plan.alpha,
            coverage=totals.coverage,
            error=None if totals.failure is None else error_body(totals.failure),
        )


async def _cut_off(scope: Scope, receive: Receive) -> None:
    """Cut off the connection and wait until the server has seen it."""
    if abort(scope):
        while (await receive())["type"] != "http.disconnect":
            pass

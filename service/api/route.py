"""``POST /route``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated

from fastapi import APIRouter, Body, Response

from clients.schemas import DecisionBody, RouteRequest, RouteResponse
from clients.types import RoutingDecision
from service.api.dependencies import OpenServices
from service.api.examples import ROUTE_REQUESTS, ROUTE_RESPONSE
from service.api.problems import documented

handlers = APIRouter(tags=["routing"])

_SHARED_FIELDS = tuple(field.name for field in fields(RoutingDecision) if field.name != "prompt_id")


@handlers.post(
    "/route",
    response_model=RouteResponse,
    responses={
        200: {"content": {"application/json": {"example": ROUTE_RESPONSE}}},
        **documented(400, 401, 404, 413, 422, 429, 500, 503),
    },
    summary="Choose a teacher for each prompt",
)
async def route(
    request: Annotated[RouteRequest, Body(openapi_examples=ROUTE_REQUESTS)], services: OpenServices
) -> Response:
    """Which teacher suits each prompt, in the order of the prompts. No teacher is asked."""
    routed = await services.routing.route(request)
    decisions = []
    for decision in routed.decisions:
        if isinstance(decision, Exception):
            raise decision
        decisions.append(_decision_body(decision))
    body = RouteResponse(
        checkpoint_id=routed.checkpoint_id,
        student=routed.student,
        strategy=routed.strategy,
        alpha=routed.alpha,
        coverage=routed.coverage,
        decisions=decisions,
    )
    return Response(
        body.model_dump_json(),
        media_type="application/json",
        headers={"server-timing": server_timing(routed.timings_s)},
    )


def server_timing(timings_s: Mapping[str, float]) -> str:
    """The ``Server-Timing`` header: durations in milliseconds."""
    return ", ".join(f"{name};dur={duration_s * 1e3:.2f}" for name, duration_s in timings_s.items())


def _decision_body(decision: RoutingDecision) -> DecisionBody:
    return DecisionBody(id=decision.prompt_id, **{name: getattr(decision, name) for name in _SHARED_FIELDS})

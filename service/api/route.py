"""``POST /route`` as JSON; as NDJSON it is in ``route_stream.py``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.exceptions import RequestValidationError

from clients.schemas import DecisionBody, RouteParameters, RouteRequest, RouteResponse
from clients.types import RoutingDecision
from service import ndjson
from service.api.dependencies import OpenServices
from service.api.examples import ROUTE_LINES, ROUTE_REQUESTS, ROUTE_RESPONSE, ROUTED_LINES
from service.api.problems import documented

handlers = APIRouter(tags=["routing"])

_LINES = {"type": "string", "description": "One JSON value per line."}

SHARED_FIELDS = tuple(field.name for field in fields(RoutingDecision) if field.name != "prompt_id")


@handlers.post(
    "/route",
    response_model=RouteResponse,
    responses={
        200: {
            "content": {
                "application/json": {"example": ROUTE_RESPONSE},
                ndjson.MEDIA_TYPE: {"schema": _LINES, "example": ROUTED_LINES},
            }
        },
        **documented(400, 401, 404, 413, 422, 429, 500, 503),
    },
    summary="Choose a teacher for each prompt",
    openapi_extra={
        "parameters": [
            {
                "name": name,
                "in": "query",
                "schema": schema,
                "description": "Of an NDJSON request alone; a JSON request has it in its body.",
            }
            for name, schema in RouteParameters.model_json_schema()["properties"].items()
        ],
        "requestBody": {"content": {ndjson.MEDIA_TYPE: {"schema": _LINES, "example": ROUTE_LINES}}},
    },
)
async def route(
    request: Annotated[RouteRequest, Body(openapi_examples=ROUTE_REQUESTS)],
    services: OpenServices,
    http_request: Request,
) -> Response:
    """Which teacher suits each prompt, in the order of the prompts. No teacher is asked.

    As NDJSON, any number of prompts: one per line of the request, a text or an object as in `prompts`, and
    the options as query parameters. The answer is NDJSON too, a line for each, as the request comes.
    """
    _require_options_in_body(http_request)
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


def _require_options_in_body(http_request: Request) -> None:
    """Refuse options that would be ignored where they stand."""
    misplaced = sorted(RouteParameters.model_fields.keys() & http_request.query_params.keys())
    if misplaced:
        message = (
            f"a JSON request has its options in its body; in the query they are those of {ndjson.MEDIA_TYPE}"
        )
        raise RequestValidationError([{"loc": ("query", name), "msg": message} for name in misplaced])


def server_timing(timings_s: Mapping[str, float]) -> str:
    """The ``Server-Timing`` header: durations in milliseconds."""
    return ", ".join(f"{name};dur={duration_s * 1e3:.2f}" for name, duration_s in timings_s.items())


def _decision_body(decision: RoutingDecision) -> DecisionBody:
    return DecisionBody(id=decision.prompt_id, **{name: getattr(decision, name) for name in SHARED_FIELDS})

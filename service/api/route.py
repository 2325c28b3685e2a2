"""``POST /route`` as JSON; as NDJSON it is in ``route_stream.py``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send
from typing_extensions import override

from clients.schemas import DecisionBody, RouteParameters, RouteRequest, RouteResponse
from clients.types import RoutingDecision
from service import ndjson
from service.api.dependencies import OpenServices, get_services
from service.api.examples import ROUTE_LINES, ROUTE_REQUESTS, ROUTE_RESPONSE, ROUTED_LINES
from service.api.problems import documented

_JSON = b"application/json"


class JsonRoute(APIRoute):
    """Validates a body straight from its bytes and calls the handler, for half of the work of a small call.

    What is not so plain (another media type, a body that does not fit) goes FastAPI's way, with its messages.
    """

    @override
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``APIRoute.handle``. The body has been read: it is one message."""
        if scope["method"] != "POST" or (b"content-type", _JSON) not in scope["headers"]:
            await super().handle(scope, receive, send)
            return
        messages = [await receive()]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        try:
            request = RouteRequest.model_validate_json(messages[0]["body"])
        except ValidationError:
            await super().handle(scope, receive_again, send)
            return
        http_request = Request(scope)
        response = await route(request, await get_services(http_request), http_request)
        await response(scope, receive, send)


handlers = APIRouter(tags=["routing"], route_class=JsonRoute)

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
    # Built of our own values: to validate them would only take time.
    body = RouteResponse.model_construct(
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
    shared = {name: getattr(decision, name) for name in SHARED_FIELDS}
    shared["conformal_set"] = list(decision.conformal_set)
    return DecisionBody.model_construct(id=decision.prompt_id, **shared)

"""Exception to status: the one table, and the problem documents (RFC 9457) made from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import structlog
from fastapi import Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from clients import errors as client_errors
from clients.errors import PersynError
from clients.schemas import ErrorBody, Problem
from router_model import errors as router_errors
from service import errors as service_errors

logger = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:persyn:problem:"

Source = Literal["client", "persyn", "teacher", "cache"]
OptionsPlace = Literal["body", "query"]


@dataclass(frozen=True, slots=True)
class Row:
    """How one kind of error is shown. ``quoted``: whether its message may leave the process."""

    status: int
    slug: str
    title: str
    source: Source
    quoted: bool = True


INTERNAL = Row(500, "internal", "Internal error", "persyn", quoted=False)
_MISCONFIGURED = Row(500, "misconfigured", "The service is misconfigured", "persyn", quoted=False)

ROWS: Mapping[type[Exception], Row] = {
    PersynError: INTERNAL,
    client_errors.ConfigurationError: _MISCONFIGURED,
    client_errors.ClientError: INTERNAL,
    client_errors.TeacherError: Row(502, "teacher-failed", "The teacher gave no usable answer", "teacher"),
    client_errors.TeacherTimeoutError: Row(
        504, "teacher-timeout", "The teacher did not answer in time", "teacher"
    ),
    client_errors.TeacherUnavailableError: Row(
        503, "teacher-unavailable", "The teacher is unavailable", "teacher"
    ),
    client_errors.TeacherRateLimitedError: Row(
        429, "teacher-rate-limited", "The teacher limits our requests", "teacher"
    ),
    client_errors.TeacherRejectedError: Row(
        502, "teacher-rejected", "The teacher refused the request", "teacher"
    ),
    client_errors.TeacherProtocolError: Row(
        502, "teacher-protocol", "The teacher's answer is not a chat completion", "teacher"
    ),
    client_errors.UnknownTeacherError: Row(422, "unknown-teacher", "There is no such teacher", "client"),
    client_errors.CacheError: Row(503, "cache-failed", "The cache cannot be used", "cache", quoted=False),
    client_errors.ServiceResponseError: INTERNAL,
    router_errors.RouterError: Row(500, "router-failed", "The prompt could not be routed", "persyn"),
    router_errors.StrategyError: Row(
        422, "strategy-not-applicable", "The router cannot serve this strategy", "client"
    ),
    router_errors.CheckpointError: _MISCONFIGURED,
    router_errors.BackboneError: _MISCONFIGURED,
    router_errors.TableError: INTERNAL,
    router_errors.QualityError: INTERNAL,
    router_errors.PipelineError: INTERNAL,
    service_errors.ServiceError: INTERNAL,
    service_errors.OverloadedError: Row(429, "overloaded", "The service is overloaded", "persyn"),
    service_errors.DeadlineExceededError: Row(504, "deadline-exceeded", "The deadline has passed", "persyn"),
    service_errors.NotReadyError: Row(503, "not-ready", "The service is not ready", "persyn"),
    service_errors.UnknownStudentError: Row(404, "unknown-student", "There is no such student", "client"),
    service_errors.ReloadFailedError: Row(409, "reload-failed", "A checkpoint was not reloaded", "persyn"),
    service_errors.UnauthorizedError: Row(401, "unauthorized", "A valid API key is needed", "client"),
    service_errors.PayloadTooLargeError: Row(
        413, "payload-too-large", "The request body is too large", "client"
    ),
    service_errors.StreamStalledError: Row(408, "stream-stalled", "The stream stands still", "client"),
    service_errors.InvalidRequestError: Row(422, "invalid-request", "The request is invalid", "client"),
    RequestValidationError: Row(422, "invalid-request", "The request is invalid", "client"),
}

INHERITING: frozenset[type[PersynError]] = frozenset({router_errors.PipelineError})
"""Branches whose subclasses need no row: offline errors, which no request can raise."""

_HTTP_SLUGS: Mapping[int, str] = {
    400: "bad-request",
    404: "not-found",
    405: "method-not-allowed",
}


def row_of(error: Exception) -> Row:
    """The row of an error: its own, or that of its nearest ancestor; ``INTERNAL`` if it has none."""
    return next((ROWS[kind] for kind in type(error).__mro__ if kind in ROWS), INTERNAL)


def problem_of(
    error: Exception, request_id: str | None = None, *, options_in: OptionsPlace = "body"
) -> Problem:
    """The problem document of an error, without anything that its row does not let out.

    Args:
        options_in: Where the request has its options.
    """
    if isinstance(error, HTTPException):
        return _http_problem(error, request_id)
    row = row_of(error)
    return Problem(
        type=TYPE_PREFIX + row.slug,
        title=row.title,
        status=row.status,
        detail=_detail(error, row),
        source=row.source,
        retryable=isinstance(error, PersynError) and error.retryable,
        request_id=request_id,
        errors=_field_errors(error, options_in),
    )


def error_body(error: Exception) -> ErrorBody:
    """Why one item of ``/synthesize`` failed: the same table, without status and request id."""
    log_unexpected(error)
    problem = problem_of(error)
    return ErrorBody(
        type=problem.type,
        title=problem.title,
        detail=problem.detail,
        source=problem.source,
        retryable=problem.retryable,
    )


def problem_response(
    error: Exception, request_id: str | None, *, options_in: OptionsPlace = "body"
) -> Response:
    """The problem document as an HTTP response, with ``Retry-After`` and the like where they are known."""
    log_unexpected(error)
    problem = problem_of(error, request_id, options_in=options_in)
    return Response(
        problem.model_dump_json(exclude_none=True),
        status_code=problem.status,
        headers=_headers(error),
        media_type=MEDIA_TYPE,
    )


def log_unexpected(error: Exception) -> None:
    """Write the traceback of an error that only we can explain; the caller gets no detail of it."""
    if not isinstance(error, HTTPException) and not row_of(error).quoted:
        logger.error("request_failed", error=type(error).__name__, exc_info=error)


def _detail(error: Exception, row: Row) -> str:
    if isinstance(error, RequestValidationError):
        return "The request does not fit its schema; errors names each place."
    if isinstance(error, PersynError) and row.quoted:
        return error.message
    return "The cause is in the log of the service, under this request id."


def _field_errors(error: Exception, options_in: OptionsPlace) -> list[dict[str, Any]] | None:
    if isinstance(error, RequestValidationError):
        return [{"loc": list(_spelt(fault["loc"])), "msg": fault["msg"]} for fault in error.errors()]
    if isinstance(error, router_errors.StrategyError) and "field" in error.details:
        return [{"loc": [options_in, error.details["field"]], "msg": error.message}]
    if isinstance(error, service_errors.InvalidRequestError):
        return [{"loc": [options_in, *error.loc], "msg": error.message}]
    return None


def _spelt(loc: Sequence[str | int]) -> Sequence[str | int]:
    """A place in the body. Keys of the caller's own are shown as far as UTF-8 can write them."""
    return [part.encode("utf-8", "replace").decode() if isinstance(part, str) else part for part in loc]


def _http_problem(error: HTTPException, request_id: str | None) -> Problem:
    """What the framework itself refuses: no such path, wrong method, unreadable body."""
    title = HTTPStatus(error.status_code).phrase
    return Problem(
        type=TYPE_PREFIX + _HTTP_SLUGS.get(error.status_code, "bad-request"),
        title=title,
        status=error.status_code,
        detail=str(error.detail or title),
        source="client",
        retryable=False,
        request_id=request_id,
    )


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, HTTPException):
        return dict(error.headers or {})
    if isinstance(error, service_errors.UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    retry_after_s = getattr(error, "retry_after_s", None)
    if isinstance(retry_after_s, float | int):
        return {"retry-after": str(math.ceil(retry_after_s))}
    return {}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of an endpoint: these statuses carry a problem document."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses}

"""The table from exception to status, and the problem documents made from it."""

import importlib
import json
import pkgutil
from collections.abc import Iterator

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from structlog.testing import capture_logs

import clients
import router_model
import service
from clients.errors import (
    ConfigurationError,
    PersynError,
    TeacherProtocolError,
    TeacherRateLimitedError,
    TeacherRejectedError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from router_model.errors import StrategyError
from service.api.problems import (
    INHERITING,
    ROWS,
    TYPE_PREFIX,
    error_body,
    problem_of,
    problem_response,
    row_of,
)
from service.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
    UnauthorizedError,
    UnknownStudentError,
)


def _import_all() -> None:
    for package in (clients, router_model, service):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def _tree(kind: type[PersynError]) -> Iterator[type[PersynError]]:
    # Classes that tests define are not ours.
    if kind.__module__.split(".")[0] in {"clients", "router_model", "service"}:
        yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def test_every_error_has_its_row() -> None:
    """Every class of the error tree has a row, save the subclasses of branches that say they inherit."""
    _import_all()
    missing = [
        kind.__name__
        for kind in _tree(PersynError)
        if kind not in ROWS and not any(issubclass(kind, branch) for branch in INHERITING)
    ]
    assert not missing


def test_types_are_unique_to_a_status() -> None:
    """One problem type never comes with two statuses or two culprits: clients may switch on it."""
    seen: dict[str, tuple[int, str]] = {}
    for row in ROWS.values():
        assert seen.setdefault(row.slug, (row.status, row.source)) == (row.status, row.source)


@pytest.mark.parametrize(
    ("error", "status", "source", "retryable"),
    [
        (InvalidRequestError("m", loc=("prompts", 0)), 422, "client", False),
        (UnauthorizedError("m"), 401, "client", False),
        (UnknownStudentError("m"), 404, "client", False),
        (PayloadTooLargeError("m"), 413, "client", False),
        (OverloadedError("m", retry_after_s=2.5), 429, "persyn", True),
        (NotReadyError("m"), 503, "persyn", True),
        (DeadlineExceededError("m"), 504, "persyn", True),
        (TeacherRejectedError("m", teacher_id="t"), 502, "teacher", False),
        (TeacherProtocolError("m", teacher_id="t", retryable=True), 502, "teacher", True),
        (TeacherUnavailableError("m", teacher_id="t", retryable=True), 503, "teacher", True),
        (TeacherTimeoutError("m", teacher_id="t", retryable=True), 504, "teacher", True),
        (TeacherRateLimitedError("m", teacher_id="t"), 429, "teacher", True),
    ],
)
def test_who_is_at_fault(error: PersynError, status: int, source: str, retryable: bool) -> None:
    """Status, culprit and whether to retry are those of the contract, and the message is the detail."""
    problem = problem_of(error, "r-1")
    assert (problem.status, problem.source, problem.retryable) == (status, source, retryable)
    assert (problem.detail, problem.request_id) == ("m", "r-1")
    assert problem.type.startswith(TYPE_PREFIX)


def test_the_document_is_rfc_9457() -> None:
    """Media type, status and members are those of RFC 9457; Retry-After is in whole seconds, rounded up."""
    response = problem_response(OverloadedError("busy", retry_after_s=2.1), "r-2")
    assert response.status_code == 429
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["retry-after"] == "3"
    assert json.loads(bytes(response.body)) == {
        "type": "urn:persyn:problem:overloaded",
        "title": "The service is overloaded",
        "status": 429,
        "detail": "busy",
        "source": "persyn",
        "retryable": True,
        "request_id": "r-2",
    }


def test_a_refused_key_says_which_scheme() -> None:
    """401 carries WWW-Authenticate, as RFC 9110 demands."""
    assert problem_response(UnauthorizedError("no"), None).headers["www-authenticate"] == "Bearer"


def test_teacher_rate_limits_pass_on_the_wait() -> None:
    """Retry-After of a teacher is passed on where the teacher gave one, and left out where it did not."""
    known = problem_response(TeacherRateLimitedError("m", teacher_id="t", retry_after_s=7.0), None)
    unknown = problem_response(TeacherRateLimitedError("m", teacher_id="t"), None)
    assert known.headers["retry-after"] == "7"
    assert "retry-after" not in unknown.headers


def test_validation_errors_name_the_place_and_not_the_value() -> None:
    """A validation problem has loc and msg of each fault; the value, which may be a prompt, is left out."""
    fault = {"loc": ("body", "alpha", "\ud800"), "msg": "too big", "input": "my private prompt", "type": "x"}
    body = json.loads(bytes(problem_response(RequestValidationError([fault]), None).body))
    assert body["status"] == 422
    assert body["errors"] == [{"loc": ["body", "alpha", "?"], "msg": "too big"}]
    assert "private" not in json.dumps(body)


def test_an_option_that_a_strategy_does_not_read_is_named() -> None:
    """A refused strategy names the field at fault where it is known, and has no list of fields otherwise."""
    named = problem_of(StrategyError("temperature has no meaning", details={"field": "temperature"}))
    assert (named.status, named.source) == (422, "client")
    assert named.errors == [{"loc": ["body", "temperature"], "msg": "temperature has no meaning"}]
    assert problem_of(StrategyError("no such alpha")).errors is None


def test_framework_errors_are_problems_too() -> None:
    """404 and 405 of the framework keep their status and their headers."""
    response = problem_response(HTTPException(405, headers={"allow": "POST"}), "r")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert json.loads(bytes(response.body))["type"] == "urn:persyn:problem:method-not-allowed"


@pytest.mark.parametrize("error", [RuntimeError("secret path /x"), ConfigurationError("secret path /x")])
def test_internal_errors_leak_nothing_and_are_logged(error: Exception) -> None:
    """What only we can explain is a 500 without its message; the log has the error."""
    with capture_logs() as entries:
        problem = problem_of(error)
        body = error_body(error)
    assert problem.status == 500
    assert "secret" not in problem.model_dump_json() + body.model_dump_json()
    assert entries == [
        {
            "event": "request_failed",
            "log_level": "error",
            "error": type(error).__name__,
            "exc_info": error,
        }
    ]


def test_a_subclass_without_row_is_shown_as_its_ancestor() -> None:
    """An error made by a plug-in is shown as the nearest known kind, not as a bare 500."""

    class OddTeacherError(TeacherRejectedError):
        """Not in the table."""

    assert row_of(OddTeacherError("m", teacher_id="t")).slug == "teacher-rejected"

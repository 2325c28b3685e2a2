"""The root of every error that PerSyn raises, and the branch of the bottom layer."""

from collections.abc import Mapping
from typing import Any


class PersynError(Exception):
    """Something that PerSyn can name went wrong.

    Args:
        message: What happened, what was expected, what to do. Never a prompt, never a secret.
        details: Machine-readable facts for logs and problem documents.
        retryable: Whether the same call may succeed later without a change.
    """

    def __init__(
        self, message: str, *, details: Mapping[str, Any] | None = None, retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        self.retryable = retryable


class ConfigurationError(PersynError):
    """The project file, a flag or the environment is wrong. Raised at start-up only."""


class ClientError(PersynError):
    """Root of the errors of ``clients``."""


class TeacherError(ClientError):
    """A teacher gave no usable answer.

    Args:
        teacher_id: The teacher as named in ``persyn.yaml``.
        attempts: Upstream calls made before giving up.
    """

    def __init__(
        self,
        message: str,
        *,
        teacher_id: str,
        attempts: int = 1,
        retryable: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, details=details, retryable=retryable)
        self.teacher_id = teacher_id
        self.attempts = attempts


class TeacherTimeoutError(TeacherError):
    """The teacher did not answer within the deadline."""


class TeacherUnavailableError(TeacherError):
    """The teacher could not be reached, or answered 5xx."""


class TeacherRateLimitedError(TeacherError):
    """The teacher answered 429.

    Args:
        retry_after_s: Seconds the teacher asked us to wait, if it said so.
    """

    def __init__(
        self,
        message: str,
        *,
        teacher_id: str,
        attempts: int = 1,
        retry_after_s: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, teacher_id=teacher_id, attempts=attempts, retryable=True, details=details)
        self.retry_after_s = retry_after_s


class TeacherRejectedError(TeacherError):
    """The teacher refused the request itself (4xx): the same request will fail again."""


class TeacherProtocolError(TeacherError):
    """A 200 without a usable answer.

    Retryable if it is no chat completion (HTML, an error body, no choices, a cut body); not if it is one
    that says nothing (an empty message): that was paid for and would come again.
    """


class UnknownTeacherError(ClientError):
    """A teacher id that the registry does not hold."""


class CacheError(ClientError):
    """The cache failed. Never leaves ``clients``: the dispatcher serves without the cache."""


class ServiceResponseError(ClientError):
    """The PerSyn service answered a client with a problem document.

    Args:
        status: HTTP status.
        problem: The parsed ``application/problem+json`` body, empty if there was none.
        retry_after_s: Seconds the service asked us to wait, if it said so.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        problem: Mapping[str, Any],
        retryable: bool,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, details=problem, retryable=retryable)
        self.status = status
        self.problem = dict(problem)
        self.retry_after_s = retry_after_s

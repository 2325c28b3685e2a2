"""The branch of the error tree that belongs to the service. Statuses stand in ``api/problems.py``."""

from collections.abc import Mapping, Sequence

from clients.errors import PersynError


class ServiceError(PersynError):
    """Root of the errors of ``service``."""


class OverloadedError(ServiceError):
    """No permit is free. The caller is told at once and should come back later.

    Args:
        retry_after_s: Seconds after which another attempt makes sense.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, details={"retry_after_s": retry_after_s}, retryable=True)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(ServiceError):
    """The caller's deadline passed before its prompts were routed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class NotReadyError(ServiceError):
    """The service is starting or stopping, or a student has not done its first forward pass."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class UnknownStudentError(ServiceError):
    """A student id that the project file does not define."""


class UnauthorizedError(ServiceError):
    """The request carries no valid API key."""


class PayloadTooLargeError(ServiceError):
    """The request body is longer than the limit."""


class StreamStalledError(ServiceError):
    """The client of a stream sends nothing, or does not take the answers."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class InvalidRequestError(ServiceError):
    """A well-formed request that cannot be served as it is.

    Args:
        message: What is wrong, without quoting a prompt.
        loc: Where in the request, as in pydantic's errors, less the first part (body or query).
    """

    def __init__(self, message: str, *, loc: Sequence[str | int]) -> None:
        super().__init__(message)
        self.loc = tuple(loc)


class ReloadFailedError(ServiceError):
    """A checkpoint could not be reloaded; the routers from before serve.

    Args:
        reasons: By student id.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        told = "; ".join(f"{student}: {reason}" for student, reason in reasons.items())
        super().__init__(f"not reloaded, the router from before serves: {told}", details={"failed": reasons})

"""What is retryable, how long to wait, and how ``Retry-After`` is read. The only place for each."""

import email.utils
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from clients.errors import ServiceResponseError, TeacherError, TeacherRateLimitedError

RETRYABLE_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed. Any other 4xx is a refusal of the request."""

_MAX_RETRY_AFTER_S = 120.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter: the delay is uniform in [0, min(cap, base * 2^attempt)].

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    ``Retry-After`` of a teacher or of the service is a lower bound on the delay.
    """

    max_attempts: int = 4
    base_s: float = 0.5
    cap_s: float = 20.0
    uniform: Callable[[float, float], float] = field(default=random.uniform, repr=False)

    def delay_s(self, attempt: int, error: TeacherError | ServiceResponseError) -> float | None:
        """Seconds to wait after failed attempt number ``attempt`` (from 1); ``None`` is: give up."""
        if not error.retryable or attempt >= self.max_attempts:
            return None
        jittered = self.uniform(0.0, min(self.cap_s, self.base_s * 2 ** (attempt - 1)))
        may_ask = TeacherRateLimitedError | ServiceResponseError
        asked = error.retry_after_s if isinstance(error, may_ask) else None
        return jittered if asked is None else max(jittered, asked)


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds in a ``Retry-After`` header (delta-seconds or HTTP date), within [0, 120].

    ``None`` if the header is absent or malformed.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - (now or datetime.now(UTC))).total_seconds()
    if math.isnan(seconds):
        return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)

"""Which errors are retried, and after how long."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.errors import TeacherRateLimitedError, TeacherRejectedError, TeacherUnavailableError
from clients.retry import RETRYABLE_STATUSES, RetryPolicy, parse_retry_after

NOW = datetime(2026, 1, 1, tzinfo=UTC)
down = TeacherUnavailableError("down", teacher_id="a", retryable=True)


def _limited(retry_after_s):
    return TeacherRateLimitedError("429", teacher_id="a", retry_after_s=retry_after_s)


def test_delay_is_drawn_from_zero_to_a_doubling_cap():
    """Full jitter: the interval starts at 0, doubles with each attempt and stops at the cap."""
    intervals = []
    policy = RetryPolicy(
        max_attempts=9, base_s=0.5, cap_s=3.0, uniform=lambda *bounds: intervals.append(bounds) or 0
    )
    for attempt in range(1, 6):
        policy.delay_s(attempt, down)
    assert intervals == [(0.0, 0.5), (0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (0.0, 3.0)]


def test_delays_differ_between_callers():
    """Callers that failed together do not come back together."""
    assert len({RetryPolicy().delay_s(3, down) for _ in range(20)}) > 1


def test_gives_up_after_the_last_attempt():
    """The last allowed attempt is not followed by another one."""
    policy = RetryPolicy(max_attempts=3)
    assert policy.delay_s(2, down) is not None
    assert policy.delay_s(3, down) is None


def test_refusal_is_never_retried():
    """An error that is not retryable ends the call at the first attempt."""
    assert RetryPolicy().delay_s(1, TeacherRejectedError("400", teacher_id="a")) is None


@pytest.mark.parametrize(
    ("asked", "drawn", "waits"), [(7.0, 0.2, 7.0), (0.1, 0.4, 0.4), (0.0, 0.3, 0.3), (None, 0.3, 0.3)]
)
def test_retry_after_is_a_lower_bound(asked, drawn, waits):
    """The wait is never shorter than the teacher asked for, nor shorter than the back-off."""
    assert RetryPolicy(uniform=lambda _low, _high: drawn).delay_s(1, _limited(asked)) == waits


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("0", 0.0),
        ("-5", 0.0),
        ("86400", 120.0),
        ("inf", 120.0),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0),
        ("Wed, 31 Dec 2025 23:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 00:00:30 -0000", 30.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_forms(header, seconds):
    """Seconds and HTTP dates are read and bounded; anything else counts as absent."""
    assert parse_retry_after(header, NOW) == seconds


@given(
    st.text()
    | st.from_regex(r"(Mon, )?\d{1,3} [A-Z][a-z]{2} \d{1,6} \d{1,2}:\d{1,2}(:\d{1,3})? [+-]?\w{1,5}")
)
def test_no_header_can_break_the_client(header):
    """Whatever a teacher sends as Retry-After, the result is absent or within bounds."""
    seconds = parse_retry_after(header, NOW)
    assert seconds is None or 0.0 <= seconds <= 120.0


def test_which_statuses_are_retryable():
    """Overload and outage may pass; a refusal of the request, of the key or of the model does not."""
    assert {408, 429, 500, 502, 503, 504} <= RETRYABLE_STATUSES
    assert not RETRYABLE_STATUSES & {400, 401, 403, 404, 413, 422}

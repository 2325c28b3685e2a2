"""The circuit breaker on a fake clock."""

import pytest

from clients.breaker import Breaker


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(clock, threshold=3, pause_s=10.0)


def _open(breaker):
    for _ in range(3):
        breaker.failed()


def test_opens_at_the_threshold_and_not_before(breaker):
    """Consecutive failures up to the threshold leave it closed; the next one opens it."""
    breaker.failed()
    breaker.failed()
    assert (breaker.state, breaker.allow()) == ("closed", True)
    breaker.failed()
    assert (breaker.state, breaker.allow()) == ("open", False)


def test_a_success_restarts_the_count(breaker):
    """Only consecutive failures count."""
    states = []
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        states.append(breaker.state)
        breaker.succeeded()
    assert states == ["closed"] * 5


def test_refuses_for_exactly_the_pause(breaker, clock):
    """While open it says how long it will refuse, and refuses until then."""
    _open(breaker)
    clock.now_s += 9.5
    assert breaker.retry_after_s == pytest.approx(0.5)
    assert not breaker.allow()
    clock.now_s += 0.5
    assert (breaker.state, breaker.retry_after_s) == ("half_open", 0.0)


def test_half_open_allows_one_probe_at_a_time(breaker, clock):
    """After the pause one call may probe; others are refused while it is under way."""
    _open(breaker)
    clock.now_s += 10.0
    assert [breaker.allow() for _ in range(3)] == [True, False, False]


def test_probe_that_succeeds_closes(breaker, clock):
    """One answer is enough to let all calls through again."""
    _open(breaker)
    clock.now_s += 10.0
    breaker.allow()
    breaker.succeeded()
    assert breaker.state == "closed"
    assert all(breaker.allow() for _ in range(3))


def test_probe_that_fails_opens_for_a_whole_pause(breaker, clock):
    """One failed probe is enough to refuse for another pause."""
    _open(breaker)
    clock.now_s += 10.0
    breaker.allow()
    breaker.failed()
    assert breaker.retry_after_s == pytest.approx(10.0)
    assert not breaker.allow()


def test_probe_without_verdict_frees_the_probe(breaker, clock):
    """A probe that was cancelled does not lock the teacher out for ever."""
    _open(breaker)
    clock.now_s += 10.0
    assert breaker.allow()
    breaker.released()
    assert breaker.state == "half_open"
    assert breaker.allow()

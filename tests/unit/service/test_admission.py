"""Admission: a bound that refuses at once."""

import pytest

from service.admission import Admission
from service.errors import OverloadedError


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_bound_is_exact() -> None:
    """As many permits as the capacity are given; one more is refused; a returned one is given again."""
    admission = Admission(3, unit="calls", clock=Clock())
    with admission.permits(2), admission.permits(1):
        with pytest.raises(OverloadedError), admission.permits(1):
            pytest.fail("admitted above the capacity")
        assert admission.n_held == 3
    with admission.permits(3):
        assert admission.n_held == 3
    assert admission.n_held == 0


def test_a_call_larger_than_the_bound_is_admitted_alone() -> None:
    """One call above the capacity is served when nothing else is, else it could never be."""
    admission = Admission(3, unit="prompts", clock=Clock())
    with admission.permits(10), pytest.raises(OverloadedError), admission.permits(1):
        pytest.fail("admitted beside a call that fills the queue")
    with admission.permits(1), pytest.raises(OverloadedError), admission.permits(10):
        pytest.fail("admitted above the capacity")


def test_permits_come_back_after_a_failure() -> None:
    """An exception inside the block returns its permits: no leak, no self-made 429."""
    admission = Admission(1, unit="calls", clock=Clock())
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.permits():
            _ = 1 / 0
    assert admission.n_held == 0


def test_retry_after_follows_how_long_permits_were_held() -> None:
    """The hint is how long callers held permits of late, within a second and a minute."""
    clock = Clock()
    admission = Admission(1, unit="calls", clock=clock)

    def hint_s() -> float:
        with admission.permits(), pytest.raises(OverloadedError) as refusal, admission.permits():
            pytest.fail("admitted")
        return refusal.value.retry_after_s

    assert hint_s() == 1.0
    for _ in range(50):
        with admission.permits():
            clock.now_s += 12.0
    assert hint_s() == pytest.approx(12.0, rel=0.01)
    for _ in range(50):
        with admission.permits():
            clock.now_s += 900.0
    assert hint_s() == 60.0

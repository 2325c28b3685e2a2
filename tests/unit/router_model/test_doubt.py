"""What the first choice may cost: great where two teachers are close and the ensemble disagrees."""

import numpy as np
import pytest

from router_model.doubt import expected_loss, jackknife_error
from router_model.outlook import Outlook


def outlook(margin: float, spread: float, n_members: int = 5) -> Outlook:
    """One prompt with two teachers; the members disagree about the lead by ``spread``."""
    lead_E = margin + spread * np.linspace(-1, 1, n_members)
    members = np.stack([lead_E, np.zeros(n_members)], axis=-1)[:, None]
    return Outlook(0.0, np.array([[margin, 0.0]]), np.array([[margin, 0.0]]), members, True, None, None)


def test_the_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    """Leaving one value out at a time gives s / sqrt(n)."""
    values = np.random.default_rng(0).normal(size=20)
    left_out = np.array([np.delete(values, index).mean() for index in range(20)])
    assert float(jackknife_error(left_out)) == pytest.approx(values.std(ddof=1) / np.sqrt(20))


def test_the_expected_loss_is_that_of_a_normal_difference() -> None:
    """By simulation."""
    seen = outlook(0.5, 0.4)
    error = float(jackknife_error(seen.members_EBM[:, 0, 0]))
    drawn = np.random.default_rng(0).normal(0.5, error, size=1_000_000)
    assert float(expected_loss(seen)[0]) == pytest.approx(np.maximum(-drawn, 0).mean(), rel=0.02)


def test_close_and_disputed_prompts_come_first() -> None:
    """A tie that nobody disputes costs nothing, nor does a clear lead."""
    disputed, settled, clear = (
        float(expected_loss(outlook(margin, spread))[0])
        for margin, spread in ((0.1, 1.0), (0.1, 0.0), (9.0, 1.0))
    )
    assert disputed > 0.1
    assert settled == 0.0
    assert clear < 1e-6


def test_without_an_ensemble_no_prompt_is_more_doubtful() -> None:
    """All weigh alike."""
    assert list(expected_loss(outlook(0.1, 1.0, n_members=1))) == [1.0]

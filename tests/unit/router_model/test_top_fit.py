"""Which teacher is the best: targets, and fits of several alphas as one head."""

import numpy as np
import pytest

from router_model.design import prepare
from router_model.fitting import fit_ridges
from router_model.outlook import TopDeviations
from router_model.top_fit import TopTarget, join_tops, top_alphas, top_targets
from tests.unit.router_model.worlds import linear_world


def full(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, dtype=bool)


def test_the_best_teacher_stands_out_and_ties_are_shared() -> None:
    """One over the number of answers is taken off; all equal is no information."""
    rewards = np.array([[0.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    expected = [[-0.25, 0.75, -0.25, -0.25], [0.75, 0.75, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(top_targets(rewards, full(rewards)), expected)
    assert not top_targets(rewards[2:], full(rewards[2:])).any()


def test_a_missing_answer_is_no_loss() -> None:
    """Among two answers each is the best one half of the time."""
    rewards = np.array([[0.0, np.nan, 1.0]])
    targets = top_targets(rewards, ~np.isnan(rewards))
    np.testing.assert_allclose(targets, [[-0.5, np.nan, 0.5]])


def test_targets_follow_the_scale_of_the_rewards() -> None:
    """Rewards in other units give targets in those units, and a shift of a prompt changes nothing."""
    rewards = np.random.default_rng(0).random((20, 4))
    shifted = 10 * rewards + np.arange(20)[:, None]
    np.testing.assert_allclose(
        top_targets(shifted, full(shifted)), 10 * top_targets(rewards, full(rewards)), rtol=1e-9
    )


def test_alphas_hold_the_trained_one() -> None:
    """A table without learnability knows one alpha."""
    assert top_alphas(0.3, any_alpha=True) == (0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    assert top_alphas(0.0, any_alpha=False) == (0.0,)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.25, 2.0), (0.75, 4.0), (1.0, 5.0)]
)
def test_between_two_alphas_it_is_linear(alpha: float, expected: float) -> None:
    """And exact at each."""
    deviations = TopDeviations((0.0, 0.5, 1.0), np.array([[[1.0]], [[3.0]], [[5.0]]]).transpose(1, 0, 2))
    assert deviations.at(alpha).item() == pytest.approx(expected)


def test_one_alpha_answers_for_all() -> None:
    """As in a table without learnability."""
    assert TopDeviations((0.0,), np.array([[[2.0]]])).at(0.7).item() == 2.0


def test_fits_of_several_alphas_are_one_head_of_deviations() -> None:
    """Its columns stand alpha by alpha, and over the training prompts each has mean 0."""
    features, quality = linear_world(200, noise=0.5)
    targets = {
        str(at): TopTarget(at, top_targets(values, full(values)))
        for at, values in ((0.0, quality), (1.0, -quality))
    }
    design = prepare(features, seed=0)
    fits = fit_ridges(design, {at: target.values_NM for at, target in targets.items()}, full(quality))
    top = join_tops(design, fits, targets, full(quality))
    assert top is not None
    values = top.head.predict(features).reshape(200, 2, 5)
    np.testing.assert_allclose(values.mean(axis=0), 0.0, atol=1e-6)
    assert (values[:, 0].argmax(axis=1) == quality.argmax(axis=1)).mean() > 0.7
    assert (values[:, 1].argmax(axis=1) == quality.argmin(axis=1)).mean() > 0.7
    assert top.out_of_fold.values.shape == (200, 2, 5)
    assert len(top.members) == 5

"""How far predictions are followed."""

import numpy as np
import pytest

from router_model.alpha_calibration import Case, calibrate_moves
from router_model.outlook import AlphaCalibration
from router_model.shrinkage import PAIRS, Moves, near_best

N_PROMPTS, N_TEACHERS = 300, 4
FOLDS = np.array_split(np.random.default_rng(9).permutation(N_PROMPTS), 5)


def world(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, and moves that are the rewards' deviations with noise on them."""
    rng = np.random.default_rng(0)
    rewards = rng.random((N_PROMPTS, N_TEACHERS))
    constant = np.tile(rewards.mean(axis=0), (N_PROMPTS, 1))
    return rewards, constant, rewards - constant + noise * rng.normal(size=rewards.shape)


def calibration_of(reward_move: np.ndarray, top_move: np.ndarray) -> AlphaCalibration:
    rewards, constant, _ = world(0.0)
    moves = Moves(constant, reward_move, top_move)
    return calibrate_moves({0.0: Case(moves, rewards)}, np.ones(rewards.shape, dtype=bool), FOLDS)[0]


def test_good_predictions_are_followed_and_noise_is_not() -> None:
    """Of two moves the informative one gets the weight."""
    _, _, good = world(0.1)
    noise = np.random.default_rng(1).normal(size=good.shape)
    for first, second, informative in ((good, noise, 0), (noise, good, 1)):
        found = calibration_of(first, second)
        assert found.helps
        weights = found.reward_weight, found.top_weight
        assert weights[informative] > 0.5 > weights[1 - informative]
    nothing = calibration_of(noise, noise[::-1])
    assert not nothing.helps
    assert (nothing.reward_weight, nothing.top_weight) == (0.0, 0.0)


def test_the_stated_gain_is_not_that_of_the_choice_itself() -> None:
    """Weights for a prompt are chosen without it, so that noise shows no gain on average."""
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = [0.3 * rng.normal(size=(N_PROMPTS, N_TEACHERS)) for _ in range(2)]
        found = calibration_of(noise[0], noise[1])
        gains.append(found.gain)
    assert np.mean(gains) < 0


def test_equal_pairs_share_the_weight() -> None:
    """Where no pair is better than another the mean of all is taken."""
    assert near_best(np.ones((len(PAIRS), 10))) == pytest.approx((0.5, 0.5))


def test_a_clear_winner_takes_all() -> None:
    """An excess of many standard errors counts nothing."""
    regrets = np.ones((len(PAIRS), 100)) + np.random.default_rng(0).random((len(PAIRS), 100)) * 1e-3
    regrets[PAIRS.index((0.75, 0.25))] -= 0.5
    assert near_best(regrets) == pytest.approx((0.75, 0.25))


def test_evidence_is_shared_between_neighbouring_alphas() -> None:
    """A gain that is not clear at one alpha counts where it is clear at the next."""
    rewards, constant, good = world(0.2)
    mask = np.ones(rewards.shape, dtype=bool)
    faint = Case(Moves(constant, world(3.0)[2], np.zeros_like(good)), rewards)
    clear = Case(Moves(constant, good, np.zeros_like(good)), rewards)
    alone = calibrate_moves({0.0: faint}, mask, FOLDS)[0]
    assert alone.gain is not None
    assert alone.gain > 0
    assert not alone.helps
    assert [item.helps for item in calibrate_moves({0.0: faint, 0.1: clear}, mask, FOLDS)] == [True, True]
    assert not calibrate_moves({0.0: faint, 0.5: clear}, mask, FOLDS)[0].helps

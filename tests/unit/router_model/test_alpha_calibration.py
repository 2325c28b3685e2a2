"""When predictions are followed, and when the best single teacher is."""

import numpy as np
import pytest

from router_model.alpha_calibration import MIN_GAIN, HeldOut, calibrate, calibrate_gated
from router_model.outlook import AlphaCalibration

N_PROMPTS, N_TEACHERS = 300, 4


def world(noise: float, *, seed: int = 0) -> tuple[np.ndarray, HeldOut]:
    """Rewards, and predictions of them with noise on it."""
    rewards = np.random.default_rng(seed).random((N_PROMPTS, N_TEACHERS))
    predicted = rewards + noise * np.random.default_rng(100 + seed).normal(size=rewards.shape)
    means = (rewards.sum(axis=0) - rewards) / (N_PROMPTS - 1)
    return rewards, HeldOut(predicted, means)


def gated(rewards: np.ndarray, held: HeldOut | None) -> AlphaCalibration:
    return calibrate_gated(0.0, held, rewards, np.ones(rewards.shape, dtype=bool))


def test_good_predictions_are_followed() -> None:
    """The gain is stated with its error, and is that of following them."""
    found = gated(*world(0.1))
    assert found.helps
    assert found.gain is not None
    assert found.gain_se is not None
    assert found.gain > 10 * found.gain_se


def test_noise_is_followed_about_once_in_ten_times() -> None:
    """The gate is a one-sided test: of 60 worlds without signal some six pass."""
    passed = 0
    for seed in range(60):
        rewards, held = world(0.0, seed=seed)
        noise = 0.02 * np.random.default_rng(1000 + seed).normal(size=rewards.shape)
        passed += gated(rewards, HeldOut(held.means_NM + noise, held.means_NM)).helps
    assert passed <= 12


def test_a_gain_within_its_error_is_not_followed() -> None:
    """It is above 0, and less than the standard errors that are asked for."""
    rewards, held = world(5.0)
    found = gated(rewards, held)
    assert found.gain is not None
    assert found.gain_se is not None
    assert 0 < found.gain < MIN_GAIN * found.gain_se
    assert not found.helps
    by_name = calibrate(0.0, held.strengths_NM, rewards, np.ones(rewards.shape, dtype=bool))
    assert by_name.helps


def test_leaving_out_a_prompt_is_no_gain() -> None:
    """Predictions that are the left-out means move nothing, though as strengths they choose worse."""
    rewards, held = world(0.0)
    found = gated(rewards, HeldOut(held.means_NM, held.means_NM))
    assert found.gain == pytest.approx(0.0)
    assert not found.helps


def test_nothing_held_out_is_nothing_known() -> None:
    """A gated head falls back then, a named one is followed."""
    rewards, _ = world(0.0)
    assert not gated(rewards, None).helps
    assert calibrate(0.0, None, rewards, np.ones(rewards.shape, dtype=bool)).helps

"""Heads: fitted by cross-validation, never knowingly worse than the best single teacher."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from router_model.bradley_terry import pairwise_loss
from router_model.errors import CheckpointError, RouterError
from router_model.heads import HEADS, fit_head, prepare
from router_model.linear_fit import decompose, solve_bradley_terry, solve_ridge
from router_model.reward import normalize, regret
from tests.unit.router_model.worlds import linear_world


def full(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, dtype=bool)


def reward_world(n_prompts: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    features, quality = linear_world(n_prompts, **options)
    return features, normalize(quality, full(quality))


def test_ridge_is_the_textbook_solution() -> None:
    """On a full table the fit equals the normal equations on standardised features with a free bias."""
    features, quality = linear_world(60, noise=1.0)
    fitted = solve_ridge(decompose(features), quality, full(quality), 0.5)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    gram = scaled.T @ scaled / 60 + 0.5 * np.eye(8)
    expected = scaled @ np.linalg.solve(
        gram, scaled.T @ (quality - quality.mean(axis=0)) / 60
    ) + quality.mean(axis=0)
    np.testing.assert_allclose(fitted(features), expected, atol=1e-5)


def test_ridge_with_missing_cells_uses_the_present_ones_only() -> None:
    """Each teacher's fit is the one on its own rows, whatever stands in the masked cells."""
    features, quality = linear_world(80, noise=1.0)
    mask = np.random.default_rng(5).random(quality.shape) > 0.4
    spectrum, l2 = decompose(features), 0.3
    fitted = solve_ridge(spectrum, np.where(mask, quality, 1e9), mask, l2)(features)
    inputs = np.column_stack([spectrum.rotated_NK, np.ones(80)])
    for teacher in range(5):
        rows = mask[:, teacher]
        gram = inputs[rows].T @ inputs[rows] / 80 + l2 * np.diag([1.0] * 8 + [0.0])
        weight = np.linalg.solve(gram, inputs[rows].T @ quality[rows, teacher] / 80)
        np.testing.assert_allclose(fitted[:, teacher], inputs @ weight, atol=1e-5)


def test_bradley_terry_stands_at_the_minimum_of_its_loss() -> None:
    """The gradient of loss and penalty in the raw weights is zero at the solution."""
    features, rewards = reward_world(100, noise=1.0)
    spectrum, l2 = decompose(features), 0.3
    fitted = solve_bradley_terry(spectrum, rewards, full(rewards), l2)
    scaled = torch.from_numpy((features.astype(float) - spectrum.mean_D) / spectrum.scale_D)
    weight = torch.from_numpy(fitted.weight_DM * spectrum.scale_D[:, None]).requires_grad_()
    bias = torch.from_numpy(fitted.bias_M + spectrum.mean_D @ fitted.weight_DM)
    curvature = 1 / (2 * (rewards.shape[1] - 1))
    loss = pairwise_loss(
        scaled @ weight + bias, torch.from_numpy(rewards), torch.ones(rewards.shape, dtype=torch.bool)
    )
    torch.autograd.backward(loss + curvature * l2 * (weight**2).sum() / 2)
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ridge", "bt"])
def test_infinite_l2_is_a_constant(kind: str) -> None:
    """Strong regularisation leaves the bias alone: every prompt gets the same values."""
    features, rewards = reward_world(40)
    solve = {"ridge": solve_ridge, "bt": solve_bradley_terry}[kind]
    values = solve(decompose(features), rewards, full(rewards), math.inf)(features)
    assert np.ptp(values, axis=0).max() < 1e-9
    assert np.ptp(values[0]) > 0.01


@pytest.mark.parametrize("kind", ["ridge", "bt", "auto"])
def test_a_planted_linear_world_is_recovered(kind: str) -> None:
    """More than 95 % of the gap between best single and oracle is closed on new prompts."""
    features, rewards = reward_world(400)
    new_features, new_rewards = reward_world(400, seed=1)
    fit = fit_head(kind, prepare(features, seed=0), rewards, full(rewards))
    found = regret(fit.head.predict(new_features), new_rewards, full(new_rewards)).mean()
    constant = regret(np.tile(rewards.mean(axis=0), (400, 1)), new_rewards, full(new_rewards)).mean()
    assert found < 0.05 * constant


def test_bradley_terry_centres_its_strengths() -> None:
    """The strengths of a prompt sum to zero."""
    features, rewards = reward_world(60, noise=0.5)
    head = HEADS["bt"].fit(prepare(features, seed=0), rewards, full(rewards), "regret").head
    np.testing.assert_allclose(head.predict(features).sum(axis=1), 0.0, atol=1e-9)


def test_auto_takes_the_constant_without_signal() -> None:
    """With shuffled features the constant stays, and every number that led there is recorded."""
    for seed in range(3):
        features, rewards = reward_world(120, noise=1.0, seed=seed)
        shuffled = np.random.default_rng(1000 + seed).permutation(features)
        fit = fit_head("auto", prepare(shuffled, seed=0), rewards, full(rewards))
        assert fit.head.kind == "constant"
        assert set(fit.facts["auto_candidates"]) == {"constant", "ridge", "bt"}
        np.testing.assert_allclose(fit.head.predict(features[:1])[0], rewards.mean(axis=0))


def test_auto_is_never_knowingly_worse_than_the_best_single_teacher() -> None:
    """Whatever is chosen has less held-out regret than the best teacher in hindsight, or is that teacher."""
    for seed in range(4):
        features, rewards = reward_world(60, noise=3.0, seed=seed)
        fit = fit_head("auto", prepare(features, seed=0), rewards, full(rewards))
        best_single = regret(np.tile(rewards.mean(axis=0), (60, 1)), rewards, full(rewards)).mean()
        assert fit.head.kind == "constant" or fit.facts["cv_regret"] < best_single


@pytest.mark.parametrize("n_prompts", [1, 2, 5, 9])
def test_few_prompts_fall_back_to_the_constant_and_say_so(n_prompts: int) -> None:
    """Cross-validation of a handful says nothing; explicit heads still work."""
    features, rewards = reward_world(n_prompts)
    design = prepare(features, seed=0)
    fit = fit_head("auto", design, rewards, full(rewards))
    assert fit.head.kind == "constant"
    assert "too few" in fit.facts["auto_reason"]
    for kind in ("ridge", "bt"):
        assert np.isfinite(fit_head(kind, design, rewards, full(rewards)).head.predict(features)).all()


def test_constant_features_are_no_signal_and_no_error() -> None:
    """A backbone that says the same of every prompt gives the constant's choice."""
    _, rewards = reward_world(30)
    features = np.full((30, 4), 0.1, dtype=np.float32)
    fit = fit_head("ridge", prepare(features, seed=0), rewards, full(rewards))
    np.testing.assert_allclose(fit.head.predict(features)[0], rewards.mean(axis=0), atol=1e-9)


def test_fits_are_deterministic_and_follow_the_teachers() -> None:
    """The same seed gives the same weights; permuted columns give permuted predictions."""
    features, rewards = reward_world(80, noise=1.0)
    order = [3, 0, 4, 1, 2]
    for kind in ("ridge", "bt"):
        first = fit_head(kind, prepare(features, seed=3), rewards, full(rewards)).head.predict(features)
        again = fit_head(kind, prepare(features, seed=3), rewards, full(rewards)).head.predict(features)
        moved = fit_head(kind, prepare(features, seed=3), rewards[:, order], full(rewards)).head.predict(
            features
        )
        np.testing.assert_array_equal(first, again)
        np.testing.assert_allclose(moved, first[:, order], atol=1e-3)


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_head_survives_its_tensors(kind: str) -> None:
    """What a checkpoint stores is all of the head."""
    features, rewards = reward_world(40, noise=1.0)
    head = HEADS[kind].fit(prepare(features, seed=0), rewards, full(rewards), "regret").head
    restored = HEADS[kind].restore(head.tensors())
    assert restored.kind == kind
    np.testing.assert_array_equal(restored.predict(features), head.predict(features))
    with pytest.raises(CheckpointError, match="expected"):
        HEADS[kind].restore({"other": np.zeros(3)})


def test_an_unknown_head_names_the_known_ones() -> None:
    """A misspelt kind is an error that helps."""
    features, rewards = reward_world(10)
    with pytest.raises(RouterError, match=r"'knm'.*auto.*ridge"):
        fit_head("knm", prepare(features, seed=0), rewards, full(rewards))

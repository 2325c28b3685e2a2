"""Heads: fitted by cross-validation over prompts, and what solves them."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from router_model.bradley_terry import pairwise_loss
from router_model.design import prepare
from router_model.errors import CheckpointError, RouterError
from router_model.fitting import FITS, HeadFit, blend, fit_head, fit_neighbours, fit_ridge
from router_model.heads import restore_head
from router_model.linear_fit import decompose, solve_objective, solve_ridge
from router_model.objective_fit import fit_objective
from router_model.objectives import OBJECTIVES
from router_model.reward import normalize, regret
from tests.unit.router_model.worlds import linear_world


def full(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, dtype=bool)


def reward_world(n_prompts: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    features, quality = linear_world(n_prompts, **options)
    return features, normalize(quality, full(quality))


def fit_any(kind: str, features: np.ndarray, rewards: np.ndarray, *, seed: int = 0) -> HeadFit:
    design = prepare(features, seed=seed)
    if kind in FITS:
        return fit_head(kind, design, rewards, full(rewards))
    return fit_objective(kind, design, rewards, full(rewards), grid=(10.0, 1.0, 0.1))


def test_features_are_centred_with_a_mean_squared_length_of_one() -> None:
    """Each view counts alike, a constant feature is dropped, and one that varies wildly is brought down."""
    rng = np.random.default_rng(0)
    features = np.column_stack(
        [
            rng.normal(size=(50, 3)),
            1000 * rng.normal(size=50),
            np.full(50, 3.0),
            100 * rng.normal(size=(50, 4)),
        ]
    ).astype(np.float32)
    spectrum = decompose(features, [5, 4])
    scaled = (features - spectrum.mean_D) / spectrum.scale_D
    lengths = (scaled**2).sum(axis=0) / 50
    assert lengths[:5].sum() == pytest.approx(0.5, rel=1e-4)
    assert lengths[5:].sum() == pytest.approx(0.5, rel=1e-4)
    assert lengths[3] < 150 * lengths[0]
    np.testing.assert_allclose(spectrum.rotate(features), spectrum.rotated_NK, atol=1e-5)


def test_ridge_is_the_textbook_solution() -> None:
    """On a full table the fit equals the normal equations with a free bias."""
    features, quality = linear_world(60, noise=1.0)
    spectrum = decompose(features)
    fitted = solve_ridge(spectrum, quality, full(quality), 5.0)
    scaled = (features - spectrum.mean_D) / spectrum.scale_D
    gram = scaled.T @ scaled + 5.0 * np.eye(8)
    expected = scaled @ np.linalg.solve(gram, scaled.T @ (quality - quality.mean(axis=0)))
    np.testing.assert_allclose(fitted(features), expected + quality.mean(axis=0), atol=1e-5)


def test_ridge_with_missing_cells_uses_the_present_ones_only() -> None:
    """Each teacher's fit is the one on its own rows, whatever stands in the masked cells."""
    features, quality = linear_world(80, noise=1.0)
    mask = np.random.default_rng(5).random(quality.shape) > 0.4
    spectrum, l2 = decompose(features), 3.0
    fitted = solve_ridge(spectrum, np.where(mask, quality, 1e9), mask, l2)(features)
    inputs = np.column_stack([spectrum.rotated_NK, np.ones(80)])
    for teacher in range(5):
        rows = mask[:, teacher]
        gram = inputs[rows].T @ inputs[rows] + l2 * np.diag([1.0] * 8 + [0.0])
        weight = np.linalg.solve(gram, inputs[rows].T @ quality[rows, teacher])
        np.testing.assert_allclose(fitted[:, teacher], inputs @ weight, atol=1e-5)


def test_an_objective_stands_at_the_minimum_of_its_loss() -> None:
    """The gradient of loss and penalty in the raw weights is zero at the solution."""
    features, rewards = reward_world(100, noise=1.0)
    spectrum, l2 = decompose(features), 3.0
    fitted = solve_objective(spectrum, rewards, full(rewards), l2, OBJECTIVES["bt"])
    scaled = torch.from_numpy((features.astype(float) - spectrum.mean_D) / spectrum.scale_D)
    weight = torch.from_numpy(fitted.weight_DM * spectrum.scale_D[:, None]).requires_grad_()
    bias = torch.from_numpy(fitted.bias_M + spectrum.mean_D @ fitted.weight_DM)
    curvature = 1 / (2 * (rewards.shape[1] - 1))
    loss = pairwise_loss(
        scaled @ weight + bias, torch.from_numpy(rewards), torch.ones(rewards.shape, dtype=torch.bool)
    )
    torch.autograd.backward(loss + curvature * l2 / 100 * (weight**2).sum() / 2)
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ridge", "bt"])
def test_infinite_l2_is_a_constant(kind: str) -> None:
    """Strong regularisation leaves the bias alone: every prompt gets the same values."""
    features, rewards = reward_world(40)
    spectrum = decompose(features)
    solved = (
        solve_ridge(spectrum, rewards, full(rewards), math.inf)
        if kind == "ridge"
        else solve_objective(spectrum, rewards, full(rewards), math.inf, OBJECTIVES["bt"])
    )
    values = solved(features)
    assert np.ptp(values, axis=0).max() < 1e-9
    assert np.ptp(values[0]) > 0.01


@pytest.mark.parametrize("kind", ["ridge", "bt", "soft_bt", "listwise", "plackett_luce", "regression"])
def test_a_planted_linear_world_is_recovered(kind: str) -> None:
    """More than 95 % of the gap between best single and oracle is closed on new prompts."""
    features, rewards = reward_world(400)
    new_features, new_rewards = reward_world(400, seed=1)
    found = regret(
        fit_any(kind, features, rewards).head.predict(new_features), new_rewards, full(new_rewards)
    )
    constant = regret(np.tile(rewards.mean(axis=0), (400, 1)), new_rewards, full(new_rewards))
    assert found.mean() < 0.05 * constant.mean()


@pytest.mark.parametrize(("kind", "share"), [("knn", 0.5), ("cluster", 0.8), ("mlp", 0.2), ("regret", 0.3)])
def test_the_other_heads_learn_it_too(kind: str, share: float) -> None:
    """Neighbours, clusters, a network and the direct policy loss close much of the gap."""
    features, rewards = reward_world(400)
    new_features, new_rewards = reward_world(400, seed=1)
    found = regret(
        fit_any(kind, features, rewards).head.predict(new_features), new_rewards, full(new_rewards)
    )
    constant = regret(np.tile(rewards.mean(axis=0), (400, 1)), new_rewards, full(new_rewards))
    assert found.mean() < share * constant.mean()


@pytest.mark.parametrize("kind", ["ridge", "knn", "mlp"])
def test_held_out_predictions_do_not_know_their_own_prompt(kind: str) -> None:
    """On pure noise a fitted head remembers its prompts, held-out predictions are chance."""
    features, _ = linear_world(150, width=64)
    rewards = np.random.default_rng(3).random((150, 5))
    fit = fit_any(kind, features, rewards)
    assert fit.out_of_fold_NM is not None
    values = fit.out_of_fold_NM - fit.out_of_fold_NM.mean(axis=0)
    assert float((values * (rewards - rewards.mean(axis=0))).mean()) < 0.002


def test_each_teacher_has_its_own_l2() -> None:
    """A teacher whose rewards are noise stays at its mean and does not flatten the others."""
    features, rewards = reward_world(300, n_teachers=3)
    rewards[:, 2] = np.random.default_rng(0).random(300)
    fit = fit_ridge(prepare(features, seed=0), rewards, full(rewards))
    spread = fit.head.predict(features).std(axis=0)
    assert spread[2] < 0.2 * spread[:2].min()


def test_several_views_are_averaged() -> None:
    """The head is linear in all views, and equals the mean of its views' heads."""
    features, rewards = reward_world(80, noise=1.0)
    other, _ = linear_world(80, seed=9)
    both = np.concatenate([features, other], axis=1)
    fit = fit_ridge(prepare(both, seed=0, widths=(8, 8)), rewards, full(rewards))
    first = fit_ridge(prepare(features, seed=0), rewards, full(rewards)).head.predict(features)
    second = fit_ridge(prepare(other, seed=0), rewards, full(rewards)).head.predict(other)
    np.testing.assert_allclose(fit.head.predict(both), (first + second) / 2, atol=1e-5)


@pytest.mark.parametrize("kind", [*FITS, "bt"])
@pytest.mark.parametrize("n_prompts", [1, 2, 5])
def test_a_handful_of_prompts_is_fitted(kind: str, n_prompts: int) -> None:
    """Folds shrink, and what comes out is finite."""
    features, rewards = reward_world(n_prompts)
    assert np.isfinite(fit_any(kind, features, rewards).head.predict(features)).all()


def test_constant_features_are_no_signal_and_no_error() -> None:
    """A backbone that says the same of every prompt gives the constant's choice."""
    _, rewards = reward_world(30)
    features = np.full((30, 4), 0.1, dtype=np.float32)
    for kind in ("ridge", "knn", "cluster", "bt"):
        values = fit_any(kind, features, rewards).head.predict(features)
        assert np.ptp(values, axis=0).max() < 0.1


@pytest.mark.parametrize("kind", ["ridge", "knn", "cluster", "bt"])
def test_fits_are_deterministic_and_follow_the_teachers(kind: str) -> None:
    """The same seed gives the same weights; permuted columns give permuted predictions."""
    features, rewards = reward_world(80, noise=1.0)
    order = [3, 0, 4, 1, 2]
    first, again = (fit_any(kind, features, rewards, seed=3).head.predict(features) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    moved = fit_any(kind, features, rewards[:, order], seed=3).head.predict(features)
    np.testing.assert_allclose(moved, first[:, order], atol=1e-3)


@pytest.mark.parametrize("kind", [*FITS, "bt", "blend"])
def test_a_head_survives_its_tensors(kind: str) -> None:
    """What a checkpoint stores is all of the head."""
    features, rewards = reward_world(40, noise=1.0)
    if kind == "blend":
        design = prepare(features, seed=0)
        parts = (fit(design, rewards, full(rewards)) for fit in (fit_ridge, fit_neighbours))
        blended = blend(*parts)
        assert blended is not None
        head = blended.head
    else:
        head = fit_any(kind, features, rewards).head
    restored = restore_head(head.kind, head.tensors())
    assert restored.kind == head.kind
    np.testing.assert_allclose(restored.predict(features), head.predict(features), atol=1e-4)
    with pytest.raises(CheckpointError, match="expected"):
        restore_head(head.kind, {"other": np.zeros(3)})


def test_an_unknown_head_names_the_known_ones() -> None:
    """A misspelt kind is an error that helps."""
    features, rewards = reward_world(10)
    with pytest.raises(RouterError, match=r"'knm'.*ridge.*knn"):
        fit_head("knm", prepare(features, seed=0), rewards, full(rewards))
    with pytest.raises(CheckpointError, match="'knm' is unknown"):
        restore_head("knm", {})

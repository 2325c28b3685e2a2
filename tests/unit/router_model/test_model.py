"""Fitting a router to a score table."""

import dataclasses

import numpy as np
import pytest

from router_model.errors import RouterError, TableError
from router_model.model import fit_router
from router_model.reward import mix_reward
from tests.unit.router_model.worlds import linear_world, make_table


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


@pytest.mark.parametrize("kind", ["constant", "ridge", "bt"])
def test_strengths_of_every_head_are_calibrated_logits(kind: str) -> None:
    """sigmoid of a difference of strengths is the win rate on new prompts, whatever the head."""
    features, quality = linear_world(600, noise=2.0)
    new_features, new_quality = linear_world(600, noise=2.0, seed=1)
    model = fit_router(features, make_table(quality), alpha=0.0, head_kind=kind)
    strengths = model.predict(new_features).strengths_BM
    first, second = np.triu_indices(5, k=1)
    predicted = sigmoid(strengths[:, first] - strengths[:, second])
    won = new_quality[:, first] > new_quality[:, second]
    confident = np.abs(predicted - 0.5) > 0.2 if kind != "constant" else np.ones(won.shape, dtype=bool)
    right = np.where(predicted > 0.5, won, ~won)[confident].mean()
    assert abs(right - np.maximum(predicted, 1 - predicted)[confident].mean()) < 0.05
    np.testing.assert_allclose(strengths.sum(axis=1), 0.0, atol=1e-9)


def test_quality_and_learnability_are_predicted_on_their_own_scales() -> None:
    """The explaining heads predict raw values and the mixed reward."""
    features, quality = linear_world(300)
    learnability = -2.0 + 0.1 * features[:, :1] + np.zeros((300, 5))
    table = make_table(100 * quality, learnability)
    predictions = fit_router(features, table, alpha=0.4).predict(features)
    np.testing.assert_allclose(predictions.quality_BM, 100 * quality, atol=1.0)
    np.testing.assert_allclose(predictions.learnability_BM, learnability, atol=0.01)
    reward = mix_reward(table.quality_NM, table.learnability_NM, table.mask_NM, alpha=0.4)
    assert np.corrcoef(predictions.expected_reward_BM.ravel(), reward.ravel())[0, 1] > 0.85


def test_without_learnability_it_is_unknown_and_not_zero() -> None:
    """The head is absent and its predictions are NaN; alpha above 0 is refused."""
    features, quality = linear_world(30)
    model = fit_router(features, make_table(quality), alpha=0.0)
    assert model.learnability is None
    assert np.isnan(model.predict(features).learnability_BM).all()
    assert {teacher.mean_learnability for teacher in model.teachers} == {None}
    with pytest.raises(RouterError, match="no learnability"):
        fit_router(features, make_table(quality), alpha=0.4)


def test_missing_cells_are_missing_and_not_zero() -> None:
    """With a third of the cells gone the router still finds the planted world."""
    features, quality = linear_world(500)
    gone = np.random.default_rng(0).random(quality.shape) < 0.3
    model = fit_router(features, make_table(np.where(gone, np.nan, quality)), alpha=0.0)
    new_features, new_quality = linear_world(200, seed=1)
    chosen = model.predict(new_features).strengths_BM.argmax(axis=1)
    assert (chosen == new_quality.argmax(axis=1)).mean() > 0.85


def test_teacher_means_are_over_present_cells() -> None:
    """The summaries that the baselines route by do not count a missing answer."""
    quality = np.array([[1.0, 0.0], [np.nan, 0.5], [3.0, np.nan]])
    table = dataclasses.replace(make_table(quality, -quality), families={"alpaca": "qwen", "bison": None})
    model = fit_router(np.eye(3, dtype=np.float32), table, alpha=0.5)
    assert [teacher.mean_quality for teacher in model.teachers] == [2.0, 0.25]
    assert [teacher.mean_learnability for teacher in model.teachers] == [-2.0, -0.25]
    assert [teacher.family for teacher in model.teachers] == ["qwen", None]


@pytest.mark.parametrize("n_prompts", [1, 2, 5])
@pytest.mark.parametrize("kind", ["auto", "constant", "ridge", "bt"])
def test_a_handful_of_prompts_trains(n_prompts: int, kind: str) -> None:
    """Folds shrink, and what comes out is finite."""
    features, quality = linear_world(n_prompts)
    predictions = fit_router(features, make_table(quality, quality), alpha=0.4, head_kind=kind).predict(
        features
    )
    assert all(np.isfinite(getattr(predictions, item.name)).all() for item in dataclasses.fields(predictions))


def test_what_cannot_be_trained_on_is_refused() -> None:
    """One teacher, a teacher without a response, no prompts, features of another shape or with NaN."""
    features, quality = linear_world(6)
    with pytest.raises(TableError, match="at least two teachers"):
        fit_router(features, make_table(quality[:, :1]), alpha=0.0)
    silent = quality.copy()
    silent[:, 1] = np.nan
    with pytest.raises(TableError, match="'bison' has no response"):
        fit_router(features, make_table(silent), alpha=0.0)
    with pytest.raises(TableError, match="no prompt"):
        fit_router(features[:0], make_table(quality[:0]), alpha=0.0)
    with pytest.raises(RouterError, match=r"expected \(6, width\)"):
        fit_router(features[:5], make_table(quality), alpha=0.0)
    with pytest.raises(RouterError, match="NaN"):
        fit_router(np.where(features > 0, np.nan, features), make_table(quality), alpha=0.0)


def test_training_is_deterministic() -> None:
    """The same table and seed give the same bits."""
    features, quality = linear_world(60, noise=1.0)
    first, second = (
        fit_router(features, make_table(quality), alpha=0.0, head_kind="bt", seed=4) for _ in range(2)
    )
    np.testing.assert_array_equal(first.predict(features).strengths_BM, second.predict(features).strengths_BM)
    assert first.facts == second.facts

"""Fitting a router to a score table."""

import dataclasses

import numpy as np
import pytest

from router_model.errors import RouterError, StrategyError, TableError
from router_model.reward import mix_reward, normalize
from router_model.training import fit_router
from tests.unit.router_model.worlds import TEACHERS, linear_world, make_table


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


@pytest.mark.parametrize("kind", ["constant", "ridge", "bt"])
def test_strengths_of_every_head_are_calibrated_logits(kind: str) -> None:
    """sigmoid of a difference of strengths is the win rate on new prompts, whatever the head."""
    features, quality = linear_world(600, noise=2.0)
    new_features, new_quality = linear_world(600, noise=2.0, seed=1)
    model = fit_router(features, make_table(quality), alpha=0.0, head_kind=kind)
    strengths = model.predict(new_features).at().strengths_BM
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
    predictions = fit_router(features, table, alpha=0.4, head_kind="ridge").predict(features)
    np.testing.assert_allclose(predictions.quality_BM, 100 * quality, atol=1.0)
    np.testing.assert_allclose(predictions.learnability_BM, learnability, atol=0.01)
    reward = mix_reward(table.quality_NM, table.learnability_NM, table.mask_NM, alpha=0.4)
    assert np.corrcoef(predictions.at().expected_reward_BM.ravel(), reward.ravel())[0, 1] > 0.85


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
    chosen = model.predict(new_features).at().strengths_BM.argmax(axis=1)
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
@pytest.mark.parametrize("kind", ["auto", "constant", "knn", "bt"])
def test_a_handful_of_prompts_trains(n_prompts: int, kind: str) -> None:
    """Folds shrink, and what comes out is finite."""
    features, quality = linear_world(n_prompts)
    predictions = fit_router(features, make_table(quality, quality), alpha=0.4, head_kind=kind).predict(
        features
    )
    outlook = predictions.at()
    assert np.isfinite(outlook.strengths_BM).all()
    assert np.isfinite(outlook.expected_reward_BM).all()
    assert np.isfinite(predictions.quality_BM).all()
    assert not predictions.out_of_distribution_B.any()


def test_what_cannot_be_trained_on_is_refused() -> None:
    """One teacher, a teacher without a response, nothing to compare, no prompts, features that do not fit."""
    features, quality = linear_world(6)
    with pytest.raises(TableError, match="at least two teachers"):
        fit_router(features, make_table(quality[:, :1]), alpha=0.0)
    silent = quality.copy()
    silent[:, 1] = np.nan
    with pytest.raises(TableError, match="'bison' has no response"):
        fit_router(features, make_table(silent), alpha=0.0)
    alone = np.where(np.eye(5, dtype=bool)[[0, 1, 2, 3, 4, 0]], quality, np.nan)
    with pytest.raises(TableError, match="no training prompt has responses of two teachers"):
        fit_router(features, make_table(alone), alpha=0.0)
    with pytest.raises(TableError, match=r"has no learnability, but alpha is 0.4: .* train with alpha 0"):
        fit_router(features, make_table(quality), alpha=0.4)
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
    np.testing.assert_array_equal(
        first.predict(features).at().strengths_BM, second.predict(features).at().strengths_BM
    )
    assert first.facts == second.facts


def gap_closed(strengths: np.ndarray, rewards: np.ndarray, single: int) -> float:
    chosen = rewards[np.arange(len(rewards)), strengths.argmax(axis=1)]
    return float((chosen - rewards[:, single]).mean() / (rewards.max(axis=1) - rewards[:, single]).mean())


def test_auto_recovers_a_planted_linear_world() -> None:
    """More than 95 % of the gap between best single and oracle is closed on new prompts."""
    features, quality = linear_world(400)
    new_features, new_quality = linear_world(400, seed=1)
    model = fit_router(features, make_table(quality), alpha=0.0)
    rewards = normalize(new_quality, np.ones(new_quality.shape, dtype=bool))
    single = int(np.argmax([teacher.mean_reward for teacher in model.teachers]))
    outlook = model.predict(new_features).at()
    assert outlook.helps
    assert gap_closed(outlook.strengths_BM, rewards, single) > 0.95


def test_auto_falls_back_without_signal() -> None:
    """With shuffled features the best single teacher answers everything, and the outlook says so."""
    n_routed = 0
    for seed in range(6):
        features, quality = linear_world(120, noise=1.0, seed=seed)
        shuffled = np.random.default_rng(1000 + seed).permutation(features)
        model = fit_router(shuffled, make_table(quality), alpha=0.0)
        outlook = model.predict(features).at()
        n_routed += outlook.helps
        if not outlook.helps:
            best = int(np.argmax([teacher.mean_reward for teacher in model.teachers]))
            assert (outlook.strengths_BM.argmax(axis=1) == best).all()
            assert np.ptp(outlook.strengths_BM, axis=0).max() == 0
    assert n_routed <= 1


def test_where_all_responses_are_equal_the_first_teacher_answers() -> None:
    """Ties everywhere are no error and no gain: the fallback, at every alpha."""
    features, _ = linear_world(40)
    equal = np.full((40, 5), 0.5)
    predictions = fit_router(features, make_table(equal, equal - 1), alpha=0.4).predict(features)
    for alpha in (0.0, 0.4, 1.0):
        outlook = predictions.at(alpha)
        assert not outlook.helps
        assert (outlook.strengths_BM.argmax(axis=1) == 0).all()


def test_a_constant_learnability_leaves_the_choice_to_quality() -> None:
    """Mixed with a constant, the choices stay those of quality; by learnability alone there is no gain."""
    features, quality = linear_world(120, noise=0.1)
    predictions = fit_router(features, make_table(quality, np.full_like(quality, -1.0)), alpha=0.4).predict(
        features
    )
    mixed, alone = (predictions.at(alpha).strengths_BM.argmax(axis=1) for alpha in (0.4, 0.0))
    assert predictions.at(0.4).helps
    assert (mixed == alone).mean() > 0.95
    assert not predictions.at(1.0).helps


def test_alpha_is_mixed_when_it_is_asked_for() -> None:
    """One router serves every alpha: the extremes follow quality and learnability, the middle their mix."""
    features, quality = linear_world(300)
    learnability = quality[:, ::-1] - 20
    table = make_table(quality, learnability)
    output = fit_router(features, table, alpha=0.4).predict(features)
    assert output.any_alpha
    for alpha in (0.0, 0.4, 0.73, 1.0):
        rewards = mix_reward(quality, learnability, table.mask_NM, alpha=alpha)
        outlook = output.at(alpha)
        assert outlook.alpha == alpha
        expected = (1 - alpha) * output.parts.quality + alpha * output.parts.learnability
        np.testing.assert_allclose(outlook.expected_reward_BM, expected)
        assert gap_closed(outlook.strengths_BM, rewards, int(rewards.mean(axis=0).argmax())) > 0.5
    with pytest.raises(StrategyError, match="between 0 and 1"):
        output.at(1.5)


def test_one_alpha_is_all_that_the_papers_way_serves() -> None:
    """A head on the mixed reward, and a table without learnability, name the alpha they were trained at."""
    features, quality = linear_world(60)
    paper = fit_router(features, make_table(quality, -np.abs(quality)), alpha=0.4, head_kind="bt")
    assert paper.mode == "paper"
    with pytest.raises(StrategyError, match=r"alpha = 0.4 and cannot answer for 0.5"):
        paper.predict(features).at(0.5)
    blind = fit_router(features, make_table(quality), alpha=0.0).predict(features)
    assert not blind.any_alpha
    with pytest.raises(StrategyError, match="no learnability"):
        blind.at(0.4)


@pytest.mark.parametrize("kind", ["auto", "bt"])
def test_decisions_do_not_depend_on_what_does_not_matter(kind: str) -> None:
    """Permuting teachers, shifting a prompt's quality, or duplicating a teacher changes no decision."""
    features, quality = linear_world(120, noise=1.0)
    new_features, _ = linear_world(100, seed=1)
    names = np.array(TEACHERS)

    def decisions(values: np.ndarray, columns: list[int]) -> np.ndarray:
        model = fit_router(features, make_table(values[:, columns]), alpha=0.0, head_kind=kind)
        chosen = model.predict(new_features).at().strengths_BM.argmax(axis=1)
        return names[np.array(columns)[chosen]]

    plain = decisions(quality[:, :4], [0, 1, 2, 3])
    shift = np.random.default_rng(0).normal(size=(120, 1)) * 10
    assert (decisions(quality[:, :4], [2, 0, 3, 1]) == plain).mean() > 0.99
    assert (decisions(quality[:, :4] + shift, [0, 1, 2, 3]) == plain).mean() > 0.99
    if kind == "auto":  # a duplicate adds pairs to a pairwise loss, which weighs its prompts otherwise
        assert (decisions(quality[:, :4], [0, 1, 2, 3, 1]) == plain).mean() > 0.99


def test_the_conformal_set_covers_the_best_teacher() -> None:
    """On new prompts the best teacher is within the width as often as stated."""
    features, quality = linear_world(400, noise=2.0)
    new_features, new_quality = linear_world(1000, noise=2.0, seed=1)
    outlook = fit_router(features, make_table(quality), alpha=0.0).predict(new_features).at()
    assert outlook.conformal_width is not None
    assert outlook.coverage == 0.9
    strengths = outlook.strengths_BM
    behind = strengths.max(axis=1) - strengths[np.arange(1000), new_quality.argmax(axis=1)]
    covered = (behind <= outlook.conformal_width).mean()
    assert 0.86 < covered < 0.96


def test_strange_prompts_are_flagged() -> None:
    """Prompts far from all training prompts are out of distribution; those like them are not."""
    features, quality = linear_world(300)
    model = fit_router(features, make_table(quality), alpha=0.0, head_kind="ridge")
    new_features, _ = linear_world(300, seed=1)
    assert model.predict(new_features).out_of_distribution_B.mean() < 0.06
    assert model.predict(new_features + 8).out_of_distribution_B.mean() > 0.95


def test_members_spread_more_where_there_is_less_data() -> None:
    """The ensemble's disagreement tells a router of few prompts from one of many."""
    spreads = []
    for n_prompts in (40, 400):
        features, quality = linear_world(n_prompts, noise=1.0)
        model = fit_router(features, make_table(quality), alpha=0.0, head_kind="ridge")
        members = model.predict(linear_world(50, seed=1)[0]).member_parts.quality
        assert members.shape == (5, 50, 5)
        spreads.append(members.std(axis=0).mean())
    assert spreads[0] > 2 * spreads[1]


def test_the_label_curve_falls() -> None:
    """In a planted world more labels mean less regret, and the sizes double."""
    features, quality = linear_world(400, noise=0.5)
    curve = fit_router(features, make_table(quality), alpha=0.0).facts["label_curve"]
    assert [point["n_prompts"] for point in curve] == [20, 40, 80, 160, 320]
    assert curve[-1]["regret"] < curve[0]["regret"]
    assert curve[-1]["regret"] < curve[-1]["best_single_regret"]


@pytest.mark.parametrize(("n_prompts", "n_teachers"), [(18, 2), (30, 3), (100, 5)])
def test_rounding_does_not_choose_between_equal_teachers(n_prompts: int, n_teachers: int) -> None:
    """Each teacher is the best equally often and the features say nothing: there is no gain to be found."""
    quality = np.eye(n_teachers)[np.arange(n_prompts) % n_teachers]
    features = np.ones((n_prompts, 4), dtype=np.float32)
    calibration = fit_router(features, make_table(quality), alpha=0.0).calibration[0]
    assert calibration.gain == pytest.approx(0.0)
    assert not calibration.helps

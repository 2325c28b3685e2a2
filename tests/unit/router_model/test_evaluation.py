"""Honest evaluation: exact numbers by hand, planted worlds, and worlds without signal."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from router_model.checkpoint import TrainingFacts
from router_model.errors import TableError
from router_model.evaluation import HELPS, HELPS_NOT, evaluate, fallen_back_because
from router_model.evaluation_set import held_out
from router_model.report import report_markdown
from tests.unit.router_model.doubles import fake_output, planned_manifest
from tests.unit.router_model.worlds import TEACHERS, linear_world, make_manifest, make_table, summary


def planted(
    *, noise: float = 0.0, shuffle: bool = False, n_test: int = 300, **outlook: Any
) -> dict[str, Any]:
    """Least squares on 300 prompts of a linear world, evaluated on others at alpha 0."""
    features, quality = linear_world(300, noise=noise)
    if shuffle:
        features = np.random.default_rng(7).permutation(features)
    training = make_table(quality)
    teachers = [
        summary(name, float(mean), reward=float(mean))
        for name, mean in zip(TEACHERS, quality.mean(axis=0), strict=True)
    ]
    manifest = planned_manifest(teachers, alpha=0.0)
    reward = training.rewards(0.0, manifest.normalization)
    weights = np.linalg.lstsq(features, reward - reward.mean(axis=0), rcond=None)[0]
    new_features, new_quality = linear_world(n_test, noise=noise, seed=1)
    strengths = new_features @ weights + reward.mean(axis=0)
    held = held_out(make_table(new_quality, first_id=1000), manifest)
    return evaluate(fake_output(4 * strengths, **outlook), held, manifest)


def by_hand() -> tuple[dict[str, Any], np.ndarray]:
    """Two teachers of the family, one other; alpha 0; a router that is right on two prompts of four."""
    quality = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.0, np.nan, 1.0]])
    strengths = np.array([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 9.0, 1.0]])
    teachers = [
        summary("alpaca", 0.1, learnability=None, reward=0.1, family="qwen"),
        summary("bison", 0.9, learnability=None, reward=0.5, family="qwen"),
        summary("camel", 0.6, learnability=None, reward=0.8),
    ]
    manifest = planned_manifest(teachers, family="qwen", alpha=0.0)
    return evaluate(fake_output(strengths), held_out(make_table(quality), manifest), manifest), quality


def test_the_numbers_by_hand() -> None:
    """Rewards, regret, gap, hits and shares of a table small enough to do on paper."""
    report, _ = by_hand()
    methods = report["methods"]
    # Choices: persyn bison, bison, alpaca, and camel where bison is missing: rewards 1, 0, 0, 1.
    assert methods["persyn"]["mean_reward"] == 0.5
    assert methods["best_single"]["mean_reward"] == 0.75  # camel: 0.5, 0.5, 1, 1
    assert methods["oracle"]["mean_reward"] == 1.0
    assert methods["strong"]["mean_reward"] == 0.75  # bison 1, 0, 1, then camel 1
    assert methods["family_strong"]["mean_reward"] == 0.5  # bison 1, 0, 1, then alpaca 0
    assert math.isclose(methods["random"]["mean_reward"], (0.5 + 0.5 + 2 / 3 + 0.5) / 4)
    assert methods["persyn"]["regret"] == 0.5
    assert methods["persyn"]["gap_closed"]["value"] == -1.0
    assert methods["best_single"]["gap_closed"]["value"] == 0.0
    assert methods["oracle"]["gap_closed"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert methods["persyn"]["hit_at_1"] == 0.5
    assert methods["best_single"]["hit_at_1"] == 0.5  # a tie with bison on the third prompt is credited
    assert methods["persyn"]["share"] == {"alpaca": 0.25, "bison": 0.5, "camel": 0.25}
    assert math.isclose(methods["mix"]["share"]["bison"], 0.2 * 3 / 4)
    assert all(method["hit_at_3"] == 1.0 for method in methods.values())
    assert report["n_prompts"] == 4
    assert report["verdict"] == HELPS_NOT


def test_what_cannot_be_applied_is_left_out_with_a_note() -> None:
    """car has no learnability here: it is not in the report, and the notes say why."""
    report, _ = by_hand()
    assert "car" not in report["methods"]
    assert any(note.startswith("car is left out") for note in report["notes"])
    assert report["methods"]["persyn"]["mean_learnability"] is None


def test_family_strong_falls_to_the_strongest_other_where_its_family_is_silent() -> None:
    """One prompt without an answer of the family does not drop the method."""
    quality = np.array([[np.nan, 0.2, 0.9], [1.0, 0.0, 0.0]])
    teachers = [summary("alpaca", 0.9, family="qwen"), summary("bison", 0.5), summary("camel", 0.6)]
    manifest = planned_manifest(teachers, family="qwen", alpha=0.0)
    report = evaluate(fake_output(np.zeros((2, 3))), held_out(make_table(quality), manifest), manifest)
    assert report["methods"]["family_strong"]["mean_reward"] == 1.0


def test_a_planted_world_is_recovered() -> None:
    """Most of the gap is closed on unseen prompts, and the verdict says that routing helps."""
    report = planted()
    gap = report["methods"]["persyn"]["gap_closed"]
    assert gap["value"] > 0.9
    assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]
    assert report["verdict"] == HELPS
    assert report["methods"]["oracle"]["hit_at_1"] == report["methods"]["oracle"]["hit_at_3"] == 1.0


def test_shuffled_labels_do_not_help() -> None:
    """Without signal the verdict is to use the best single teacher."""
    report = planted(noise=1.0, shuffle=True)
    assert report["verdict"] == "routing does not help here: use best_single"
    assert report["methods"]["persyn"]["gap_closed"]["value"] < 0.1


def test_helps_is_said_only_if_the_whole_interval_is_above_zero() -> None:
    """A gain within noise is no help, nor is one of a router that has fallen back, which is said in words."""
    rng = np.random.default_rng(0)
    quality = rng.random((60, 3))
    teachers = [
        summary(name, 0.5, reward=reward) for name, reward in zip(TEACHERS, (0.6, 0.5, 0.4), strict=False)
    ]
    manifest = planned_manifest(teachers, alpha=0.0)
    held = held_out(make_table(quality), manifest)
    verdict_of = {}
    # The best single teacher is the first; the router leaves it on some prompts, to the best teacher there.
    for n_better in (0, 1, 40):
        strengths = np.tile([1.0, 0.0, 0.0], (60, 1))
        strengths[:n_better] = 2 * (quality[:n_better] == quality[:n_better].max(axis=1, keepdims=True))
        # And on one prompt to the worst.
        strengths[59] = -quality[59]
        report = evaluate(fake_output(strengths), held, manifest)
        low, high = report["methods"]["persyn"]["gap_closed"]["ci95"]
        verdict_of[n_better] = (report["verdict"], low > 0 or high < 0)
    assert verdict_of == {0: (HELPS_NOT, False), 1: (HELPS_NOT, False), 40: (HELPS, True)}
    fallen = planted(helps=False)
    assert fallen["methods"]["persyn"]["gap_closed"]["ci95"][0] > 0
    assert fallen["verdict"] == HELPS_NOT
    assert fallen["fallen_back"]
    assert fallen["notes"][0] == fallen_back_because(1)
    assert "fallen back" not in " ".join(planted()["notes"])


def test_wins_ties_and_losses_by_hand() -> None:
    """Against the best single teacher, prompt by prompt; a strategy that draws counts by its odds."""
    report, _ = by_hand()
    methods = report["methods"]
    # Rewards of persyn 1, 0, 0, 1 and of camel 0.5, 0.5, 1, 1.
    assert methods["persyn"]["versus_best_single"] == {"win": 0.25, "tie": 0.25, "loss": 0.5}
    assert methods["best_single"]["versus_best_single"] == {"win": 0.0, "tie": 1.0, "loss": 0.0}
    # Random wins on the first two prompts with one teacher of three; it loses with one of three on the first
    # three prompts, and with one of two on the last.
    assert methods["random"]["versus_best_single"] == pytest.approx(
        {"win": 1 / 6, "tie": 11 / 24, "loss": 3 / 8}
    )


def test_baseline_heads_have_rows_of_their_own() -> None:
    """Their strengths choose as the router's do, in the columns of the checkpoint."""
    quality = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]])
    # The checkpoint knows another teacher, first in its order, that the table lacks.
    names = ("aardvark", "alpaca", "bison", "camel")
    teachers = [summary(name, 0.5, reward=r) for name, r in zip(names, (0, 0.4, 0.3, 0.6), strict=True)]
    manifest = planned_manifest(teachers, alpha=0.0)
    held = held_out(make_table(quality), manifest)
    knn = np.array([[9.0, 0.0, 1.0, 0.0], [9.0, 1.0, 0.0, 0.0]])
    report = evaluate(fake_output(np.zeros((2, 4))), held, manifest, baselines={"knn": knn, "paper_bt": -knn})
    assert report["methods"]["knn"]["mean_reward"] == 1.0
    assert report["methods"]["knn"]["gap_closed"]["value"] == 1.0
    assert report["methods"]["knn"]["share"] == {"alpaca": 0.5, "bison": 0.5, "camel": 0.0}
    # Alpaca where it is worth nothing, then bison where that is.
    assert report["methods"]["paper_bt"]["mean_reward"] == 0.0


def test_the_share_of_prompts_out_of_distribution() -> None:
    """As the router has flagged them; its label curve is passed on, and nothing in the report is NaN."""
    manifest = planned_manifest([summary("alpaca", 0.5), summary("bison", 0.4)], alpha=0.0)
    rows = [
        {"n_prompts": n, "regret": 0.2, "regret_se": 0.01, "best_single_regret": 0.3} for n in (50, 100, 200)
    ]
    manifest = dataclasses.replace(manifest, facts={"label_curve": rows})
    output = dataclasses.replace(
        fake_output(np.zeros((4, 2)), conformal_width=0.5, coverage=0.9),
        out_of_distribution_B=np.array([True, False, False, False]),
    )
    report = evaluate(output, held_out(make_table(np.eye(2)[[0, 1, 1, 0]]), manifest), manifest)
    assert report["out_of_distribution"] == 0.25
    assert report["conformal"] == {"coverage_stated": 0.9, "coverage_measured": 1.0, "mean_set_size": 2.0}
    assert report["curves"] == {"alpha": [], "labels": rows}
    assert report["label_advice"]["state"] == "flat"
    json.dumps(report, allow_nan=False)


def test_hit_at_3_of_chance_and_ties() -> None:
    """Random finds the one best of five in its first three draws with chance 3/5; two best, with 9/10."""
    teachers = [summary(name, 0.5) for name in ("alpaca", "bison", "camel", "dingo", "eland")]
    manifest = planned_manifest(teachers, alpha=0.0)
    for quality, expected in (([1, 0, 0, 0, 0], 0.6), ([1, 1, 0, 0, 0], 0.9)):
        held = held_out(make_table(np.array([quality], dtype=float)), manifest)
        report = evaluate(fake_output(np.array([[0.0, 1.0, 2.0, 3.0, 4.0]])), held, manifest)
        assert math.isclose(report["methods"]["random"]["hit_at_3"], expected)
        assert math.isclose(report["methods"]["random"]["hit_at_1"], sum(quality) / 5)
        assert report["methods"]["persyn"]["hit_at_3"] == 0.0


def test_no_gap_is_null_and_no_division_by_zero() -> None:
    """Where one teacher is the best on every prompt there is nothing to close."""
    manifest = make_manifest(
        [summary("alpaca", 1.0, reward=1.0), summary("bison", 0.0, reward=0.0)], alpha=0.0
    )
    held = held_out(make_table(np.tile([1.0, 0.0], (5, 1))), manifest)
    report = evaluate(fake_output(np.tile([1.0, 0.0], (5, 1))), held, manifest)
    assert report["methods"]["persyn"]["gap_closed"] == {"value": None, "ci95": None}
    assert report["verdict"] == HELPS_NOT
    json.dumps(report, allow_nan=False)
    assert "there is no gap to close" in report_markdown(report)


def test_the_interval_is_the_percentile_bootstrap_over_prompts() -> None:
    """The interval agrees with a plain loop over resamples, and its seed fixes it."""
    rng = np.random.default_rng(3)
    quality = rng.random((80, 3))
    strengths = quality + rng.normal(scale=0.7, size=quality.shape)
    manifest = make_manifest(
        [summary(name, 0.5, reward=r) for name, r in zip(TEACHERS, (0.6, 0.4, 0.3), strict=False)], alpha=0.0
    )
    held = held_out(make_table(quality), manifest)
    found = evaluate(fake_output(strengths), held, manifest)["methods"]["persyn"]["gap_closed"]["ci95"]
    reward = held.reward_NM
    chosen, single, oracle = reward[np.arange(80), strengths.argmax(axis=1)], reward[:, 0], reward.max(axis=1)
    ratios = []
    for _ in range(4000):
        rows = rng.integers(80, size=80)
        ratios.append(
            (chosen[rows].mean() - single[rows].mean()) / (oracle[rows].mean() - single[rows].mean())
        )
    np.testing.assert_allclose(found, np.quantile(ratios, [0.025, 0.975]), atol=0.03)
    assert (
        evaluate(fake_output(strengths), held, manifest)["methods"]["persyn"]["gap_closed"]["ci95"] == found
    )


def test_trained_prompts_are_not_evaluated_on() -> None:
    """By hash of the text and by the split column; how many were left out is said."""
    _, quality = linear_world(6)
    table = make_table(quality, quality, split_N=["train", "test", None, None, None, None])
    manifest = make_manifest([summary(name, 0.5) for name in table.teachers])
    trained = TrainingFacts("d" * 64, 2, table.prompt_hashes()[4:])
    held = held_out(table, dataclasses.replace(manifest, training=trained))
    assert held.table.prompt_ids == ("p1", "p2", "p3")
    assert any("3 prompts were left out" in note for note in held.notes)
    everything = TrainingFacts("d" * 64, 6, table.prompt_hashes())
    with pytest.raises(TableError, match="Give a table of other prompts"):
        held_out(table, dataclasses.replace(manifest, training=everything))


def test_why_no_prompt_is_left_is_said() -> None:
    """Trained on, marked ``train``, with one response only: each is counted once."""
    _, quality = linear_world(6, n_teachers=2)
    quality[2:5, 1] = np.nan
    table = make_table(quality, quality, split_N=["train", "train", *[None] * 4])
    manifest = make_manifest([summary(name, 0.5) for name in table.teachers])
    trained = TrainingFacts("d" * 64, 2, (table.prompt_hashes()[0], table.prompt_hashes()[5]))
    reason = "of 6, 2 were trained on, 1 others are marked 'train', and 3 have fewer than two responses"
    with pytest.raises(TableError, match=reason):
        held_out(table, dataclasses.replace(manifest, training=trained))


def test_a_table_with_some_of_the_teachers_is_evaluated_on_those() -> None:
    """The router chooses among the teachers of the table, and the notes name the others."""
    _, quality = linear_world(20, n_teachers=2)
    manifest = make_manifest([summary(name, 0.5) for name in TEACHERS[:3]], alpha=0.0)
    held = held_out(make_table(quality), manifest)
    report = evaluate(fake_output(np.tile([0.0, 1.0, 2.0], (20, 1))), held, manifest)
    assert report["methods"]["persyn"]["share"] == {"alpaca": 0.0, "bison": 1.0}
    assert "the table has no responses of camel" in report["notes"]


@pytest.mark.parametrize(("n_prompts", "verdict"), [(9, HELPS_NOT), (10, HELPS)])
def test_a_handful_of_prompts_is_no_proof(n_prompts: int, verdict: str) -> None:
    """A router that is right on each of nine prompts has an interval without width, and no verdict."""
    quality = np.tile([[0.0, 1.0], [1.0, 0.0]], (5, 1))[:n_prompts]
    teachers = [summary("alpaca", 0.5, reward=0.6), summary("bison", 0.5)]
    manifest = planned_manifest(teachers, alpha=0.0)
    report = evaluate(fake_output(quality), held_out(make_table(quality), manifest), manifest)
    assert report["methods"]["persyn"]["gap_closed"]["ci95"] == [1.0, 1.0]
    assert report["verdict"] == verdict
    assert ("9 held-out prompts are too few" in " ".join(report["notes"])) == (n_prompts == 9)


def test_a_table_that_does_not_fit_the_checkpoint_is_refused() -> None:
    """An unknown teacher, or alpha above 0 without learnability."""
    _, quality = linear_world(6)
    table = make_table(quality)
    with pytest.raises(TableError, match=r"not know: 'dingo', 'eland'\. Leave .* by `persyn extend`"):
        held_out(table, make_manifest([summary(name, 0.5) for name in table.teachers[:3]]))
    with pytest.raises(TableError, match=r"has no learnability, but the checkpoint's alpha is 0.4"):
        held_out(table, make_manifest([summary(name, 0.5) for name in table.teachers]))


def test_a_table_without_some_of_the_teachers_is_judged_by_the_others() -> None:
    """The columns of the checkpoint are found by name, whom the table lacks is said."""
    names = ("aardvark", "alpaca", "bear", "bison")
    manifest = make_manifest([summary(name, 0.5) for name in names], alpha=0.0)
    held = held_out(make_table(np.eye(2)), manifest)
    assert held.columns == (1, 3)
    assert held.notes == ("the table has no responses of aardvark, bear",)
    report = evaluate(fake_output(np.array([[9.0, 1.0, 9.0, 0.0], [9.0, 0.0, 9.0, 1.0]])), held, manifest)
    assert report["methods"]["persyn"]["mean_reward"] == 1.0
    assert "no responses of aardvark, bear" in report_markdown(report)


def test_a_table_without_differences_says_that_it_shows_nothing() -> None:
    """All rewards equal, or learnability alone; a gap in the table is no difference."""
    manifest = make_manifest([summary(name, 0.5) for name in TEACHERS[:2]])
    ties, differing = np.full((4, 2), 0.3), np.tile([0.0, 1.0], (4, 1))
    ties[0, 0] = np.nan
    cases = ((ties, ties, "same reward"), (differing, np.ones((4, 2)), "same learnability"))
    for quality, learnability, expected in cases:
        held = held_out(make_table(quality, learnability), manifest)
        report = evaluate(fake_output(np.zeros(held.reward_NM.shape)), held, manifest)
        assert expected in held.notes[-1]
        assert held.notes[-1] in report_markdown(report)
    assert held_out(make_table(differing, differing), manifest).notes == ()


def test_a_fallback_says_whether_there_was_anything_to_cross_validate() -> None:
    """Nine prompts are too few; from ten on the reason is what cross-validation found."""
    assert fallen_back_because(9).endswith("9 training prompts cannot show a gain, 10 are needed")
    assert fallen_back_because(10).endswith("cross-validation found no clear gain")

"""Honest evaluation: exact numbers by hand, planted worlds, and worlds without signal."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_model.checkpoint import Manifest, TrainingFacts
from router_model.errors import RouterError, TableError
from router_model.evaluation import HELPS, HELPS_NOT, evaluate, held_out, pairwise_calibration
from router_model.model import RouterModel, fit_router
from router_model.plots import write_plots
from router_model.report import report_markdown, summary_lines
from router_model.table import ScoreTable
from tests.unit.router_model.worlds import (
    TEACHERS,
    linear_world,
    make_manifest,
    make_output,
    make_table,
    output_of,
    summary,
)


def manifest_of(model: RouterModel, training: ScoreTable, *, family: str | None = None) -> Manifest:
    manifest = make_manifest(model.teachers, family=family, alpha=model.alpha)
    hashes = training.prompt_hashes()
    return dataclasses.replace(manifest, training=TrainingFacts(training.content_sha256, len(hashes), hashes))


def planted(
    head: str = "auto", *, noise: float = 0.0, shuffle: bool = False, n_test: int = 300
) -> dict[str, Any]:
    """Train on 300 prompts of a linear world and evaluate on others."""
    features, quality = linear_world(300, noise=noise)
    if shuffle:
        features = np.random.default_rng(7).permutation(features)
    training = make_table(quality, quality - 5)
    model = fit_router(features, training, alpha=0.4, head_kind=head)
    new_features, new_quality = linear_world(n_test, noise=noise, seed=1)
    test = make_table(new_quality, new_quality - 5, first_id=1000)
    manifest = manifest_of(model, training)
    return evaluate(make_output(model, new_features), held_out(test, manifest), manifest)


def by_hand() -> tuple[dict[str, Any], np.ndarray]:
    """Two teachers of the family, one other; alpha 0; a router that is right on two prompts of four."""
    quality = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.0, np.nan, 1.0]])
    strengths = np.array([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 9.0, 1.0]])
    teachers = [
        summary("alpaca", 0.1, learnability=None, reward=0.1, family="qwen"),
        summary("bison", 0.9, learnability=None, reward=0.5, family="qwen"),
        summary("camel", 0.6, learnability=None, reward=0.8),
    ]
    manifest = make_manifest(teachers, family="qwen", alpha=0.0)
    return evaluate(output_of(strengths), held_out(make_table(quality), manifest), manifest), quality


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
    manifest = make_manifest(teachers, family="qwen", alpha=0.0)
    report = evaluate(output_of(np.zeros((2, 3))), held_out(make_table(quality), manifest), manifest)
    assert report["methods"]["family_strong"]["mean_reward"] == 1.0


@pytest.mark.parametrize("head", ["auto", "ridge", "bt"])
def test_a_planted_world_is_recovered(head: str) -> None:
    """More than 95 % of the gap is closed on unseen prompts, and the verdict says that routing helps."""
    report = planted(head)
    gap = report["methods"]["persyn"]["gap_closed"]
    assert gap["value"] > 0.95
    assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]
    assert report["verdict"] == HELPS
    assert report["methods"]["oracle"]["hit_at_1"] == report["methods"]["oracle"]["hit_at_3"] == 1.0


@pytest.mark.parametrize("head", ["auto", "ridge"])
def test_shuffled_labels_do_not_help(head: str) -> None:
    """Without signal the verdict is to use the best single teacher."""
    report = planted(head, noise=1.0, shuffle=True)
    assert report["verdict"] == "routing does not help here: use best_single"
    assert report["methods"]["persyn"]["gap_closed"]["value"] < 0.1


def test_probabilities_of_a_noisy_world_are_calibrated() -> None:
    """Expected calibration error is small, the log-loss is better than a coin, and nothing is NaN."""
    report = planted(noise=2.0, n_test=600)
    assert report["calibration"]["pairwise_ece"] < 0.06
    assert report["calibration"]["pairwise_log_loss"] < math.log(2)
    json.dumps(report, allow_nan=False)


def test_hit_at_3_of_chance_and_ties() -> None:
    """Random finds the one best of five in its first three draws with chance 3/5; two best, with 9/10."""
    teachers = [summary(name, 0.5) for name in ("alpaca", "bison", "camel", "dingo", "eland")]
    manifest = make_manifest(teachers, alpha=0.0)
    for quality, expected in (([1, 0, 0, 0, 0], 0.6), ([1, 1, 0, 0, 0], 0.9)):
        held = held_out(make_table(np.array([quality], dtype=float)), manifest)
        report = evaluate(output_of(np.array([[0.0, 1.0, 2.0, 3.0, 4.0]])), held, manifest)
        assert math.isclose(report["methods"]["random"]["hit_at_3"], expected)
        assert math.isclose(report["methods"]["random"]["hit_at_1"], sum(quality) / 5)
        assert report["methods"]["persyn"]["hit_at_3"] == 0.0


def test_no_gap_is_null_and_no_division_by_zero() -> None:
    """Where one teacher is the best on every prompt there is nothing to close."""
    manifest = make_manifest(
        [summary("alpaca", 1.0, reward=1.0), summary("bison", 0.0, reward=0.0)], alpha=0.0
    )
    held = held_out(make_table(np.tile([1.0, 0.0], (5, 1))), manifest)
    report = evaluate(output_of(np.tile([1.0, 0.0], (5, 1))), held, manifest)
    assert report["methods"]["persyn"]["gap_closed"] == {"value": None, "ci95": None}
    assert report["verdict"] == HELPS_NOT
    json.dumps(report, allow_nan=False)
    assert "no gap" in report_markdown(report)


def test_the_interval_is_the_percentile_bootstrap_over_prompts() -> None:
    """The interval agrees with a plain loop over resamples, and its seed fixes it."""
    rng = np.random.default_rng(3)
    quality = rng.random((80, 3))
    strengths = quality + rng.normal(scale=0.7, size=quality.shape)
    manifest = make_manifest(
        [summary(name, 0.5, reward=r) for name, r in zip(TEACHERS, (0.6, 0.4, 0.3), strict=False)], alpha=0.0
    )
    held = held_out(make_table(quality), manifest)
    found = evaluate(output_of(strengths), held, manifest)["methods"]["persyn"]["gap_closed"]["ci95"]
    reward = held.reward_NM
    chosen, single, oracle = reward[np.arange(80), strengths.argmax(axis=1)], reward[:, 0], reward.max(axis=1)
    ratios = []
    for _ in range(4000):
        rows = rng.integers(80, size=80)
        ratios.append(
            (chosen[rows].mean() - single[rows].mean()) / (oracle[rows].mean() - single[rows].mean())
        )
    np.testing.assert_allclose(found, np.quantile(ratios, [0.025, 0.975]), atol=0.03)
    assert evaluate(output_of(strengths), held, manifest)["methods"]["persyn"]["gap_closed"]["ci95"] == found


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


def test_a_table_that_does_not_fit_the_checkpoint_is_refused() -> None:
    """An unknown teacher, or alpha above 0 without learnability."""
    _, quality = linear_world(6)
    table = make_table(quality)
    with pytest.raises(TableError, match="'eland' is unknown"):
        held_out(table, make_manifest([summary(name, 0.5) for name in table.teachers[:4]]))
    with pytest.raises(RouterError, match="no learnability"):
        held_out(table, make_manifest([summary(name, 0.5) for name in table.teachers]))


def test_calibration_of_known_probabilities() -> None:
    """A router that says 0.8 and is right 8 times in 10 has no error; one that says 0.99 has one of 0.19."""
    reward = np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2)
    for said, error in ((0.8, 0.0), (0.99, 0.19)):
        strengths = np.tile([math.log(said / (1 - said)), 0.0], (10, 1))
        found = pairwise_calibration(strengths, reward)
        assert math.isclose(found["pairwise_ece"], error, abs_tol=1e-9)
        assert math.isclose(found["pairwise_log_loss"], -0.8 * math.log(said) - 0.2 * math.log(1 - said))
    coin = pairwise_calibration(np.zeros((10, 2)), reward)
    assert coin["pairwise_ece"] < 1e-12
    assert math.isfinite(pairwise_calibration(np.tile([2000.0, 0.0], (10, 1)), reward)["pairwise_log_loss"])


def test_the_report_is_written_for_a_person(tmp_path: Path) -> None:
    """The verdict stands on top, every method has its row, and three pictures are drawn."""
    report = planted(noise=1.0)
    text = report_markdown(report)
    assert text.splitlines()[2] == "**Routing helps.**"
    assert all(
        f"| {reward:.3f} |" in text for reward in (m["mean_reward"] for m in report["methods"].values())
    )
    assert "verdict: routing helps" in summary_lines(report)[0]
    paths = write_plots(report, tmp_path)
    assert [path.name for path in paths] == ["methods.png", "shares.png", "reliability.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

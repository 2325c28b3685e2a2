"""The curve over alpha, on tables small enough to do on paper."""

import numpy as np
import pytest

from router_model.alpha_curve import ALPHAS
from router_model.evaluation import evaluate
from router_model.evaluation_set import held_out
from tests.unit.router_model.doubles import FakeOutlook, fake_output, planned_manifest
from tests.unit.router_model.worlds import make_table, summary

QUALITY = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
LEARNABILITY = np.array([[-2.0, -1.0], [-1.0, -2.0], [-2.0, -1.0]])
TEACHERS = [summary("alpaca", 0.7, reward=0.6), summary("bison", 0.3, reward=0.4)]


def choosing(columns: list[int], *, helps: bool = True) -> FakeOutlook:
    """An outlook that prefers these teachers, prompt by prompt."""
    return FakeOutlook(np.eye(2)[columns], helps=helps)


def test_each_alpha_is_judged_by_its_own_reward_and_best_single_teacher() -> None:
    """Gaps, means and fall-backs by hand at alpha 0, 0.5 and 1."""
    others = dict.fromkeys(ALPHAS, choosing([0, 0, 0]))
    others |= {0.0: choosing([0, 0, 1]), 0.5: choosing([1, 1, 0]), 1.0: choosing([1, 1, 1])}
    others[0.9] = choosing([0, 1, 0], helps=False)
    held = held_out(make_table(QUALITY, LEARNABILITY), manifest := planned_manifest(TEACHERS))
    report = evaluate(fake_output(np.eye(2)[[0, 0, 1]], others=others), held, manifest)
    curve = {point["alpha"]: point for point in report["curves"]["alpha"]}
    assert list(curve) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    # Quality alone: alpaca has 1, 1, 0, and the router is the oracle.
    assert curve[0.0]["gap_closed"]["value"] == 1.0
    # Half and half: rewards (.5 .5), (1 0), (0 1). Alpaca has 1/2, the oracle 5/6, the router 1/6.
    assert curve[0.5]["gap_closed"]["value"] == pytest.approx(-1.0)
    # Learnability alone: bison, the best single teacher of the training table there, is the router's choice.
    assert curve[1.0]["gap_closed"]["value"] == 0.0
    assert curve[1.0]["best_single"]["teacher"] == "bison"
    assert curve[0.4]["best_single"]["teacher"] == "alpaca"
    assert curve[1.0]["mean_quality"] == pytest.approx(1 / 3)
    assert curve[1.0]["mean_learnability"] == pytest.approx(-4 / 3)
    assert [point["helps"] for point in curve.values()] == [True] * 9 + [False, True]
    # A router that has fallen back is the best single teacher, whatever its strengths are.
    assert curve[0.9]["gap_closed"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert curve[0.9]["mean_quality"] == curve[0.9]["best_single"]["mean_quality"]
    assert curve[0.0]["gap_closed"]["ci95"] == [1.0, 1.0]


def test_the_next_teacher_answers_where_the_best_single_one_is_missing() -> None:
    """By the mean reward at the checkpoint's alpha; the gap is not measured on air."""
    quality = QUALITY.copy()
    quality[1, 0] = np.nan
    quality = np.column_stack([quality, [0.5, 0.5, 0.5]])
    learnability = np.column_stack([LEARNABILITY, [-3.0, -3.0, -3.0]])
    teachers = [*TEACHERS, summary("camel", 0.5, reward=0.5)]
    held = held_out(make_table(quality, learnability), manifest := planned_manifest(teachers))
    outlook = FakeOutlook(np.zeros((3, 3)))
    report = evaluate(
        fake_output(outlook.strengths_BM, others=dict.fromkeys(ALPHAS, outlook)), held, manifest
    )
    # Alpaca has qualities 1 and 0; where it is missing, camel (0.5) comes before bison.
    assert report["curves"]["alpha"][0]["best_single"]["mean_quality"] == pytest.approx(0.5)


def test_there_is_no_curve_without_other_alphas_or_learnability() -> None:
    """It is empty, and a note says so, rather than a line through one point."""
    manifest = planned_manifest(TEACHERS, alpha=0.0)
    fixed = fake_output(np.eye(2)[[0, 0, 1]])
    any_alpha = fake_output(np.eye(2)[[0, 0, 1]], others=dict.fromkeys(ALPHAS, choosing([0, 0, 1])))
    tables = {True: make_table(QUALITY, LEARNABILITY), False: make_table(QUALITY)}
    lengths = []
    for output, has_learnability in ((fixed, True), (any_alpha, False), (any_alpha, True)):
        report = evaluate(output, held_out(tables[has_learnability], manifest), manifest)
        lengths.append(len(report["curves"]["alpha"]))
        assert any("no curve over alpha" in note for note in report["notes"]) == (lengths[-1] == 0)
    assert lengths == [0, 0, 11]

"""Probabilities and conformal sets whose errors are known."""

import math

import numpy as np

from router_model.calibration import conformal_coverage, pairwise_calibration

NAN = np.nan


def test_calibration_of_known_probabilities() -> None:
    """A router that says 0.8 and is right 8 times in 10 has no error; one that says 0.99 has one of 0.19."""
    reward = np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2)
    for said, error in ((0.8, 0.0), (0.99, 0.19)):
        strengths = np.tile([math.log(said / (1 - said)), 0.0], (10, 1))
        found = pairwise_calibration(strengths, reward)
        assert math.isclose(found["pairwise_ece"], error, abs_tol=1e-9)
        assert math.isclose(found["pairwise_log_loss"], -0.8 * math.log(said) - 0.2 * math.log(1 - said))
        assert found["pairwise_accuracy"] == 0.8
    coin = pairwise_calibration(np.zeros((10, 2)), reward)
    assert coin["pairwise_ece"] < 1e-12
    assert coin["pairwise_accuracy"] == 0.5
    assert math.isfinite(pairwise_calibration(np.tile([2000.0, 0.0], (10, 1)), reward)["pairwise_log_loss"])


def test_accuracy_counts_pairs_with_a_winner_only() -> None:
    """Of three pairs one is a tie, one is right and one is wrong; a missing teacher has no pair."""
    strengths = np.array([[3.0, 2.0, 1.0, 9.0]])
    reward = np.array([[0.5, 0.5, 0.2, NAN], [0.0, 0.0, 0.0, NAN]])
    found = pairwise_calibration(np.tile(strengths, (2, 1)), reward)
    assert found["pairwise_accuracy"] == 1.0
    reward[1] = [0.0, 0.3, 0.3, NAN]
    assert pairwise_calibration(np.tile(strengths, (2, 1)), reward)["pairwise_accuracy"] == 0.5
    assert pairwise_calibration(strengths, np.full((1, 4), 0.3))["pairwise_accuracy"] is None


def test_conformal_sets_by_hand() -> None:
    """The set is all within the width of the greatest present strength; any of several best ones counts."""
    strengths = np.array([[2.0, 1.5, 0.0], [2.0, 1.0, 0.0], [9.0, 1.0, 0.5], [2.0, 0.0, 0.0]])
    reward = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [NAN, 0.0, 1.0], [1.0, 0.0, 1.0]])
    found = conformal_coverage(strengths, reward, 0.5, 0.9)
    # Sets {0, 1}, {0}, {1, 2} (without the missing teacher) and {0}: the second misses the best teacher.
    assert found == {"coverage_stated": 0.9, "coverage_measured": 0.75, "mean_set_size": 1.5}
    # Without a bound the set is all who answered.
    assert conformal_coverage(strengths, reward, math.inf, 0.9)["mean_set_size"] == 2.75

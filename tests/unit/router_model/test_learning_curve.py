"""Advice on labels: planted power laws are found, level and noisy curves give no hope."""

from typing import Any

import numpy as np
import pytest

from router_model.learning_curve import PowerLaw, advise, fit_power_law

SIZES = (50, 100, 200, 400, 800)


def rows_of(
    regrets: Any, *, error: float = 0.005, rival: float = 0.5, sizes: tuple[int, ...] = SIZES
) -> list[dict[str, Any]]:
    """A label curve as training records it."""
    return [
        {"n_prompts": n, "regret": float(regret), "regret_se": error, "best_single_regret": rival}
        for n, regret in zip(sizes, regrets, strict=True)
    ]


@pytest.mark.parametrize("planted", [(0.1, 1.5, 0.5), (0.0, 0.6, 0.2), (0.2, 4.0, 1.0), (0.15, 0.3, 0.1)])
def test_a_planted_power_law_is_recovered(planted: tuple[float, float, float]) -> None:
    """a, b and c to three digits, from five points without noise."""
    sizes = np.array(SIZES, dtype=float)
    law = fit_power_law(sizes, np.array([PowerLaw(*planted).at(n) for n in SIZES]), np.ones(5))
    assert (law.a, law.b, law.c) == pytest.approx(planted, rel=1e-3, abs=1e-6)


def test_a_rising_curve_is_fitted_level() -> None:
    """b is not negative: labels never harm, so a rise is noise."""
    law = fit_power_law(np.array(SIZES, dtype=float), np.array([0.1, 0.12, 0.11, 0.14, 0.15]), np.ones(5))
    assert law.b == 0.0
    assert law.a == pytest.approx(0.124)


def test_precise_points_weigh_more() -> None:
    """An outlier with a small weight does not move the curve."""
    truth = np.array([PowerLaw(0.1, 1.0, 0.5).at(n) for n in SIZES])
    bent = truth + np.array([0.0, 0.2, 0.0, 0.0, 0.0])
    law = fit_power_law(np.array(SIZES, dtype=float), bent, np.array([1.0, 1e-9, 1.0, 1.0, 1.0]))
    assert law.c == 0.5
    assert law.at(800) == pytest.approx(truth[-1], abs=1e-4)


def test_a_falling_curve_advises_more_labels() -> None:
    """The fall at 2 and 4 times the labels is that of the planted law, and the text names the number."""
    law = PowerLaw(0.05, 2.0, 0.5)
    found = advise(rows_of([law.at(n) for n in SIZES]))
    assert found["state"] == "falling"
    assert found["n_more_labels"] == 800
    assert [row["n_prompts"] for row in found["expected"]] == [1600, 3200]
    for row in found["expected"]:
        assert row["regret"] == pytest.approx(law.at(row["n_prompts"]), rel=1e-3)
        assert row["fall"] == pytest.approx(law.at(800) - law.at(row["n_prompts"]), rel=1e-2)
    assert "label about 800 prompts more" in found["text"]
    assert "a fall of 0.021" in found["text"]


def test_only_four_times_the_labels_may_show() -> None:
    """Where twice as many would not be told from noise, three times as many more are advised."""
    law = PowerLaw(0.05, 2.0, 0.5)
    # Falls of 0.021 at 2 times and 0.035 at 4 times.
    assert advise(rows_of([law.at(n) for n in SIZES], error=0.03))["n_more_labels"] == 2400


def test_a_fall_that_may_be_chance_is_no_fall() -> None:
    """A line through noise promises much; three points within two standard errors do not bear it."""
    found = advise(rows_of((0.25, 0.22, 0.19), error=0.03, sizes=(100, 200, 400)))
    assert found["expected"][1]["fall"] > found["noise"]
    assert found["state"] == "flat"
    precise = advise(rows_of((0.25, 0.22, 0.19), error=0.01, sizes=(100, 200, 400)))
    assert precise["state"] == "falling"


@pytest.mark.parametrize(
    "regrets",
    [
        (0.2, 0.2, 0.2, 0.2, 0.2),
        (0.2, 0.21, 0.19, 0.2, 0.21),  # noise about a level
        (0.6, 0.3, 0.21, 0.2, 0.2),  # fell, and has arrived
        (0.21, 0.207, 0.205, 0.203, 0.201),  # falls by less than one standard error
    ],
)
def test_a_flat_curve_advises_none(regrets: tuple[float, ...]) -> None:
    """Level, noisy, levelled off, or falling within the noise."""
    found = advise(rows_of(regrets, error=0.012))
    assert found["state"] == "flat"
    assert found["n_more_labels"] is None
    assert found["text"].startswith("More labels would hardly pay")


def test_noise_rarely_passes_for_a_fall() -> None:
    """Of 200 level curves with noise of their standard error, few are called falling."""
    rng = np.random.default_rng(0)
    states = [advise(rows_of(0.2 + 0.02 * rng.normal(size=5), error=0.02))["state"] for _ in range(200)]
    assert states.count("falling") <= 12


def test_three_points_without_errors_are_enough_and_two_are_not() -> None:
    """Without standard errors the residuals are the noise; a missing curve is no advice, not a failure."""
    law = PowerLaw(0.0, 2.0, 0.5)
    three = rows_of([law.at(n) for n in SIZES[:3]], error=0.0, sizes=SIZES[:3])
    assert advise(three)["state"] == "falling"
    assert advise(list(reversed(three))) == advise(three)
    for rows in ([], three[:2], [three[0]] * 5):
        found = advise(rows)
        assert (found["state"], found["fit"], found["expected"]) == ("unknown", None, [])


def test_how_far_the_best_single_teacher_is() -> None:
    """It says at how many labels the router meets it, or that none will do, or nothing if it is beaten."""
    law = PowerLaw(0.05, 2.0, 0.5)
    regrets = [law.at(n) for n in SIZES]
    # 0.05 + 2 / sqrt(n) = 0.1 at n = 1600.
    text = advise(rows_of(regrets, rival=0.1))["text"]
    met = int(text.rsplit("at about ", 1)[1].rstrip(".").replace(",", ""))
    assert met == pytest.approx(1600, rel=0.01)
    assert "no number of labels" in advise(rows_of(regrets, rival=0.04))["text"]
    assert "best single" not in advise(rows_of(regrets, rival=0.2))["text"]

"""Which prompts to label next: they cover the world, once each, the uncertain ones first."""

import numpy as np
import pytest

from router_model.errors import RouterError
from router_model.label_advice import choose_prompts

LINE = np.array([[0.0], [1.0], [2.0], [10.0]])
ALIKE = np.ones(4)


def test_the_farthest_next_on_a_line() -> None:
    """By hand: the first of equals, then the far end, then the middle of what is left."""
    assert choose_prompts(LINE, ALIKE, 4).tolist() == [0, 3, 2, 1]


def test_uncertainty_weighs_distance() -> None:
    """The most uncertain is first; a certain prompt far off gives way to a nearer uncertain one."""
    assert choose_prompts(LINE, np.array([1.0, 1.0, 9.0, 0.1]), 2).tolist() == [2, 0]
    # Without uncertainty they come last, but they come.
    assert choose_prompts(LINE, np.array([0.0, 1.0, 0.0, 0.0]), 3).tolist() == [1, 3, 0]
    assert choose_prompts(LINE, np.zeros(4), 2).tolist() == [0, 3]


def test_labelled_prompts_are_kept_away_from() -> None:
    """What lies beside a label comes late, and what is the same never."""
    assert choose_prompts(LINE, ALIKE, 9, labelled_LD=np.array([[10.0], [9.0]])).tolist() == [0, 2, 1]


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_duplicates_are_not_chosen_twice(offset: float) -> None:
    """Of forty copies of five prompts, five are chosen, whatever n and wherever they lie."""
    distinct = np.random.default_rng(0).normal(size=(5, 16)) + offset
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(5), 8))
    chosen = choose_prompts(distinct[order], np.linspace(1, 2, 40), 100)
    assert sorted(order[chosen].tolist()) == [0, 1, 2, 3, 4]


def test_more_than_there_are_and_none() -> None:
    """n above the number of prompts gives each once; 0, and no prompts, give none."""
    features = np.random.default_rng(0).normal(size=(7, 3))
    assert sorted(choose_prompts(features, np.ones(7), 50).tolist()) == list(range(7))
    assert choose_prompts(features, np.ones(7), 0).tolist() == []
    assert choose_prompts(np.empty((0, 3)), np.empty(0), 5).tolist() == []


def test_the_choice_is_deterministic() -> None:
    """The same input gives the same choice, and the scale of the uncertainty does not matter."""
    features, uncertainty = np.random.default_rng(0).normal(size=(50, 4)), np.random.default_rng(1).random(50)
    first = choose_prompts(features, uncertainty, 20).tolist()
    assert choose_prompts(features, uncertainty, 20).tolist() == first
    assert choose_prompts(features, 1000 * uncertainty, 20).tolist() == first
    assert len(set(first)) == 20


def test_chosen_labels_beat_random_ones_on_a_planted_world() -> None:
    """Ten kinds of prompts of very unequal size, each with a teacher of its own: nearest-label routing errs
    less with 20 chosen labels than with 20 random ones, on average and in 19 draws of 20."""
    rng = np.random.default_rng(0)
    kind_U = np.repeat(np.arange(10), [820, *[20] * 9])
    features = 8 * rng.normal(size=(10, 6))[kind_U] + rng.normal(size=(1000, 6))

    def regret(labelled: np.ndarray) -> float:
        distances = ((features[:, None] - features[labelled][None]) ** 2).sum(axis=2)
        return float(np.mean(kind_U[labelled][distances.argmin(axis=1)] != kind_U))

    chosen = regret(choose_prompts(features, np.ones(1000), 20))
    drawn = [regret(rng.choice(1000, 20, replace=False)) for _ in range(20)]
    assert chosen < 0.5 * np.mean(drawn)
    assert sum(chosen < other for other in drawn) >= 19


@pytest.mark.parametrize(
    ("features", "uncertainty", "n", "labelled"),
    [
        (LINE, np.ones(3), 1, None),
        (np.ones(4), ALIKE, 1, None),
        (LINE, ALIKE, -1, None),
        (LINE, np.array([1.0, np.nan, 1.0, 1.0]), 1, None),
        (LINE, np.array([1.0, -1.0, 1.0, 1.0]), 1, None),
        (np.array([[0.0], [np.inf], [1.0], [2.0]]), ALIKE, 1, None),
        (LINE, ALIKE, 1, np.ones((2, 3))),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(
    features: np.ndarray, uncertainty: np.ndarray, n: int, labelled: np.ndarray | None
) -> None:
    """Wrong shapes, values that are not finite, negative uncertainty or number."""
    with pytest.raises(RouterError):
        choose_prompts(features, uncertainty, n, labelled_LD=labelled)

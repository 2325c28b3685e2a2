"""Normalisation, mixing and regret."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from router_model.errors import RouterError
from router_model.reward import Normalization, mix_reward, normalize, regret

METHODS: list[Normalization] = ["minmax", "zscore", "rank"]
VALUES = arrays(np.float64, (4, 5), elements=st.floats(-1e6, 1e6, allow_subnormal=False))
MASKS = arrays(np.bool_, (4, 5))


def test_minmax_by_hand() -> None:
    """The lowest present value is 0, the highest 1, a masked cell NaN whatever stands in it."""
    values, mask = np.array([[1.0, 3.0, 2.0, 99.0]]), np.array([[True, True, True, False]])
    np.testing.assert_allclose(normalize(values, mask), [[0.0, 1.0, 0.5, np.nan]])
    np.testing.assert_allclose(normalize(values, mask, "rank"), [[0.0, 1.0, 0.5, np.nan]])
    deviation = np.sqrt(2 / 3)
    np.testing.assert_allclose(
        normalize(values, mask, "zscore"), [[-1 / deviation, 1 / deviation, 0.0, np.nan]]
    )
    np.testing.assert_allclose(normalize(values, mask, "none"), [[1.0, 3.0, 2.0, np.nan]])


def test_ties_share_their_mean_rank() -> None:
    """Equal values have equal ranks, so no teacher gains by its column."""
    ranks = normalize(np.array([[5.0, 5.0, 1.0]]), np.ones((1, 3), dtype=bool), "rank")
    np.testing.assert_allclose(ranks, [[0.75, 0.75, 0.0]])


@pytest.mark.parametrize(("method", "constant"), [("minmax", 0.5), ("rank", 0.5), ("zscore", 0.0)])
def test_a_constant_prompt_cannot_move_the_choice(method: Normalization, constant: float) -> None:
    """All equal, or one teacher alone, gives the neutral value."""
    values, mask = np.array([[2.0, 2.0], [7.0, 1.0]]), np.array([[True, True], [True, False]])
    np.testing.assert_allclose(normalize(values, mask, method), [[constant, constant], [constant, np.nan]])


@given(VALUES, MASKS, st.sampled_from(METHODS))
def test_normalisation_keeps_the_order_and_the_mask(
    values: np.ndarray, mask: np.ndarray, method: Normalization
) -> None:
    """A higher present value never gets a lower result, and exactly the masked cells are NaN."""
    result = normalize(values, mask, method)
    np.testing.assert_array_equal(np.isnan(result), ~mask)
    for before, after, present in zip(values, result, mask, strict=True):
        order = np.argsort(before[present], kind="stable")
        assert (np.diff(after[present][order]) >= 0).all()
    if method != "zscore":
        assert np.nanmin(result, initial=0) >= 0
        assert np.nanmax(result, initial=0) <= 1


@given(VALUES, st.floats(0.1, 100), st.floats(-100, 100))
def test_minmax_ignores_scale_and_shift(values: np.ndarray, scale: float, shift: float) -> None:
    """Reward models on any scale give the same reward."""
    values, mask = np.round(values), np.ones(values.shape, dtype=bool)
    np.testing.assert_allclose(normalize(values * scale + shift, mask), normalize(values, mask), atol=1e-4)


def test_the_mix_is_convex_and_alpha_zero_needs_no_learnability() -> None:
    """r = (1 - alpha) r_q + alpha r_l on normalised values."""
    quality, learnability = np.array([[0.0, 10.0, 5.0]]), np.array([[-1.0, -3.0, -3.0]])
    mask = np.ones((1, 3), dtype=bool)
    np.testing.assert_allclose(mix_reward(quality, learnability, mask, alpha=0.4), [[0.4, 0.6, 0.3]])
    np.testing.assert_allclose(mix_reward(quality, None, mask, alpha=0.0), [[0.0, 1.0, 0.5]])


def test_alpha_without_learnability_is_refused_with_the_remedy() -> None:
    """A missing term is never taken as zero."""
    mask = np.ones((1, 2), dtype=bool)
    with pytest.raises(RouterError, match=r"no learnability.*alpha 0"):
        mix_reward(np.ones((1, 2)), None, mask, alpha=0.4)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(RouterError, match="alpha is"):
            mix_reward(np.ones((1, 2)), np.ones((1, 2)), mask, alpha=alpha)


def test_an_unknown_normalisation_names_the_known_ones() -> None:
    """A misspelt method is an error that helps."""
    with pytest.raises(RouterError, match=r"'softmax'.*minmax"):
        normalize(np.ones((1, 2)), np.ones((1, 2), dtype=bool), "softmax")  # type: ignore[arg-type]


@given(VALUES, VALUES)
def test_regret_is_zero_for_the_oracle_and_never_negative(values: np.ndarray, rewards: np.ndarray) -> None:
    """Following the rewards themselves loses nothing; nothing gains on them."""
    mask = np.ones(rewards.shape, dtype=bool)
    assert (regret(rewards, rewards, mask) == 0).all()
    assert (regret(values, rewards, mask) >= 0).all()


def test_regret_looks_at_present_teachers_only() -> None:
    """A masked favourite is neither chosen nor the best."""
    mask = np.array([[True, True, False]])
    assert regret(np.array([[2.0, 1.0, 9.0]]), np.array([[0.3, 0.8, np.nan]]), mask).tolist() == [0.5]

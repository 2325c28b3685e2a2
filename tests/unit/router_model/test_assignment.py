"""Corpus-level assignment, against every assignment there is on small corpora."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_model.assignment import CorpusAssignment, Limits, assign
from router_model.errors import InfeasiblePlanError

FloatArray = NDArray[np.float64]
NAMES = "abc"


def limits(
    n_prompts: int, n_teachers: int, least: Any = 0, most: Any = None, budget_usd: float | None = None
) -> Limits:
    return Limits(
        np.broadcast_to(np.array(least), n_teachers).astype(np.intp),
        np.broadcast_to(np.array(n_prompts if most is None else most), n_teachers).astype(np.intp),
        budget_usd,
    )


def assigned(
    values_NM: Any, bounds: Limits, cost_usd_NM: Any = None, allowed_NM: Any = None
) -> CorpusAssignment:
    values_NM = np.array(values_NM, dtype=np.float64)
    cost = None if cost_usd_NM is None else np.array(cost_usd_NM, dtype=np.float64)
    allowed = np.ones(values_NM.shape, dtype=np.bool_) if allowed_NM is None else np.array(allowed_NM)
    names = [NAMES[column] for column in range(values_NM.shape[1])]
    return assign(names, values_NM, allowed, bounds, cost)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], Limits]:
    """Up to 5 prompts and 3 teachers with values, costs, allowed pairs and limits, feasible or not."""
    n_prompts, n_teachers = draw(st.integers(1, 5)), draw(st.integers(2, 3))
    size = n_prompts * n_teachers
    values = draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size))
    costs = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    allowed = np.array(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))) > 0
    allowed_NM = allowed.reshape(n_prompts, n_teachers)
    allowed_NM[:, 0] |= ~allowed_NM.any(axis=1)
    least = draw(st.lists(st.integers(0, 2), min_size=n_teachers, max_size=n_teachers))
    most = draw(st.lists(st.integers(1, n_prompts + 1), min_size=n_teachers, max_size=n_teachers))
    budget = draw(st.none() | st.integers(0, 6 * n_prompts).map(lambda usd: usd * 1e-4))
    shape = (n_prompts, n_teachers)
    bounds = limits(*shape, least, most, budget)
    return np.reshape(values, shape) / 8, np.reshape(costs, shape) * 1e-4, allowed_NM, bounds


def every_assignment(
    cost_usd_NM: FloatArray, allowed_NM: NDArray[np.bool_], bounds: Limits
) -> list[tuple[tuple[int, ...], float]]:
    """All that keep to the bounds, with their costs; the budget is left out."""
    n_prompts, n_teachers = allowed_NM.shape
    rows = np.arange(n_prompts)
    found = []
    for columns in itertools.product(range(n_teachers), repeat=n_prompts):
        counts_M = np.bincount(columns, minlength=n_teachers)
        fits = (counts_M >= bounds.least_M).all() and (counts_M <= bounds.most_M).all()
        if fits and allowed_NM[rows, columns].all():
            found.append((columns, float(cost_usd_NM[rows, columns].sum())))
    return found


@settings(max_examples=150)
@given(corpora())
def test_it_is_the_best_of_all_assignments(
    corpus: tuple[FloatArray, FloatArray, NDArray[np.bool_], Limits],
) -> None:
    """Within all limits, the best of all, below the upper bound; an error exactly where nothing fits, with
    the least cost that does. So few prompts are all free in the rounding, so nothing is lost by it."""
    values_NM, cost_usd_NM, allowed_NM, bounds = corpus
    within = every_assignment(cost_usd_NM, allowed_NM, bounds)
    budget = np.inf if bounds.budget_usd is None else bounds.budget_usd + 1e-9
    affordable = [columns for columns, cost in within if cost <= budget]
    if not affordable:
        with pytest.raises(InfeasiblePlanError) as refused:
            assigned(values_NM, bounds, cost_usd_NM, allowed_NM)
        least = min((cost for _, cost in within), default=None)
        told = refused.value.details.get("least_cost_usd")
        assert told == (None if least is None else pytest.approx(least, abs=1.1e-6))
        return
    found = assigned(values_NM, bounds, cost_usd_NM, allowed_NM)
    rows = np.arange(len(values_NM))
    assert tuple(found.columns_N) in affordable
    assert found.value == pytest.approx(values_NM[rows, found.columns_N].sum())
    best = max(values_NM[rows, columns].sum() for columns in affordable)
    assert found.value == pytest.approx(best, abs=1e-6)
    assert best <= found.upper_bound + 1e-6
    assert bounds.budget_usd is not None or found.n_split == 0


@settings(max_examples=60)
@given(corpora())
def test_the_prices_prove_the_bound(
    corpus: tuple[FloatArray, FloatArray, NDArray[np.bool_], Limits],
) -> None:
    """Sum of the prompts' best values at the prices, plus what the limits are worth at them, is the upper
    bound: strong duality, so the prices are right and the bound holds."""
    values_NM, cost_usd_NM, allowed_NM, bounds = corpus
    try:
        found = assigned(values_NM, bounds, cost_usd_NM, allowed_NM)
    except InfeasiblePlanError:
        return
    price_M = found.prompt_price_M
    assert found.usd_price >= 0
    reduced_NM = values_NM - found.usd_price * cost_usd_NM - price_M
    rent = np.where(allowed_NM, reduced_NM, -np.inf).max(axis=1).sum()
    worth = (np.maximum(price_M, 0) * bounds.most_M).sum() + (np.minimum(price_M, 0) * bounds.least_M).sum()
    worth += found.usd_price * (bounds.budget_usd or 0.0)
    assert rent + worth == pytest.approx(found.upper_bound, abs=1e-5)


def test_a_large_corpus_is_split_in_few_places_and_loses_little() -> None:
    """With a budget and bounds, at most one prompt per limit is split, and the gap is small beside the value
    of one answer."""
    rng = np.random.default_rng(0)
    values_NM = rng.normal(size=(500, 3))
    cost_usd_NM = rng.lognormal(size=(500, 3)) * np.array([1e-2, 1e-3, 1e-4])
    bounds = limits(500, 3, 50, 250, budget_usd=1.0)
    found = assigned(values_NM, bounds, cost_usd_NM)
    cost_usd = cost_usd_NM[np.arange(500), found.columns_N].sum()
    assert cost_usd <= 1.0 + 1e-9
    assert 0 < found.n_split <= 7
    assert 0 <= found.upper_bound - found.value < 0.2
    assert found.usd_price > 0
    counts_M = np.bincount(found.columns_N, minlength=3)
    assert (counts_M >= 50).all()
    assert (counts_M <= 250).all()


def test_shadow_prices_are_what_a_bit_more_is_worth() -> None:
    """One prompt more for a full teacher, and one dollar more of budget, change the value by their prices."""
    values_NM = [[1.0, 0.5], [0.8, 0.5], [0.7, 0.5]]
    full = assigned(values_NM, limits(3, 2, 0, [1, 3]))
    assert full.value == pytest.approx(2.0)
    assert full.prompt_price_M[0] == pytest.approx(0.25, abs=0.0501)
    forced = assigned(values_NM, limits(3, 2, [0, 1], 3))
    assert forced.prompt_price_M[1] == pytest.approx(-0.25, abs=0.0501)
    cost_usd_NM = [[1.0, 0.0]] * 3
    less, more = (assigned(values_NM, limits(3, 2, budget_usd=usd), cost_usd_NM) for usd in (1.5, 2.0))
    assert less.usd_price == pytest.approx(0.3)
    assert less.upper_bound + 0.5 * less.usd_price == pytest.approx(more.value)


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        (limits(4, 2, [3, 2]), "add up to 5 prompts, and there are 4"),
        (limits(4, 2, 0, [1, 2]), "leave 1 of 4 prompts without a teacher"),
        (limits(4, 2, [2, 0], [1, 4]), "the share of 'a' holds no whole number of prompts"),
        (limits(4, 2, [0, 3]), "'b' asks for at least 3 prompts, but the options allow it for 2 of 4"),
        (limits(4, 2, budget_usd=0.25), r"cheapest plan .* cost \$0\.400000"),
    ],
)
def test_limits_that_nothing_meets_are_told(bounds: Limits, told: str) -> None:
    """Which bound is at fault, or what the least possible cost is."""
    allowed = [[True, True], [True, True], [True, False], [True, False]]
    with pytest.raises(InfeasiblePlanError, match=told):
        assigned(np.eye(4)[:, :2], bounds, np.full((4, 2), 0.1), allowed)


def test_the_least_cost_that_is_told_is_a_budget_that_suffices() -> None:
    """The number of the message, given back, makes a plan."""
    cost_usd_NM = np.random.default_rng(1).random((20, 3)) / 7
    with pytest.raises(InfeasiblePlanError) as refused:
        assigned(np.zeros((20, 3)), limits(20, 3, 2, budget_usd=0.0), cost_usd_NM)
    least_usd = refused.value.details["least_cost_usd"]
    found = assigned(np.zeros((20, 3)), limits(20, 3, 2, budget_usd=least_usd), cost_usd_NM)
    assert cost_usd_NM[np.arange(20), found.columns_N].sum() <= least_usd + 1e-9

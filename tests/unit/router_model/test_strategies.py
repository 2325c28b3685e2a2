"""Choosing a teacher: seven strategies, their invariants, and their odds."""

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clients.errors import UnknownTeacherError
from clients.types import RoutingDecision, Strategy
from router_model.checkpoint import Manifest
from router_model.errors import RouterError, StrategyError
from router_model.strategies import RouteOptions, decide
from tests.unit.router_model.worlds import make_manifest, output_of, summary

TEACHERS = (
    summary("alpaca", 0.9, learnability=-3.0, reward=0.5, family="llama"),
    summary("bison", 0.6, learnability=-0.5, reward=0.7, family="qwen"),
    summary("camel", 0.7, learnability=-1.0, reward=0.6, family="qwen"),
    summary("dingo", 0.2, learnability=-0.4, reward=0.2),
)
MANIFEST = make_manifest(TEACHERS, family="qwen")
STRENGTHS = arrays(np.float64, (1, 4), elements=st.integers(-40, 40).map(lambda n: n / 8), unique=True)


def choose(
    strengths: Any = (0.1, 0.2, -0.5, 0.0),
    prompt_id: str = "p",
    manifest: Manifest = MANIFEST,
    **options: Any,
) -> RoutingDecision:
    output = output_of(np.array(strengths, dtype=np.float64).reshape(1, -1))
    return decide(manifest, output, 0, prompt_id, RouteOptions(**options))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("persyn", "bison"),
        ("strong", "alpaca"),
        ("family_strong", "camel"),
        ("best_single", "bison"),
        ("car", "bison"),
    ],
)
def test_each_ranked_strategy_takes_its_own_best(strategy: str, expected: str) -> None:
    """By strength, by quality, by quality within the family, by reward, by quality over loss."""
    decision = choose(strategy=strategy)
    assert decision.teacher == expected
    assert decision.propensity == 1.0


def test_car_is_the_published_formula() -> None:
    """r / (1 + beta L): beta 0 ignores the loss, a large beta lets it rule."""
    assert choose(strategy="car", beta=0.0).teacher == "alpaca"
    assert choose(strategy="car", beta=1.0).teacher == "bison"  # 0.6 / 1.5 > 0.7 / 2 > 0.9 / 4 > 0.2 / 1.4
    assert choose(strategy="car", beta=1.0, exclude=("bison",)).teacher == "camel"


def test_car_with_negative_quality_does_not_reward_loss() -> None:
    """Of two teachers with one negative quality the one with the smaller loss wins."""
    teachers = [
        summary("a", -2.0, learnability=-3.0),
        summary("b", -2.0, learnability=-1.0),
        summary("c", -5.0),
    ]
    assert choose((0, 0, 0), manifest=make_manifest(teachers), strategy="car").teacher == "b"


def test_what_a_strategy_lacks_is_an_error_and_no_silent_change() -> None:
    """family_strong without kin, car without learnability or with impossible values, another alpha."""
    with pytest.raises(RouterError, match="family"):
        choose(strategy="family_strong", exclude=("bison", "camel"))
    with pytest.raises(RouterError, match="family"):
        choose(strategy="family_strong", manifest=make_manifest(TEACHERS))
    blind = make_manifest([summary("a", 1.0, learnability=None), summary("b", 0.5, learnability=None)])
    with pytest.raises(RouterError, match="learnability"):
        choose((0, 0), manifest=blind, strategy="car")
    odd = make_manifest([summary("a", 1.0, learnability=2.0), summary("b", 0.5)])
    with pytest.raises(RouterError, match="at most 0"):
        choose((0, 0), manifest=odd, strategy="car")
    ratio = replace(make_manifest([summary("a", 1.0), summary("b", 0.5)]), learnability="rank_surprisal")
    with pytest.raises(StrategyError, match=r"log-probabilities.*rank_surprisal"):
        choose((0, 0), manifest=ratio, strategy="car")
    local = replace(ratio, learnability="local_logprob")
    assert choose((0, 0), manifest=local, strategy="car").teacher == "a"
    with pytest.raises(RouterError, match=r"alpha = 0\.4"):
        choose(alpha=0.5)
    assert choose(alpha=0.4).teacher == "bison"


def test_teachers_and_exclude_narrow_the_choice() -> None:
    """All mappings are over the allowed teachers, and unknown names are named with the known ones."""
    decision = choose(teachers=("alpaca", "camel", "dingo"), exclude=("alpaca",))
    assert decision.teacher == "dingo"
    assert (
        set(decision.distribution) == set(decision.strengths) == set(decision.quality) == {"camel", "dingo"}
    )
    for options in ({"teachers": ("zebra",)}, {"exclude": ("zebra",)}):
        with pytest.raises(UnknownTeacherError, match=r"'zebra'.*alpaca"):
            choose(**options)
    for options in ({"teachers": ()}, {"teachers": ("camel",), "exclude": ("camel",)}):
        with pytest.raises(RouterError, match="no teacher"):
            choose(**options)


@pytest.mark.parametrize("strategy", get_args(Strategy))
@given(STRENGTHS)
def test_the_distribution_is_the_softmax_whatever_the_strategy(
    strategy: Strategy, strengths: np.ndarray
) -> None:
    """Temperature 1, over the allowed teachers, summing to 1."""
    decision = choose(strengths, strategy=strategy, temperature=0.3, exclude=("dingo",))
    assert math.isclose(sum(decision.distribution.values()), 1.0, abs_tol=1e-12)
    weights = np.exp(strengths[0, :3])
    np.testing.assert_allclose(list(decision.distribution.values()), weights / weights.sum(), rtol=1e-9)


@given(STRENGTHS, st.integers(-100, 100), st.sampled_from([0.0, 0.5, 2.0]))
def test_a_shift_of_the_strengths_changes_no_decision(
    strengths: np.ndarray, shift: int, temperature: float
) -> None:
    """Only differences count: teacher, propensity, margin and doubt stay."""
    first, second = (choose(values, temperature=temperature) for values in (strengths, strengths + shift))
    assert (first.teacher, first.uncertain, first.margin) == (second.teacher, second.uncertain, second.margin)
    assert math.isclose(first.propensity, second.propensity, abs_tol=1e-12)


@given(STRENGTHS, st.permutations(range(4)), st.sampled_from(get_args(Strategy)))
def test_the_order_of_teachers_changes_no_decision(
    strengths: np.ndarray, order: list[int], strategy: Strategy
) -> None:
    """A checkpoint with permuted columns chooses the same teacher, drawn ones included."""
    moved = make_manifest([TEACHERS[column] for column in order], family="qwen")
    first = choose(strengths, strategy=strategy)
    second = choose(strengths[:, order], manifest=moved, strategy=strategy)
    assert first.teacher == second.teacher
    assert math.isclose(first.margin, second.margin, abs_tol=1e-12)
    np.testing.assert_allclose(second.propensity, first.propensity)


def shares(n_prompts: int = 4000, **options: Any) -> dict[str, float]:
    drawn = [choose(prompt_id=f"p{n}", **options).teacher for n in range(n_prompts)]
    return {name: drawn.count(name) / n_prompts for name in sorted(set(drawn))}


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sampling_follows_the_sharpened_distribution(temperature: float) -> None:
    """Frequencies over prompts are softmax(strengths / T), and the propensity says the same."""
    weights = np.exp(np.array([0.1, 0.2, -0.5, 0.0]) / temperature)
    expected = dict(zip(("alpaca", "bison", "camel", "dingo"), weights / weights.sum(), strict=True))
    found = shares(temperature=temperature)
    for name, chance in expected.items():
        assert abs(found.get(name, 0.0) - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)
    decision = choose(temperature=temperature)
    assert math.isclose(decision.propensity, expected[decision.teacher], rel_tol=1e-9)


def test_mix_is_one_strong_to_four_others() -> None:
    """The strongest by quality gets one prompt in five, the others share the rest alike."""
    found = shares(strategy="mix")
    assert abs(found["alpaca"] - 0.2) < 0.03
    assert all(abs(found[name] - 0.8 / 3) < 0.03 for name in ("bison", "camel", "dingo"))
    decision = choose(strategy="mix")
    assert math.isclose(decision.propensity, 0.2 if decision.teacher == "alpaca" else 0.8 / 3)
    assert choose(strategy="mix", teachers=("camel",)).propensity == 1.0


def test_random_is_uniform() -> None:
    """Every teacher gets its share, with its propensity."""
    found = shares(strategy="random")
    assert all(abs(share - 0.25) < 0.03 for share in found.values())
    assert choose(strategy="random").propensity == 0.25


def test_draws_depend_on_seed_and_prompt_alone() -> None:
    """The same seed and prompt give the same teacher always; another seed gives other draws."""
    first, again, other = (
        [choose(prompt_id=f"p{n}", strategy="random", seed=seed).teacher for n in range(50)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert choose(prompt_id="\ud800", strategy="random").teacher in {teacher.id for teacher in TEACHERS}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_a_tiny_temperature_is_the_argmax(temperature: float) -> None:
    """No overflow on the way to zero."""
    decision = choose(temperature=temperature)
    assert (decision.teacher, decision.propensity) == ("bison", 1.0)


def test_cost_moves_the_choice_and_not_the_report() -> None:
    """Strength less cost_weight times cost decides; distribution and strengths stay those of the router."""
    free, dear = choose(), choose(cost_weight=10.0, expected_cost_usd={"bison": 0.05, "alpaca": 0.001})
    assert (free.teacher, dear.teacher) == ("bison", "alpaca")
    assert free.distribution == dear.distribution
    assert free.strengths == dear.strengths


def test_margin_and_doubt() -> None:
    """Uncertain if the best beats the second less than 55 times in 100; never with one teacher."""
    edge = math.log(0.55 / 0.45)
    close, clear = choose((0, edge - 0.01, -9, -9)), choose((0, edge + 0.01, -9, -9))
    assert (close.uncertain, clear.uncertain) == (True, False)
    assert math.isclose(clear.margin, edge + 0.01)
    alone = choose(teachers=("camel",))
    assert (alone.margin, alone.uncertain, alone.distribution) == (0.0, False, {"camel": 1.0})


def test_unknown_learnability_is_an_empty_mapping() -> None:
    """NaN never reaches JSON."""
    decision = choose()
    assert decision.learnability == {}
    assert decision.input_tokens == 7

"""Choosing a teacher: seven strategies, their options, their invariants, and their odds."""

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clients.errors import UnknownTeacherError
from clients.types import Price, RoutingDecision, Strategy
from router_model.errors import RouterError, StrategyError
from router_model.model import TeacherSummary
from router_model.strategies import RouteOptions
from tests.unit.planted import decided, planted_manifest, planted_output


def summary(
    name: str,
    quality: float,
    learnability: float | None = -1.0,
    *,
    family: str | None = None,
    n_tokens: float | None = None,
) -> TeacherSummary:
    """One teacher's means; its mean reward is that of the planted manifest."""
    return TeacherSummary(
        name, family, None, quality, learnability, math.nan, quality, learnability, n_tokens
    )


TEACHERS = (
    summary("alpaca", 0.9, -3.0, family="llama", n_tokens=1000),
    summary("bison", 0.6, -0.5, family="qwen", n_tokens=500),
    summary("camel", 0.7, -1.0, family="qwen", n_tokens=100),
    summary("dingo", 0.2, -0.4, n_tokens=100),
)
MANIFEST = planted_manifest(TEACHERS, family="qwen")
# An answer costs 1.00, 0.20, 0.10 and 0.00 dollars.
PRICES = {
    "alpaca": Price(0.0, 1000.0),
    "bison": Price(0.0, 400.0),
    "camel": Price(0.0, 1000.0),
    "dingo": Price(),
}
STRENGTHS = arrays(np.float64, (1, 4), elements=st.integers(-40, 40).map(lambda n: n / 8), unique=True)


def choose(
    strengths: Any = (0.1, 0.2, -0.5, 0.0),
    prompt_id: str = "p",
    manifest: Any = MANIFEST,
    **options: Any,
) -> RoutingDecision:
    output = planted_output(np.ravel(strengths).tolist())
    return decided(manifest, output, prompt_id, prices=PRICES, **options)


@pytest.mark.parametrize(
    ("strategy", "options", "expected"),
    [
        # Strengths 0.1, 0.2, -0.5, 0; less twice the cost: -1.9, -0.2, -0.7, 0.
        ("persyn", {}, "bison"),
        ("persyn", {"exclude": ["bison"]}, "alpaca"),
        ("persyn", {"teachers": ["camel", "dingo"]}, "dingo"),
        ("persyn", {"cost_weight": 2.0}, "dingo"),
        ("persyn", {"cost_weight": 2.0, "exclude": ["dingo"]}, "bison"),
        ("persyn", {"cost_weight": 2.0, "teachers": ["alpaca", "camel"]}, "camel"),
        # Qualities 0.9, 0.6, 0.7, 0.2; less the cost: -0.1, 0.4, 0.6, 0.2.
        ("strong", {}, "alpaca"),
        ("strong", {"exclude": ["alpaca"]}, "camel"),
        ("strong", {"teachers": ["bison", "dingo"]}, "bison"),
        ("strong", {"cost_weight": 1.0}, "camel"),
        ("strong", {"cost_weight": 1.0, "exclude": ["camel"]}, "bison"),
        ("strong", {"cost_weight": 1.0, "teachers": ["alpaca", "dingo"]}, "dingo"),
        # Within the family alone, bison and camel, however dear they are.
        ("family_strong", {}, "camel"),
        ("family_strong", {"exclude": ["camel"]}, "bison"),
        ("family_strong", {"teachers": ["alpaca", "bison"]}, "bison"),
        ("family_strong", {"cost_weight": 1.0}, "camel"),
        ("family_strong", {"cost_weight": 100.0, "teachers": ["bison", "dingo"]}, "bison"),
        # Quality over 1 + loss: 0.225, 0.4, 0.35, 0.143; less the cost: -0.775, 0.2, 0.25, 0.143.
        ("car", {}, "bison"),
        ("car", {"exclude": ["bison"]}, "camel"),
        ("car", {"teachers": ["alpaca", "dingo"]}, "alpaca"),
        ("car", {"cost_weight": 1.0}, "camel"),
        ("car", {"cost_weight": 1.0, "exclude": ["camel"]}, "bison"),
        ("car", {"cost_weight": 1.0, "teachers": ["alpaca", "dingo"]}, "dingo"),
        # Rewards -0.66, 0.16, 0.02, -0.04; less twice the cost: -2.66, -0.24, -0.18, -0.04.
        ("best_single", {}, "bison"),
        ("best_single", {"exclude": ["bison"]}, "camel"),
        ("best_single", {"teachers": ["alpaca", "dingo"]}, "dingo"),
        ("best_single", {"cost_weight": 2.0}, "dingo"),
        ("best_single", {"cost_weight": 2.0, "exclude": ["dingo"]}, "camel"),
        ("best_single", {"cost_weight": 2.0, "teachers": ["alpaca", "bison"]}, "bison"),
        # Only what is left can be drawn.
        ("mix", {"teachers": ["camel"]}, "camel"),
        ("mix", {"teachers": ["camel", "dingo"], "exclude": ["dingo"]}, "camel"),
        ("random", {"exclude": ["alpaca", "bison", "dingo"]}, "camel"),
        ("random", {"teachers": ["dingo"]}, "dingo"),
    ],
)
def test_each_strategy_takes_its_own_best_of_what_is_allowed(
    strategy: str, options: dict[str, Any], expected: str
) -> None:
    """By strength, quality, quality within the family, quality over loss, or mean reward; less cost."""
    decision = choose(strategy=strategy, **options)
    assert decision.teacher == expected
    assert decision.propensity == 1.0


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, "alpaca"), (0.4, "bison"), (1.0, "dingo")])
def test_the_best_single_teacher_is_that_of_the_alpha_asked_for(alpha: float, expected: str) -> None:
    """Quality alone, the mix, and learnability alone each have another best teacher."""
    output = planted_output({alpha: (0, 0, 0, 0)})
    assert decided(MANIFEST, output, strategy="best_single", alpha=alpha).teacher == expected


@pytest.mark.parametrize(
    ("options", "field"),
    [
        *(({"strategy": name, "temperature": 0.1}, "temperature") for name in get_args(Strategy)[1:]),
        ({"strategy": "mix", "cost_weight": 0.1}, "cost_weight"),
        ({"strategy": "random", "cost_weight": 0.1}, "cost_weight"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"temperature": -1.0}, "temperature"),
        ({"cost_weight": math.inf}, "cost_weight"),
        ({"mix_strong_share": 1.5}, "mix_strong_share"),
        ({"car_beta": -1.0}, "car_beta"),
        ({"car_beta": math.nan}, "car_beta"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_options_without_meaning_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    """Nothing is ignored without a word: the message and the details name the option."""
    with pytest.raises(StrategyError, match=field) as refused:
        RouteOptions(**options)
    assert refused.value.details == {"field": field}


def test_car_is_the_published_formula() -> None:
    """r / (1 + beta L): beta 0 ignores the loss, a large beta lets it rule."""
    assert choose(strategy="car", car_beta=0.0).teacher == "alpaca"
    assert (
        choose(strategy="car", car_beta=1.0).teacher == "bison"
    )  # 0.6 / 1.5 > 0.7 / 2 > 0.9 / 4 > 0.2 / 1.4
    assert choose(strategy="car", car_beta=1.0, exclude=("bison",)).teacher == "camel"
    assert choose(strategy="car", car_beta=100.0).teacher == "bison"  # 0.6 / 51, 0.2 / 41, 0.7 / 101


def test_car_with_negative_quality_does_not_reward_loss() -> None:
    """Of two teachers with one negative quality the one with the smaller loss wins."""
    teachers = [
        summary("a", -2.0, -3.0),
        summary("b", -2.0, -1.0),
        summary("c", -5.0),
    ]
    assert choose((0, 0, 0), manifest=planted_manifest(teachers), strategy="car").teacher == "b"


def test_what_a_strategy_lacks_is_an_error_and_no_silent_change() -> None:
    """family_strong without kin, car without learnability or with impossible values."""
    with pytest.raises(RouterError, match="family"):
        choose(strategy="family_strong", exclude=("bison", "camel"))
    with pytest.raises(RouterError, match="family"):
        choose(strategy="family_strong", manifest=planted_manifest(TEACHERS))
    blind = planted_manifest([summary("a", 1.0, None), summary("b", 0.5, None)])
    with pytest.raises(RouterError, match="learnability"):
        choose((0, 0), manifest=blind, strategy="car")
    odd = planted_manifest([summary("a", 1.0, 2.0), summary("b", 0.5)])
    with pytest.raises(RouterError, match="at most 0"):
        choose((0, 0), manifest=odd, strategy="car")
    ratio = planted_manifest([summary("a", 1.0), summary("b", 0.5)], learnability="rank_surprisal")
    with pytest.raises(StrategyError, match=r"log-probabilities.*rank_surprisal"):
        choose((0, 0), manifest=ratio, strategy="car")
    local = planted_manifest(ratio.teachers, learnability="local_logprob")
    assert choose((0, 0), manifest=local, strategy="car").teacher == "a"


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
    decision = choose(strengths, strategy=strategy, exclude=("dingo",))
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
    moved = planted_manifest([TEACHERS[column] for column in order], family="qwen")
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


@pytest.mark.parametrize(("share", "others"), [(0.0, 1 / 3), (0.5, 0.5 / 3), (1.0, 0.0)])
def test_the_share_of_the_strong_teacher_can_be_set(share: float, others: float) -> None:
    """The strongest allowed teacher gets that share; without alpaca it is camel."""
    found = shares(strategy="mix", mix_strong_share=share)
    assert abs(found.get("alpaca", 0.0) - share) < 0.03
    assert all(abs(found.get(name, 0.0) - others) < 0.03 for name in ("bison", "camel", "dingo"))
    found = shares(strategy="mix", mix_strong_share=share, exclude=("alpaca",), n_prompts=1000)
    assert abs(found.get("camel", 0.0) - share) < 0.06


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

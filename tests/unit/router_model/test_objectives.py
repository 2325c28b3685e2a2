"""Every training objective against plain loops in float64, and the traps that tell them apart."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from router_model.errors import RouterError
from router_model.objectives import OBJECTIVES, objective

NAMES = sorted(OBJECTIVES)
NEED_TEMPERATURE = ["listwise", "regret", "soft_bt"]
STRENGTHS = arrays(np.float64, (3, 4), elements=st.floats(-20, 20))
REWARDS = arrays(np.float64, (3, 4), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
MASKS = arrays(np.bool_, (3, 4))
TEMPERATURES = st.sampled_from([0.1, 0.5, 1.0, 3.0])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much where the cores are shared."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


Row = Sequence[float]
"""The present cells of one prompt."""


def softmax(values: Row) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def cross_entropy_of_pairs(s: Row, r: Row, target: Callable[[float], float]) -> float:
    losses = []
    for a in range(len(s)):
        for b in range(a + 1, len(s)):
            t, d = target(r[a] - r[b]), s[a] - s[b]
            losses.append(t * math.log1p(math.exp(-d)) + (1 - t) * math.log1p(math.exp(d)))
    return sum(losses) / len(losses)


def one_bt(s: Row, r: Row, _: float) -> float:
    return cross_entropy_of_pairs(s, r, lambda margin: 0.5 + 0.5 * float(np.sign(margin)))


def one_paper_bt(s: Row, r: Row, _: float) -> float:
    return cross_entropy_of_pairs(s, r, lambda margin: 1.0 if margin > 0 else 0.0)


def one_soft_bt(s: Row, r: Row, temperature: float) -> float:
    return cross_entropy_of_pairs(s, r, lambda margin: 1 / (1 + math.exp(-margin / temperature)))


def one_regression(s: Row, r: Row, _: float) -> float:
    mean_s, mean_r = sum(s) / len(s), sum(r) / len(r)
    errors = [(a - mean_s) - (b - mean_r) for a, b in zip(s, r, strict=True)]
    return sum(error**2 for error in errors) / len(errors)


def one_listwise(s: Row, r: Row, temperature: float) -> float:
    target, share = softmax([value / temperature for value in r]), softmax(s)
    return sum(p * math.log(p / q) for p, q in zip(target, share, strict=True))


def one_plackett_luce(s: Row, r: Row, _: float) -> float:
    """Efron's likelihood group by group, with his subtraction."""
    loss = 0.0
    for value in set(r):
        equals = [math.exp(s[m]) for m in range(len(s)) if r[m] == value]
        at_risk = sum(math.exp(s[m]) for m in range(len(s)) if r[m] <= value)
        for number, power in enumerate(equals):
            loss += math.log(at_risk - number / len(equals) * sum(equals)) - math.log(power)
    return loss / (len(s) - 1)


def one_regret(s: Row, r: Row, temperature: float) -> float:
    share = softmax([value / temperature for value in s])
    return sum(p * (max(r) - value) for p, value in zip(share, r, strict=True))


ONE_PROMPT = {
    "bt": one_bt,
    "paper_bt": one_paper_bt,
    "soft_bt": one_soft_bt,
    "regression": one_regression,
    "listwise": one_listwise,
    "plackett_luce": one_plackett_luce,
    "regret": one_regret,
}


def reference(
    name: str, strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray, temperature: float
) -> float:
    """The mean over the prompts with two present teachers or more."""
    losses = [
        ONE_PROMPT[name](s[present].tolist(), r[present].tolist(), temperature)
        for s, r, present in zip(strengths, rewards, mask, strict=True)
        if present.sum() >= 2
    ]
    return sum(losses) / len(losses) if losses else 0.0


def loss(
    name: str, strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray, temperature: float
) -> float:
    arguments = (torch.from_numpy(array.copy()) for array in (strengths, rewards, mask))
    return float(objective(name)(*arguments, temperature))


def gradient(name: str, strengths: Tensor, rewards: Tensor, mask: Tensor, temperature: float) -> Tensor:
    leaf = strengths.detach().clone().requires_grad_()
    torch.autograd.backward(objective(name)(leaf, rewards, mask, temperature))
    assert leaf.grad is not None
    return leaf.grad


def random_table(seed: int, n_prompts: int = 6, n_teachers: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Strengths, rewards with ties, and a mask with prompts of no, one and two present teachers."""
    rng = np.random.default_rng(seed)
    strengths = rng.normal(scale=2.0, size=(n_prompts, n_teachers))
    rewards = rng.integers(0, 4, size=(n_prompts, n_teachers)) / 3
    mask = rng.random((n_prompts, n_teachers)) < 0.7
    for row in range(3):
        mask[row] = np.arange(n_teachers) < row
    return torch.from_numpy(strengths), torch.from_numpy(rewards), torch.from_numpy(mask)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(strengths=STRENGTHS, rewards=REWARDS, mask=MASKS, temperature=TEMPERATURES)
def test_the_loss_is_the_plain_loop(
    name: str, strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray, temperature: float
) -> None:
    """Ties, missing cells, and prompts with nothing to compare included."""
    found = loss(name, strengths, rewards, mask, temperature)
    expected = reference(name, strengths, rewards, mask, temperature)
    assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences(name: str, seed: int) -> None:
    """In float64, ties and missing cells included."""
    strengths, rewards, mask = random_table(seed)
    assert torch.autograd.gradcheck(
        lambda leaf: objective(name)(leaf, rewards, mask, 0.5), (strengths.requires_grad_(),)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_cells_have_no_say_even_as_nan(name: str, dtype: torch.dtype) -> None:
    """NaN in masked cells changes neither the loss nor the gradient, and gets none; the type is kept."""
    strengths, rewards, mask = random_table(0)
    strengths = strengths.to(dtype)
    poisoned_strengths = torch.where(mask, strengths, math.nan)
    poisoned_rewards = torch.where(mask, rewards, math.nan)
    found = objective(name)(poisoned_strengths, poisoned_rewards, mask, 0.5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, objective(name)(strengths, rewards, mask, 0.5), rtol=0, atol=0)
    found_gradient = gradient(name, poisoned_strengths, poisoned_rewards, mask, 0.5)
    torch.testing.assert_close(found_gradient, gradient(name, strengths, rewards, mask, 0.5))
    assert found_gradient[~mask].abs().sum() == 0
    assert found_gradient[:2].abs().sum() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 1)])
def test_nothing_to_compare_is_a_loss_of_zero(name: str, shape: tuple[int, int]) -> None:
    """No prompt, or none with two present teachers: zero, with a gradient of zero."""
    strengths = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    found = objective(name)(strengths, torch.rand(shape), torch.zeros(shape, dtype=torch.bool), 1.0)
    torch.autograd.backward(found)
    assert float(found.detach()) == 0
    assert strengths.grad is not None
    assert strengths.grad.abs().sum() == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "paper_bt"])
@settings(max_examples=40)
@given(strengths=STRENGTHS, rewards=REWARDS, mask=MASKS, order=st.permutations(range(4)))
def test_the_order_of_teachers_does_not_matter(
    name: str, strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray, order: list[int]
) -> None:
    """Ties included."""
    permuted = loss(name, strengths[:, order], rewards[:, order], mask[:, order], 0.5)
    assert math.isclose(loss(name, strengths, rewards, mask, 0.5), permuted, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(
    strengths=STRENGTHS,
    rewards=REWARDS,
    mask=MASKS,
    shifts=st.tuples(
        arrays(np.float64, (3, 1), elements=st.floats(-50, 50)),
        arrays(np.float64, (3, 1), elements=st.sampled_from([-8.0, -0.5, 0.0, 4.0])),
    ),
)
def test_a_shift_of_a_prompt_changes_nothing(
    name: str,
    strengths: np.ndarray,
    rewards: np.ndarray,
    mask: np.ndarray,
    shifts: tuple[np.ndarray, np.ndarray],
) -> None:
    """Of its strengths, whose gauge is free, and of its rewards, whose level no choice can change."""
    found = loss(name, strengths + shifts[0], rewards + shifts[1], mask, 0.5)
    assert math.isclose(loss(name, strengths, rewards, mask, 0.5), found, rel_tol=1e-10, abs_tol=1e-10)


def test_a_prompt_counts_once_however_many_teachers_answered_it() -> None:
    """The mean of two prompts alone is the loss of both together."""
    strengths, rewards, mask = random_table(4)
    mask[3], mask[4] = True, torch.tensor([True, False, True, False, False])
    for name in NAMES:
        full, sparse, both = (
            float(objective(name)(strengths[rows], rewards[rows], mask[rows], 0.5))
            for rows in ([3], [4], [3, 4])
        )
        assert math.isclose((full + sparse) / 2, both, rel_tol=1e-12)


def test_a_cold_soft_bt_is_bt() -> None:
    """Its targets become 0, 1, and 1/2 for a tie."""
    strengths, rewards, mask = random_table(1)
    distinct = rewards + torch.linspace(0, 0.1, rewards.shape[1], dtype=torch.float64)
    for table in (distinct, rewards):
        torch.testing.assert_close(
            objective("soft_bt")(strengths, table, mask, 1e-6),
            objective("bt")(strengths, table, mask, 1.0),
            rtol=1e-12,
            atol=0,
        )


def test_a_hot_soft_bt_pulls_where_regression_pulls() -> None:
    """From equal strengths, the gradient of each prompt has the direction of regression's."""
    strengths, rewards, mask = random_table(2)
    hot, squared = (
        gradient(name, torch.zeros_like(strengths), rewards, mask, 1e4) for name in ("soft_bt", "regression")
    )
    compared = squared.abs().sum(dim=1) > 0
    assert compared.sum() >= 2
    cosine = torch.cosine_similarity(hot[compared], squared[compared], dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)


def minimiser(name: str, rewards: Tensor, temperature: float = 1.0) -> Tensor:
    """The strengths, one per teacher for all prompts, that gradient descent comes to."""
    strengths = torch.zeros(1, rewards.shape[1], dtype=torch.float64)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    for _ in range(150):
        leaf = strengths.clone().requires_grad_()
        torch.autograd.backward(objective(name)(leaf.expand(rewards.shape), rewards, mask, temperature))
        assert leaf.grad is not None
        strengths = strengths - leaf.grad
    return strengths[0]


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("bt", 0),
        ("paper_bt", 0),
        ("plackett_luce", 0),
        ("listwise", 1),
        ("regression", 1),
        ("regret", 1),
        ("soft_bt", 1),
    ],
)
def test_who_wins_more_often_is_not_who_is_better(name: str, chosen: int) -> None:
    """A always earns 0.6; B earns 0.5 six times in ten and else 1.0: better by 0.1, and beaten by A."""
    rewards = torch.tensor([[0.6, 0.5]] * 6 + [[0.6, 1.0]] * 4, dtype=torch.float64)
    assert int(minimiser(name, rewards).argmax()) == chosen
    means = rewards.mean(dim=0)
    assert math.isclose(float(means.max() - means[chosen]), 0.0 if chosen else 0.1, abs_tol=1e-12)


@pytest.mark.parametrize(("name", "scale"), [("regression", 1.0), ("soft_bt", 2.0), ("listwise", 2.0)])
def test_the_optimum_of_one_prompt_is_its_rewards(name: str, scale: float) -> None:
    """Centred: the rewards themselves, or rewards over the temperature."""
    rewards = torch.tensor([[0.0, 0.3, 1.0]], dtype=torch.float64)
    found = minimiser(name, rewards, temperature=0.5)
    torch.testing.assert_close(found, (scale * (rewards - rewards.mean()))[0], rtol=0, atol=1e-4)


def test_ties_coded_as_losses_favour_the_last_column() -> None:
    """With nothing but ties, the paper's labels rank the teachers by column, and ties of 1/2 do not."""
    ties = torch.full((3, 4), 0.5, dtype=torch.float64)
    assert (minimiser("paper_bt", ties).diff() > 0.1).all()
    for name in ("bt", "soft_bt", "plackett_luce"):
        assert minimiser(name, ties).abs().max() < 1e-12
    strengths, mask = random_table(0)[0][3:], torch.ones(3, 5, dtype=torch.bool)
    ties = torch.ones_like(strengths)
    mirrored = objective("paper_bt")(strengths.flip(1), ties, mask, 1.0)
    assert abs(float(mirrored - objective("paper_bt")(strengths, ties, mask, 1.0))) > 0.1


def test_equal_teachers_are_ranked_no_worse_than_by_their_mean_order() -> None:
    """Efron's handling of ties bounds the mean over all orders of the equals, and is exact without ties."""
    strengths = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    mask = torch.ones_like(strengths, dtype=torch.bool)

    def ranked(rewards: list[float]) -> float:
        return float(objective("plackett_luce")(strengths, torch.tensor([rewards]), mask, 1.0))

    mean_of_orders = (ranked([1.0, 0.5, 0.0]) + ranked([0.5, 1.0, 0.0])) / 2
    assert mean_of_orders <= ranked([1.0, 1.0, 0.0]) <= mean_of_orders + 0.5


def test_extreme_values_do_not_overflow() -> None:
    """A certain and wrong router, and a temperature near 0: finite losses and gradients."""
    strengths = torch.tensor([[1e4, -1e4, 0.0]])
    rewards = torch.tensor([[0.0, 1.0, 1e30]])
    mask = torch.tensor([[True, True, False]])
    for name in NAMES:
        assert math.isfinite(float(objective(name)(strengths, rewards, mask, 1e-30)))
        assert torch.isfinite(gradient(name, strengths, rewards, mask, 1e-3)).all()


@pytest.mark.parametrize("name", NEED_TEMPERATURE)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(name: str, temperature: float) -> None:
    """Said, and not divided by."""
    with pytest.raises(RouterError, match="temperature"):
        objective(name)(*random_table(0), temperature)


def test_an_unknown_objective_is_refused_by_name() -> None:
    """The message lists those there are."""
    with pytest.raises(RouterError, match=r"'hinge'.*'soft_bt'"):
        objective("hinge")

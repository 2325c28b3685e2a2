"""The Bradley-Terry mathematics against a plain double loop."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from router_model.bradley_terry import centre, pairwise_loss, win_probability

STRENGTHS = arrays(np.float64, (3, 4), elements=st.floats(-20, 20))
REWARDS = arrays(np.float64, (3, 4), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
MASKS = arrays(np.bool_, (3, 4))


def reference(strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray) -> float:
    """The definition: a double loop over the pairs of each prompt."""
    per_prompt = []
    for row in range(len(strengths)):
        losses = []
        for a in range(strengths.shape[1]):
            for b in range(a + 1, strengths.shape[1]):
                if not (mask[row, a] and mask[row, b]):
                    continue
                target = 0.5 + 0.5 * float(np.sign(rewards[row, a] - rewards[row, b]))
                difference = strengths[row, a] - strengths[row, b]
                losses.append(
                    target * math.log1p(math.exp(-difference))
                    + (1 - target) * math.log1p(math.exp(difference))
                )
        if losses:
            per_prompt.append(sum(losses) / len(losses))
    return sum(per_prompt) / len(per_prompt) if per_prompt else 0.0


def loss(strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray) -> float:
    return float(pairwise_loss(*(torch.from_numpy(array.copy()) for array in (strengths, rewards, mask))))


@given(STRENGTHS, REWARDS, MASKS)
def test_the_loss_is_the_double_loop(strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray) -> None:
    """One pass over all pairs gives the mean over prompts of the mean over their pairs."""
    assert math.isclose(loss(strengths, rewards, mask), reference(strengths, rewards, mask), abs_tol=1e-12)


@given(STRENGTHS, REWARDS, MASKS, st.permutations(range(4)))
def test_the_order_of_teachers_does_not_matter(
    strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray, order: list[int]
) -> None:
    """Ties included: a tie coded as a loss would fail here."""
    permuted = loss(strengths[:, order], rewards[:, order], mask[:, order])
    assert math.isclose(loss(strengths, rewards, mask), permuted, abs_tol=1e-12)


@given(STRENGTHS, REWARDS, MASKS, arrays(np.float64, (3, 1), elements=st.floats(-50, 50)))
def test_a_shift_of_a_prompt_changes_nothing(
    strengths: np.ndarray, rewards: np.ndarray, mask: np.ndarray, shift: np.ndarray
) -> None:
    """The gauge is free: only differences of strengths count."""
    assert math.isclose(loss(strengths + shift, rewards, mask), loss(strengths, rewards, mask), abs_tol=1e-10)


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_the_probabilities_of_a_pair_sum_to_one(a: float, b: float) -> None:
    """P(A > B) + P(B > A) = 1, and equal strengths are a coin."""
    first, second = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert math.isclose(
        float(win_probability(first, second) + win_probability(second, first)), 1.0, abs_tol=1e-12
    )
    assert float(win_probability(first, first)) == 0.5


def test_a_tie_pulls_strengths_together() -> None:
    """The target of a tie is 1/2: no gradient at equal strengths, a pull back at unequal ones."""
    strengths = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(pairwise_loss(strengths, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)))
    assert strengths.grad is not None
    assert strengths.grad[0].abs().max() == 0
    assert strengths.grad[1, 0] > 0 > strengths.grad[1, 1]


def test_masked_cells_have_no_say_even_as_nan() -> None:
    """NaN in a masked cell leaves loss and gradients finite, and an empty prompt weighs nothing."""
    nan = math.nan
    strengths = torch.tensor([[1.0, 0.0, nan], [nan, nan, nan]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0, nan], [nan, nan, nan]], dtype=torch.float64)
    found = pairwise_loss(strengths, rewards, ~torch.isnan(rewards))
    torch.autograd.backward(found)
    assert math.isclose(float(found.detach()), math.log1p(math.exp(-1.0)), abs_tol=1e-12)
    assert strengths.grad is not None
    assert torch.isfinite(strengths.grad).all()
    assert strengths.grad[1].abs().sum() == 0


def test_no_pair_at_all_is_a_loss_of_zero() -> None:
    """Nothing to learn from: zero, with a gradient of zero."""
    strengths = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    found = pairwise_loss(strengths, torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    torch.autograd.backward(found)
    assert float(found.detach()) == 0
    assert strengths.grad is not None
    assert strengths.grad.abs().sum() == 0


def test_extreme_strengths_do_not_overflow() -> None:
    """A certain and wrong router has a large loss, not an infinite one."""
    found = pairwise_loss(
        torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    )
    assert float(found) == 2e4


def test_centred_strengths_sum_to_zero_over_the_present() -> None:
    """The gauge is fixed over present teachers; masked ones come back as NaN."""
    found = centre(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    np.testing.assert_array_equal(found.numpy(), [[-1.0, 1.0, np.nan]])

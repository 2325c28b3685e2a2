"""The Bradley-Terry mathematics, and nothing else.

A teacher's strength for a prompt is a logit: ``P(A > B) = sigmoid(s_A - s_B)``. The loss is equation (3) of
PerSyn (arXiv 2510.10925), which is the BT head of P2L (arXiv 2502.14855), over *all* unordered pairs of a
prompt's teachers at once: identical loss and gradient to one row per pair, for one forward pass per prompt in
place of M(M-1)/2. Only differences of strengths matter, so they are centred before they are shown or stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def win_probability(strength_a: Tensor, strength_b: Tensor) -> Tensor:
    """Probability that A's response earns the higher reward: ``sigmoid(s_A - s_B)``, elementwise."""
    return torch.sigmoid(strength_a - strength_b)


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """All unordered pairs of M teachers, P of them, and who won them: fixed while strengths are fitted."""

    incidence_MP: Tensor
    """+1 for a pair's first teacher, -1 for its second: ``strengths @ incidence`` is their difference."""
    wins_BM: Tensor
    """Weighted targets of each teacher's pairs, signed as its strength is: the linear part of the loss."""
    weight_BP: Tensor
    """Share of the pair in the loss; 0 where a teacher is missing. Sums to 1, or to 0 without any pair."""


def compare(rewards_BM: Tensor, mask_BM: Tensor) -> Pairs:
    """Compare all pairs of present teachers of each prompt.

    A tie is 1/2: coding it as a loss biases the router by the order of its columns. Each prompt counts once,
    shared evenly by its pairs, so that a prompt with missing teachers weighs as much as a full one.

    Args:
        rewards_BM: Rewards on any scale: only their order within the prompt counts.
        mask_BM: Which cells are present. A prompt with fewer than two has no pair and no weight.
    """
    n_teachers = rewards_BM.shape[1]
    first_P, second_P = torch.triu_indices(n_teachers, n_teachers, offset=1, device=rewards_BM.device)
    identity_MM = torch.eye(n_teachers, dtype=rewards_BM.dtype, device=rewards_BM.device)
    incidence_MP = identity_MM[:, first_P] - identity_MM[:, second_P]
    target_BP = (1 + torch.sign(rewards_BM[:, first_P] - rewards_BM[:, second_P])) / 2
    present_BP = mask_BM[:, first_P] & mask_BM[:, second_P]
    n_pairs_B1 = present_BP.sum(dim=1, keepdim=True)
    n_prompts = (n_pairs_B1 > 0).sum().clamp(min=1)
    weight_BP = present_BP.to(rewards_BM.dtype) / (n_pairs_B1.clamp(min=1) * n_prompts)
    # Masked rewards may be NaN, and NaN times a weight of zero is NaN.
    won_BP = torch.where(present_BP, target_BP * weight_BP, 0.0)
    return Pairs(incidence_MP, won_BP @ incidence_MP.T, weight_BP)


def loss_of_pairs(strengths_BM: Tensor, pairs: Pairs) -> Tensor:
    """Binary cross-entropy of finite strengths over pairs that were compared before: a scalar, in nats.

    With difference d and target t it is ``softplus(d) - t d``; the second term needs no pairs, which makes
    the fit twice as fast.
    """
    # Beyond 20 torch would round softplus to its argument, and float64 can tell them apart up to 37.
    curved_BP = functional.softplus(strengths_BM @ pairs.incidence_MP, threshold=40)
    return (curved_BP * pairs.weight_BP).sum() - (strengths_BM * pairs.wins_BM).sum()


def pairwise_loss(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """Binary cross-entropy over all unordered pairs of present teachers.

    The mean, over the prompts that have a pair, of the mean over their pairs; see ``compare`` for ties.

    Args:
        strengths_BM: Strengths; masked cells may hold anything, even NaN, and get no gradient.
        rewards_BM: Rewards on any scale; masked cells may hold anything.
        mask_BM: Which cells are present. A prompt with fewer than two contributes nothing.

    Returns:
        A scalar in nats, 0 (with zero gradient) if no prompt has a pair.
    """
    present_BM = torch.where(mask_BM, strengths_BM, strengths_BM.new_zeros(()))
    return loss_of_pairs(present_BM, compare(rewards_BM.to(strengths_BM.dtype), mask_BM))


def centre(strengths_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """Fix the gauge: each prompt's present strengths sum to 0. Masked cells come back as NaN."""
    n_B1 = mask_BM.sum(dim=1, keepdim=True).clamp(min=1)
    total_B1 = torch.where(mask_BM, strengths_BM, strengths_BM.new_zeros(())).sum(dim=1, keepdim=True)
    return torch.where(mask_BM, strengths_BM - total_B1 / n_B1, strengths_BM.new_full((), torch.nan))

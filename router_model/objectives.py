"""Training objectives: from one encoder pass per prompt to a scalar, with the rewards of all teachers known.

Each is a mean over the prompts that have at least two present teachers, so that every such prompt counts
once, however many teachers answered it; the others contribute nothing. Masked cells may hold anything, even
NaN, and get no gradient. All depend on strengths through their differences alone.

==================  =================  ===========================================================
name                unit               strengths at the optimum of a prompt with fixed rewards
==================  =================  ===========================================================
``bt``              nats per pair      diverge, in the order of the rewards
``paper_bt``        nats per pair      diverge; where rewards tie, in the order of the columns
``soft_bt``         nats per pair      rewards / temperature
``regression``      reward², per cell  rewards
``listwise``        nats per prompt    rewards / temperature
``plackett_luce``   nats per choice    diverge, in the order of the rewards
``regret``          reward             diverge, for the best teacher
==================  =================  ===========================================================

Where rewards are noisy, ``bt``, ``paper_bt`` and ``plackett_luce`` learn how often a teacher wins, and not
how high its reward is: the teacher they choose may be a worse one on average, with any number of prompts.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from router_model.bradley_terry import pairwise_loss
from router_model.errors import RouterError

Objective = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From strengths, rewards and mask, all B by M, and a temperature, to a scalar of the strengths' type.

Strengths are float32 or float64; rewards are brought to the same type. A temperature that an objective has no
use for is ignored; one that it uses must be above 0, or it raises a ``RouterError``.
"""


def objective(name: str) -> Objective:
    """Find an objective by its name.

    Raises:
        RouterError: There is no such objective; the message lists those there are.
    """
    try:
        return OBJECTIVES[name]
    except KeyError:
        raise RouterError(f"unknown objective {name!r}: expected one of {list(OBJECTIVES)}") from None


def bt(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, _temperature: float) -> Tensor:
    """All-pairs Bradley-Terry with ties of 1/2: ``bradley_terry.pairwise_loss``. Nats per pair."""
    return pairwise_loss(strengths_BM, rewards_BM, mask_BM)


def paper_bt(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, _temperature: float) -> Tensor:
    """Equation (3) of PerSyn (arXiv 2510.10925) with a tie coded as a loss of the pair's first teacher.

    That is what a label of ``r_a > r_b`` says. It makes the loss depend on the order of the columns, and is
    here to be compared with. Nats per pair.
    """
    return _pair_cross_entropy(strengths_BM, rewards_BM, mask_BM, lambda margin_BP: margin_BP > 0)


def soft_bt(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, temperature: float) -> Tensor:
    """All-pairs Bradley-Terry with targets ``sigmoid((r_a - r_b) / temperature)``. Nats per pair.

    A temperature towards 0 gives ``bt``; towards infinity, the gradient at equal strengths takes the
    direction of that of ``regression``.
    """
    _check(temperature)
    return _pair_cross_entropy(
        strengths_BM, rewards_BM, mask_BM, lambda margin_BP: torch.sigmoid(margin_BP / temperature)
    )


def regression(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, _temperature: float) -> Tensor:
    """Squared error of centred strengths against centred rewards. Reward², per present cell.

    Its minimiser is the mean reward of each teacher given the prompt, so its choice is the best one on
    average.
    """
    strengths_BM, rewards_BM, mask_BM = _comparable(strengths_BM, rewards_BM, mask_BM)
    n_B1 = mask_BM.sum(dim=1, keepdim=True)
    # Masked cells are 0 in both: they add nothing to the mean of the present ones.
    error_BM = strengths_BM - rewards_BM
    centred_BM = torch.where(mask_BM, error_BM - error_BM.sum(dim=1, keepdim=True) / n_B1, 0.0)
    return _mean((centred_BM**2).sum(dim=1) / n_B1[:, 0])


def listwise(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(r / temperature) || softmax(s))``, the distillation of Zooter (arXiv 2311.08692).

    Nats per prompt; 0 when the two agree.
    """
    _check(temperature)
    strengths_BM, rewards_BM, mask_BM = _comparable(strengths_BM, rewards_BM, mask_BM)
    # Shifted before it is divided: a small temperature would overflow the quotient.
    highest_B1 = _masked_logits(rewards_BM, mask_BM).amax(dim=1, keepdim=True)
    target_BM = _masked_logits((rewards_BM - highest_B1) / temperature, mask_BM).softmax(dim=1)
    log_share_BM = _masked_logits(strengths_BM, mask_BM).log_softmax(dim=1)
    log_share_BM = torch.where(mask_BM, log_share_BM, 0.0)
    return _mean(functional.kl_div(log_share_BM, target_BM, reduction="none").sum(dim=1))


def plackett_luce(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, _temperature: float) -> Tensor:
    """Negative log-likelihood of the ranking by reward: teachers are chosen one by one, the best first.

    Ties are handled as Efron (1977) does in survival analysis: in the choice number ``l`` (from 0) out of
    ``d`` equals, each of them is still there with weight ``1 - l/d``. This is an upper bound of the mean over
    all orders of the equals, and does not depend on the order of the columns. Nats per choice, of which a
    prompt with n present teachers has n - 1.
    """
    strengths_BM, rewards_BM, mask_BM = _comparable(strengths_BM, rewards_BM, mask_BM)
    both_BMM = mask_BM[:, :, None] & mask_BM[:, None, :]
    behind_BMM = both_BMM & (rewards_BM[:, :, None] > rewards_BM[:, None, :])
    equal_BMM = both_BMM & (rewards_BM[:, :, None] == rewards_BM[:, None, :])
    # Which of the equals is called the first does not matter: the sum over them is the same.
    equals_BMM = equal_BMM.to(strengths_BM.dtype)
    n_before_BM1 = equals_BMM.tril(diagonal=-1).sum(dim=2, keepdim=True)
    remaining_BM1 = 1 - n_before_BM1 / equals_BMM.sum(dim=2, keepdim=True).clamp(min=1)
    weight_BMM = behind_BMM + equals_BMM * remaining_BM1
    # A masked row must hold one finite number, or its unused gradient is NaN.
    weight_BMM = torch.where(mask_BM[:, :, None], weight_BMM, 1.0)
    rivals_BM = torch.logsumexp(strengths_BM[:, None, :] + weight_BMM.log(), dim=2)
    loss_BM = torch.where(mask_BM, rivals_BM - strengths_BM, 0.0)
    return _mean(loss_BM.sum(dim=1) / (mask_BM.sum(dim=1) - 1))


def regret(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, temperature: float) -> Tensor:
    """Expected regret of a teacher drawn by ``softmax(s / temperature)``: ``sum_m p_m (max r - r_m)``.

    In units of the reward. The direct policy loss, cf. arXiv 2505.16037; it is not convex.
    """
    _check(temperature)
    strengths_BM, rewards_BM, mask_BM = _comparable(strengths_BM, rewards_BM, mask_BM)
    leader_B1 = _masked_logits(strengths_BM.detach(), mask_BM).amax(dim=1, keepdim=True)
    share_BM = _masked_logits((strengths_BM - leader_B1) / temperature, mask_BM).softmax(dim=1)
    highest_B1 = _masked_logits(rewards_BM, mask_BM).amax(dim=1, keepdim=True)
    return _mean((share_BM * (highest_B1 - rewards_BM)).sum(dim=1))


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "bt": bt,
        "paper_bt": paper_bt,
        "soft_bt": soft_bt,
        "regression": regression,
        "listwise": listwise,
        "plackett_luce": plackett_luce,
        "regret": regret,
    }
)


def _check(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise RouterError(f"temperature is {temperature}: expected a finite number above 0")


def _comparable(strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts with at least two present teachers; 0 in masked cells, where NaN times 0 would be NaN."""
    rows = mask_BM.sum(dim=1) >= 2
    mask_BM = mask_BM[rows]
    rewards_BM = rewards_BM[rows].to(strengths_BM.dtype)
    return torch.where(mask_BM, strengths_BM[rows], 0.0), torch.where(mask_BM, rewards_BM, 0.0), mask_BM


def _mean(loss_B: Tensor) -> Tensor:
    """Mean over the prompts, 0 with a gradient of 0 where there are none."""
    return loss_B.sum() / max(len(loss_B), 1)


def _masked_logits(logits_BM: Tensor, mask_BM: Tensor) -> Tensor:
    return logits_BM.masked_fill(~mask_BM, -math.inf)


def _pair_cross_entropy(
    strengths_BM: Tensor, rewards_BM: Tensor, mask_BM: Tensor, target: Callable[[Tensor], Tensor]
) -> Tensor:
    """Binary cross-entropy over all pairs, whose targets are a function of the margin of their rewards."""
    strengths_BM, rewards_BM, mask_BM = _comparable(strengths_BM, rewards_BM, mask_BM)
    n_teachers = strengths_BM.shape[1]
    first_P, second_P = torch.triu_indices(n_teachers, n_teachers, offset=1, device=strengths_BM.device)
    present_BP = mask_BM[:, first_P] & mask_BM[:, second_P]
    difference_BP = strengths_BM[:, first_P] - strengths_BM[:, second_P]
    target_BP = target(rewards_BM[:, first_P] - rewards_BM[:, second_P]).to(strengths_BM.dtype)
    # Beyond 20 torch would round softplus to its argument, and float64 can tell them apart up to 37.
    loss_BP = functional.softplus(difference_BP, threshold=40) - target_BP * difference_BP
    return _mean(torch.where(present_BP, loss_BP, 0.0).sum(dim=1) / present_BP.sum(dim=1))

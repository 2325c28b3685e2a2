"""How a teacher is chosen: PerSyn, the paper's baselines, and random.

``strong``, ``mix``, ``family_strong``, ``car`` and ``best_single`` follow from the teachers' means over the
training table; ``persyn`` from the router's strengths for the prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clients.types import CAR_BETA, MIX_STRONG_SHARE, Price, Strategy
from router_model.checkpoint import Manifest
from router_model.errors import StrategyError
from router_model.model import TeacherSummary

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """How to choose.

    Args:
        teachers: Allow-list; ``None`` allows all of the checkpoint.
        exclude: Teachers never to choose.
        alpha: Weight of learnability in [0, 1]; that of the checkpoint if ``None``.
        temperature: 0 takes the best; above, ``persyn`` samples from softmax(strengths / temperature).
        seed: Draws depend on it and on the prompt's id alone.
        cost_weight: What one US dollar of expected cost takes off the value that the strategy ranks by.
        top_k: Only the k strongest allowed teachers stay candidates for each prompt.
        mix_strong_share: Share of the prompts that ``mix`` gives to the strongest teacher, in [0, 1].
        car_beta: Weight of the student's loss in ``car``, at least 0.
        prices: By teacher id, for ``cost_weight``; a teacher that is not named has no known price.

    Raises:
        StrategyError: A value is out of range, or has no meaning for the strategy.
    """

    strategy: Strategy = "persyn"
    teachers: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    alpha: float | None = None
    temperature: float = 0.0
    seed: int = 0
    cost_weight: float = 0.0
    top_k: int | None = None
    mix_strong_share: float = MIX_STRONG_SHARE
    car_beta: float = CAR_BETA
    prices: Mapping[str, Price] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what would otherwise be ignored without a word."""
        _require_range("alpha", 0.0 if self.alpha is None else self.alpha, 1.0)
        _require_range("temperature", self.temperature)
        _require_range("cost_weight", self.cost_weight)
        _require_range("mix_strong_share", self.mix_strong_share, 1.0)
        _require_range("car_beta", self.car_beta)
        if self.top_k is not None and self.top_k < 1:
            raise refusal("top_k", f"top_k must be at least 1, not {self.top_k}")
        if self.temperature > 0 and self.strategy != "persyn":
            raise refusal(
                "temperature",
                f"temperature has no meaning for strategy {self.strategy!r}: only 'persyn' samples by "
                "strength; leave temperature at 0",
            )
        if self.cost_weight > 0 and self.strategy in ("mix", "random"):
            raise refusal(
                "cost_weight",
                f"cost_weight has no meaning for strategy {self.strategy!r}, which draws by fixed shares; "
                "leave cost_weight at 0",
            )


def refusal(name: str, message: str) -> StrategyError:
    """A ``StrategyError`` that names the option at fault in its details, under ``field``."""
    return StrategyError(message, details={"field": name})


def _require_range(name: str, value: float, highest: float = math.inf) -> None:
    if not (0 <= value <= highest and math.isfinite(value)):
        bounds = f"in [0, {highest:g}]" if math.isfinite(highest) else "a finite number of at least 0"
        raise refusal(name, f"{name} must be {bounds}, not {value:g}")


def chances(
    manifest: Manifest,
    teachers: Sequence[TeacherSummary],
    strengths_M: FloatArray,
    options: RouteOptions,
    cost_usd_M: FloatArray | None = None,
) -> FloatArray:
    """Probability with which the strategy chooses each of the candidates.

    Args:
        teachers: The M candidates. Ties go to the first of them.
        strengths_M: The router's strengths for the prompt.
        cost_usd_M: Expected cost of an answer, if ``options.cost_weight`` is to count.

    Returns:
        M, summing to 1.

    Raises:
        StrategyError: The checkpoint or the candidates lack what the strategy goes by.
    """
    values_M = ranking(manifest, teachers, strengths_M, options, cost_usd_M)
    if options.strategy == "random":
        return np.full(len(teachers), 1 / len(teachers))
    if options.strategy == "mix":
        return _mix(values_M, options.mix_strong_share)
    if options.strategy == "persyn" and options.temperature > 0:
        return _sharpened(values_M, options.temperature)
    return _only(values_M)


def ranking(
    manifest: Manifest,
    teachers: Sequence[TeacherSummary],
    strengths_M: FloatArray,
    options: RouteOptions,
    cost_usd_M: FloatArray | None = None,
) -> FloatArray:
    """By what the strategy ranks the candidates, higher is better. Arguments and errors as of ``chances``.

    Returns:
        M, in the unit of the strategy: logits (``persyn``), raw quality (``strong``, ``mix``,
        ``family_strong``), shifted quality over loss (``car``), or normalised reward (``best_single``); less
        ``cost_weight`` times the cost.
    """
    values_M = _values(manifest, teachers, strengths_M, options)
    return values_M if cost_usd_M is None else values_M - options.cost_weight * cost_usd_M


def _values(
    manifest: Manifest, teachers: Sequence[TeacherSummary], strengths_M: FloatArray, options: RouteOptions
) -> FloatArray:
    match options.strategy:
        case "persyn":
            return strengths_M
        case "strong" | "mix":
            return _quality(teachers)
        case "family_strong":
            return _family_quality(manifest, teachers)
        case "car":
            return compatibility_adjusted_reward(manifest, teachers, options.car_beta)
        case "best_single":
            return _mean_reward(manifest, teachers, options.alpha)
        case "random":
            return np.zeros(len(teachers))


def softmax(values: FloatArray) -> FloatArray:
    """Probabilities proportional to exp(value)."""
    shifted = np.exp(values - values.max())
    return np.asarray(shifted / shifted.sum())


def _sharpened(values_M: FloatArray, temperature: float) -> FloatArray:
    """softmax(values / temperature), for any temperature above 0 however small."""
    # A gap may overflow to minus infinity, which is a probability of 0 as it should be.
    with np.errstate(over="ignore"):
        return softmax((values_M - values_M.max()) / temperature)


def _only(values_M: FloatArray) -> FloatArray:
    """All probability on the greatest value; ties go to the first."""
    odds_M = np.zeros(len(values_M))
    odds_M[int(np.argmax(values_M))] = 1.0
    return odds_M


def _quality(teachers: Sequence[TeacherSummary]) -> FloatArray:
    return np.array([teacher.mean_quality for teacher in teachers])


def _mix(quality_M: FloatArray, strong_share: float) -> FloatArray:
    """The strongest teacher for its share of the prompts, the others alike for the rest."""
    if len(quality_M) == 1:
        return np.ones(1)
    odds_M = np.full(len(quality_M), (1 - strong_share) / (len(quality_M) - 1))
    odds_M[int(np.argmax(quality_M))] = strong_share
    return odds_M


def _mean_reward(manifest: Manifest, teachers: Sequence[TeacherSummary], alpha: float | None) -> FloatArray:
    """Mean mixed reward of each candidate, at the alpha asked for: another alpha has another best teacher."""
    rewards_M = manifest.mean_reward(manifest.alpha if alpha is None else alpha)
    column = {teacher.id: index for index, teacher in enumerate(manifest.teachers)}
    return np.asarray(rewards_M[[column[teacher.id] for teacher in teachers]])


def _family_quality(manifest: Manifest, teachers: Sequence[TeacherSummary]) -> FloatArray:
    """Quality within the student's family, minus infinity outside."""
    family = manifest.student.family
    kin_M = np.array([family is not None and teacher.family == family for teacher in teachers])
    if not kin_M.any():
        raise refusal(
            "strategy", f"family_strong: no allowed teacher is of the student's family ({family!r})"
        )
    return np.where(kin_M, _quality(teachers), -np.inf)


def compatibility_adjusted_reward(
    manifest: Manifest, teachers: Sequence[TeacherSummary], beta: float
) -> FloatArray:
    """CAR = r / (1 + beta * L): mean quality r, discounted by the student's mean loss L on the answers.

    Xu et al., arXiv 2411.07133. With a negative r a larger loss would raise the value, so if any teacher of
    the checkpoint has one, all are shifted until the lowest is 0, whichever of them are allowed.

    Raises:
        StrategyError: The table had no learnability, or one that is no log-probability.
    """
    if manifest.learnability == "rank_surprisal":
        raise refusal(
            "strategy", "car needs learnability in log-probabilities, and the router has rank_surprisal"
        )
    losses = [teacher.mean_learnability for teacher in teachers]
    if any(loss is None for loss in losses):
        raise refusal("strategy", "car needs learnability, and the score table had none")
    discounts_M = 1.0 - beta * np.array(losses, dtype=np.float64)
    if not (discounts_M > 0).all():
        raise refusal("strategy", "car needs learnability in log-probabilities, which are at most 0")
    lowest = min(0.0, float(_quality(manifest.teachers).min()))
    return np.asarray((_quality(teachers) - lowest) / discounts_M)

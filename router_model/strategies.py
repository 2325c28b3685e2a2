"""How a teacher is chosen for a prompt: PerSyn, the paper's baselines, and random.

``strong``, ``mix``, ``family_strong``, ``car`` and ``best_single`` follow from the teachers' means over the
training table; ``persyn`` from the router's strengths for the prompt.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clients.errors import UnknownTeacherError
from clients.types import RoutingDecision, Strategy
from router_model.checkpoint import Manifest
from router_model.errors import StrategyError
from router_model.inference import RouterOutput
from router_model.model import TeacherSummary

FloatArray = NDArray[np.float64]

STRONG_SHARE = 0.2
"""``mix`` is one part strong to four parts weak (Li et al., arXiv 2502.12143)."""

UNCERTAIN_BELOW = 0.55
"""A decision is uncertain if the best teacher's win probability over the second is below this."""


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """How to choose.

    Args:
        teachers: Allow-list; ``None`` allows all of the checkpoint.
        alpha: Must be that of the checkpoint where given.
        temperature: 0 takes the best; above, ``persyn`` samples from softmax(strengths / temperature).
        seed: Draws depend on it and on the prompt's id alone.
        cost_weight: Strength that one US dollar of expected answer cost outweighs.
        expected_cost_usd: By teacher id; a teacher that is not named costs nothing.
        beta: Of ``car``.
    """

    strategy: Strategy = "persyn"
    teachers: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    alpha: float | None = None
    temperature: float = 0.0
    seed: int = 0
    cost_weight: float = 0.0
    expected_cost_usd: Mapping[str, float] = field(default_factory=dict)
    beta: float = 1.0


def decide(
    manifest: Manifest, output: RouterOutput, row: int, prompt_id: str, options: RouteOptions
) -> RoutingDecision:
    """The teacher for one prompt.

    ``distribution`` is softmax of the allowed teachers' strengths at temperature 1, whatever the strategy;
    ``propensity`` is the probability with which the strategy chooses the teacher it chose.

    Raises:
        UnknownTeacherError: A teacher that the checkpoint does not have.
        StrategyError: No teacher is allowed, alpha is not the checkpoint's, or the strategy does not apply.
    """
    if options.alpha is not None and not math.isclose(options.alpha, manifest.alpha, abs_tol=1e-9):
        raise StrategyError(
            f"the router was trained at alpha = {manifest.alpha:g} and cannot answer for {options.alpha:g}"
        )
    columns = _allowed(manifest, options)
    teachers = [manifest.teachers[column] for column in columns]
    strengths = output.strengths_BM[row, columns]
    # Cost counts in the choice, not in what is reported of the router.
    cost = np.array([options.expected_cost_usd.get(teacher.id, 0.0) for teacher in teachers])
    odds = chances(manifest, teachers, strengths - options.cost_weight * cost, options)
    chosen = _draw(odds, options.seed, prompt_id)
    ranked = np.sort(strengths)[::-1]
    margin = float(ranked[0] - ranked[1]) if len(ranked) > 1 else 0.0
    names = [teacher.id for teacher in teachers]
    return RoutingDecision(
        prompt_id=prompt_id,
        teacher=names[chosen],
        distribution=_by_name(names, softmax(strengths)),
        strengths=_by_name(names, strengths),
        quality=_by_name(names, output.quality_BM[row, columns]),
        learnability=_by_name(names, output.learnability_BM[row, columns]),
        expected_reward=_by_name(names, output.expected_reward_BM[row, columns]),
        propensity=float(odds[chosen]),
        margin=margin,
        uncertain=len(ranked) > 1 and margin < math.log(UNCERTAIN_BELOW / (1 - UNCERTAIN_BELOW)),
        input_tokens=int(output.input_tokens_B[row]),
        truncated=bool(output.truncated_B[row]),
    )


def softmax(values: FloatArray) -> FloatArray:
    """Probabilities proportional to exp(value)."""
    shifted = np.exp(values - values.max())
    return np.asarray(shifted / shifted.sum())


def _sharpened(utilities: FloatArray, temperature: float) -> FloatArray:
    """softmax(utilities / temperature), for any temperature above 0 however small."""
    # A gap may overflow to minus infinity, which is a probability of 0 as it should be.
    with np.errstate(over="ignore"):
        return softmax((utilities - utilities.max()) / temperature)


def _by_name(names: Sequence[str], values: FloatArray) -> dict[str, float]:
    """Values by teacher; empty if they are not known."""
    return {} if np.isnan(values).any() else dict(zip(names, map(float, values), strict=True))


def _allowed(manifest: Manifest, options: RouteOptions) -> list[int]:
    """Columns of the allowed teachers, by id: neither ties nor draws depend on the checkpoint's order."""
    known = [teacher.id for teacher in manifest.teachers]
    for name in (*(options.teachers or ()), *options.exclude):
        if name not in known:
            raise UnknownTeacherError(f"the router knows no teacher {name!r}; known: {', '.join(known)}")
    wanted = set(known if options.teachers is None else options.teachers) - set(options.exclude)
    columns = [known.index(name) for name in sorted(wanted)]
    if not columns:
        raise StrategyError("no teacher is left to choose from")
    return columns


def chances(
    manifest: Manifest, teachers: Sequence[TeacherSummary], utilities: FloatArray, options: RouteOptions
) -> FloatArray:
    """Probability with which the strategy chooses each of the allowed teachers.

    Args:
        utilities: The router's strengths for the prompt, less what costs take off; one per teacher.
    """
    if options.strategy == "random":
        return np.full(len(teachers), 1 / len(teachers))
    if options.strategy == "mix":
        return _mix(_quality(teachers))
    if options.strategy == "persyn" and options.temperature > 0:
        return _sharpened(utilities, options.temperature)
    return _only(ranking(manifest, teachers, utilities, options))


def ranking(
    manifest: Manifest, teachers: Sequence[TeacherSummary], utilities: FloatArray, options: RouteOptions
) -> FloatArray:
    """By what the strategy ranks the allowed teachers, higher is better."""
    match options.strategy:
        case "persyn":
            return utilities
        case "strong" | "mix":
            return _quality(teachers)
        case "family_strong":
            return _family_quality(manifest, teachers)
        case "car":
            return compatibility_adjusted_reward(manifest, teachers, options.beta)
        case "best_single":
            return np.array([teacher.mean_reward for teacher in teachers])
        case "random":
            return np.zeros(len(teachers))


def _only(values: FloatArray) -> FloatArray:
    """All probability on the greatest value; ties go to the first."""
    odds = np.zeros(len(values))
    odds[int(np.argmax(values))] = 1.0
    return odds


def _quality(teachers: Sequence[TeacherSummary]) -> FloatArray:
    return np.array([teacher.mean_quality for teacher in teachers])


def _mix(quality: FloatArray) -> FloatArray:
    """The strongest teacher for one prompt in five, the others alike for the rest."""
    if len(quality) == 1:
        return np.ones(1)
    odds = np.full(len(quality), (1 - STRONG_SHARE) / (len(quality) - 1))
    odds[int(np.argmax(quality))] = STRONG_SHARE
    return odds


def _family_quality(manifest: Manifest, teachers: Sequence[TeacherSummary]) -> FloatArray:
    """Quality within the student's family, minus infinity outside."""
    family = manifest.student.family
    kin = np.array([family is not None and teacher.family == family for teacher in teachers])
    if not kin.any():
        raise StrategyError(f"family_strong: no allowed teacher is of the student's family ({family!r})")
    return np.where(kin, _quality(teachers), -np.inf)


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
        raise StrategyError("car needs learnability in log-probabilities, and the router has rank_surprisal")
    losses = [teacher.mean_learnability for teacher in teachers]
    if any(loss is None for loss in losses):
        raise StrategyError("car needs learnability, and the score table had none")
    discounts = 1.0 - beta * np.array(losses, dtype=np.float64)
    if not (discounts > 0).all():
        raise StrategyError("car needs learnability in log-probabilities, which are at most 0")
    lowest = min(0.0, float(_quality(manifest.teachers).min()))
    return np.asarray((_quality(teachers) - lowest) / discounts)


def _draw(odds: FloatArray, seed: int, prompt_id: str) -> int:
    """An index drawn by the odds, from a hash of seed and prompt id: the same on every replica."""
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}".encode("utf-8", "surrogatepass")).digest()
    drawn = int.from_bytes(digest[:8]) / 2**64
    return min(int(np.searchsorted(np.cumsum(odds), drawn, side="right")), len(odds) - 1)

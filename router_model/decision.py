"""The decision for one prompt: which teacher answers it, and how sure the router is."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clients.errors import UnknownTeacherError
from clients.types import RoutingDecision
from router_model.answer_cost import expected_cost_usd, unknown_cost
from router_model.checkpoint import Manifest
from router_model.doubt import jackknife_error
from router_model.errors import StrategyError
from router_model.outlook import Outlook, RouterOutput
from router_model.strategies import RouteOptions, chances, refusal, softmax

FloatArray = NDArray[np.float64]
Columns = NDArray[np.intp]

UNCERTAIN_BELOW = 0.55
"""Without an ensemble a decision is uncertain if the best teacher wins against the second less often."""


def decide(
    manifest: Manifest, output: RouterOutput, row: int, prompt_id: str, options: RouteOptions
) -> RoutingDecision:
    """The teacher for one prompt.

    ``distribution`` is softmax of the candidates' strengths at temperature 1, whatever the strategy;
    ``propensity`` is the probability with which the strategy chooses the teacher it chose. Cost counts in the
    choice, not in what is reported of the router.

    Raises:
        UnknownTeacherError: A teacher that the checkpoint does not have.
        StrategyError: No teacher is allowed, alpha or cost cannot be served, or the strategy does not apply.
    """
    outlook = outlook_at(output, options.alpha)
    columns = _candidates(manifest, outlook.strengths_BM[row], options)
    teachers = [manifest.teachers[column] for column in columns]
    strengths = outlook.strengths_BM[row, columns]
    cost_usd = _cost_usd(manifest, columns, int(output.input_tokens_B[row]), options)
    odds = chances(manifest, teachers, strengths, options, cost_usd)
    chosen = _draw(odds, options.seed, prompt_id)
    names = [teacher.id for teacher in teachers]
    best_first = np.argsort(-strengths, kind="stable")
    margin = float(strengths[best_first[0]] - strengths[best_first[1]]) if len(names) > 1 else 0.0
    return RoutingDecision(
        prompt_id=prompt_id,
        teacher=names[chosen],
        distribution=_by_name(names, softmax(strengths)),
        strengths=_by_name(names, strengths),
        quality=_by_name(names, output.quality_BM[row, columns]),
        learnability=_by_name(names, output.learnability_BM[row, columns]),
        expected_reward=_by_name(names, outlook.expected_reward_BM[row, columns]),
        propensity=float(odds[chosen]),
        margin=margin,
        uncertain=_is_uncertain(outlook, row, columns[best_first], margin),
        input_tokens=int(output.input_tokens_B[row]),
        truncated=bool(output.truncated_B[row]),
        conformal_set=_conformal_set(names, strengths, best_first, outlook.conformal_width),
        out_of_distribution=bool(output.out_of_distribution_B[row]),
    )


def outlook_at(output: RouterOutput, alpha: float | None) -> Outlook:
    """The router's outlook at an alpha, that of the checkpoint if ``None``.

    Raises:
        StrategyError: The router cannot serve this alpha; its details name the field.
    """
    try:
        return output.at(alpha)
    except StrategyError as error:
        raise refusal("alpha", error.message) from error


def _candidates(manifest: Manifest, strengths_M: FloatArray, options: RouteOptions) -> Columns:
    """Columns of the candidates, by teacher id: neither ties nor draws depend on the checkpoint's order."""
    known = [teacher.id for teacher in manifest.teachers]
    for name in (*(options.teachers or ()), *options.exclude):
        if name not in known:
            raise UnknownTeacherError(f"the router knows no teacher {name!r}; known: {', '.join(known)}")
    wanted = set(known if options.teachers is None else options.teachers) - set(options.exclude)
    columns = np.array([known.index(name) for name in sorted(wanted)], dtype=np.intp)
    if not len(columns):
        raise refusal("exclude" if options.exclude else "teachers", "no teacher is left to choose from")
    if options.top_k is None or options.top_k >= len(columns):
        return columns
    strongest = np.argsort(-strengths_M[columns], kind="stable")[: options.top_k]
    return columns[np.sort(strongest)]


def _cost_usd(
    manifest: Manifest, columns: Columns, n_input_tokens: int, options: RouteOptions
) -> FloatArray | None:
    """Expected cost of the candidates' answers, ``None`` if cost does not count."""
    if options.cost_weight == 0:
        return None
    cost_usd = expected_cost_usd(manifest.teachers, options.prices, n_input_tokens)[columns]
    unknown = [manifest.teachers[column].id for column in columns[np.isnan(cost_usd)]]
    if unknown:
        raise unknown_cost("cost_weight", unknown)
    return cost_usd


def _is_uncertain(outlook: Outlook, row: int, best_first: Columns, margin: float) -> bool:
    """Whether the lead of the best candidate over the second is within one jackknife error.

    With fewer than two members there is none, and a win probability near one half has to do.
    """
    if len(best_first) < 2:
        return False
    if len(outlook.members_EBM) < 2:
        return margin < math.log(UNCERTAIN_BELOW / (1 - UNCERTAIN_BELOW))
    first, second = best_first[:2]
    lead_E = outlook.members_EBM[:, row, first] - outlook.members_EBM[:, row, second]
    return float(jackknife_error(lead_E)) > margin


def _conformal_set(
    names: Sequence[str], strengths: FloatArray, best_first: Columns, width: float | None
) -> tuple[str, ...]:
    """The candidates within ``width`` of the strongest, best first; empty if no width is known."""
    if width is None:
        return ()
    highest = strengths[best_first[0]]
    return tuple(names[index] for index in best_first if highest - strengths[index] <= width)


def _by_name(names: Sequence[str], values: FloatArray) -> dict[str, float]:
    """Values by teacher; empty if they are not known."""
    return {} if np.isnan(values).any() else dict(zip(names, map(float, values), strict=True))


def _draw(odds: FloatArray, seed: int, prompt_id: str) -> int:
    """An index drawn by the odds, from a hash of seed and prompt id: the same on every replica."""
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}".encode("utf-8", "surrogatepass")).digest()
    drawn = int.from_bytes(digest[:8]) / 2**64
    return min(int(np.searchsorted(np.cumsum(odds), drawn, side="right")), len(odds) - 1)

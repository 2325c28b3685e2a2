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
    """The teacher for one prompt; ``Chooser`` for many. Arguments and errors are its."""
    return Chooser(manifest, options).decide(output, row, prompt_id)


class Chooser:
    """Chooses teachers by one checkpoint and one set of options; what no prompt changes is worked out once.

    Raises:
        UnknownTeacherError: An option names a teacher that the checkpoint does not have.
        StrategyError: No teacher is allowed.
    """

    def __init__(self, manifest: Manifest, options: RouteOptions) -> None:
        self._manifest = manifest
        self._options = options
        self._allowed = _allowed(manifest, options)
        self._ids = tuple(teacher.id for teacher in manifest.teachers)

    def decide(self, output: RouterOutput, row: int, prompt_id: str) -> RoutingDecision:
        """The teacher for one prompt.

        ``distribution`` is softmax of the candidates' strengths at temperature 1, whatever the strategy;
        ``propensity`` is the probability with which the strategy chooses the teacher it chose. Cost counts in
        the choice, not in what is reported of the router.

        Raises:
            StrategyError: Alpha or cost cannot be served, or the strategy does not apply.
        """
        outlook = outlook_at(output, self._options.alpha)
        columns = self._candidates(outlook.strengths_BM[row])
        names = [self._ids[column] for column in columns.tolist()]
        strengths = outlook.strengths_BM[row, columns]
        n_input_tokens = int(output.input_tokens_B[row])
        best_first = np.argsort(-strengths, kind="stable")
        chosen, propensity = self._choice(columns, strengths, best_first, n_input_tokens, prompt_id)
        margin = float(strengths[best_first[0]] - strengths[best_first[1]]) if len(names) > 1 else 0.0
        return RoutingDecision(
            prompt_id=prompt_id,
            teacher=names[chosen],
            distribution=_by_name(names, softmax(strengths)),
            strengths=_by_name(names, strengths),
            quality=_by_name(names, output.quality_BM[row, columns]),
            learnability=_by_name(names, output.learnability_BM[row, columns]),
            expected_reward=_by_name(names, outlook.expected_reward_BM[row, columns]),
            propensity=propensity,
            margin=margin,
            uncertain=_is_uncertain(outlook, row, columns[best_first], margin),
            input_tokens=n_input_tokens,
            truncated=bool(output.truncated_B[row]),
            conformal_set=_conformal_set(names, strengths, best_first, outlook.conformal_width),
            out_of_distribution=bool(output.out_of_distribution_B[row]),
        )

    def _candidates(self, strengths_M: FloatArray) -> Columns:
        """The allowed columns, cut to the strongest of this prompt where the options say so."""
        allowed, top_k = self._allowed, self._options.top_k
        if top_k is None or top_k >= len(allowed):
            return allowed
        strongest = np.argsort(-strengths_M[allowed], kind="stable")[:top_k]
        return allowed[np.sort(strongest)]

    def _choice(
        self,
        columns: Columns,
        strengths: FloatArray,
        best_first: Columns,
        n_input_tokens: int,
        prompt_id: str,
    ) -> tuple[int, float]:
        """Which of the candidates is taken, and how probable that was."""
        options = self._options
        if options.strategy == "persyn" and options.temperature == 0 and options.cost_weight == 0:
            return int(best_first[0]), 1.0
        teachers = [self._manifest.teachers[column] for column in columns]
        cost_usd = _cost_usd(self._manifest, columns, n_input_tokens, options)
        odds = chances(self._manifest, teachers, strengths, options, cost_usd)
        chosen = _draw(odds, options.seed, prompt_id)
        return chosen, float(odds[chosen])


def outlook_at(output: RouterOutput, alpha: float | None) -> Outlook:
    """The router's outlook at an alpha, that of the checkpoint if ``None``.

    Raises:
        StrategyError: The router cannot serve this alpha; its details name the field.
    """
    try:
        return output.at(alpha)
    except StrategyError as error:
        raise refusal("alpha", error.message) from error


def _allowed(manifest: Manifest, options: RouteOptions) -> Columns:
    """Columns that may be chosen, by teacher id: neither ties nor draws depend on the checkpoint's order."""
    known = [teacher.id for teacher in manifest.teachers]
    for name in (*(options.teachers or ()), *options.exclude):
        if name not in known:
            raise UnknownTeacherError(f"the router knows no teacher {name!r}; known: {', '.join(known)}")
    wanted = set(known if options.teachers is None else options.teachers) - set(options.exclude)
    if not wanted:
        raise refusal("exclude" if options.exclude else "teachers", "no teacher is left to choose from")
    return np.array([known.index(name) for name in sorted(wanted)], dtype=np.intp)


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
    numbers = values.tolist()
    return {} if any(map(math.isnan, numbers)) else dict(zip(names, numbers, strict=True))


def _draw(odds: FloatArray, seed: int, prompt_id: str) -> int:
    """An index drawn by the odds, from a hash of seed and prompt id: the same on every replica."""
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}".encode("utf-8", "surrogatepass")).digest()
    drawn = int.from_bytes(digest[:8]) / 2**64
    return min(int(np.searchsorted(np.cumsum(odds), drawn, side="right")), len(odds) - 1)

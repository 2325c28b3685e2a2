"""The share of the gap between the best single teacher and the oracle that a method closes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

N_BOOTSTRAP = 10_000
_CHUNK = 200
_NO_GAP = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Contest:
    """Expected rewards of one method, the best single teacher and the oracle on the same N prompts."""

    value_N: FloatArray
    best_single_N: FloatArray
    oracle_N: FloatArray


def gaps_closed(contests: Sequence[Contest], *, seed: int = 0) -> list[dict[str, Any]]:
    """(V - V_best_single) / (V_oracle - V_best_single) of each contest, with a 95 % interval.

    The interval is the percentile of 10,000 bootstrap resamples of the prompts. All contests share the
    resamples, so they must be about the same prompts in the same order.

    Returns:
        ``{"value": float, "ci95": [low, high]}`` for each contest; both None where there is no gap to close.
    """
    arrays = {id(array): array for contest in contests for array in _arrays(contest)}
    totals_of = dict(zip(arrays, _bootstrap_totals(list(arrays.values()), seed), strict=True))
    return [
        _gap_closed(contest, *(totals_of[id(array)] for array in _arrays(contest))) for contest in contests
    ]


def _arrays(contest: Contest) -> tuple[FloatArray, FloatArray, FloatArray]:
    return contest.value_N, contest.best_single_N, contest.oracle_N


def _bootstrap_totals(values_N: Sequence[FloatArray], seed: int) -> FloatArray:
    """Sum of each array over 10,000 resamples of the prompts, the same resamples for all."""
    values_NK = np.column_stack(values_N)
    n_prompts = len(values_NK)
    rng = np.random.default_rng(seed)
    equal = np.full(n_prompts, 1 / n_prompts)
    # In chunks: all counts at once would take 400 MB for 5,000 prompts.
    totals = [
        rng.multinomial(n_prompts, equal, size=_CHUNK) @ values_NK for _ in range(N_BOOTSTRAP // _CHUNK)
    ]
    return np.concatenate(totals).T


def _gap_closed(
    contest: Contest, totals: FloatArray, single_totals: FloatArray, oracle_totals: FloatArray
) -> dict[str, Any]:
    gap = float((contest.oracle_N - contest.best_single_N).mean())
    if gap <= _NO_GAP:
        return {"value": None, "ci95": None}
    gains, gaps = totals - single_totals, oracle_totals - single_totals
    # A resample without any gap says nothing about the share that was closed.
    usable = gaps > _NO_GAP * len(contest.oracle_N)
    low, high = np.quantile(gains[usable] / gaps[usable], [0.025, 0.975])
    value = float((contest.value_N - contest.best_single_N).mean()) / gap
    return {"value": value, "ci95": [float(low), float(high)]}

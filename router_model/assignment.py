"""The choice for a whole corpus: one teacher per prompt, under a budget and bounds on each teacher's prompts.

    max_A  Σ_im s_im A_im   s.t.  Σ_m A_im = 1,  L_m <= Σ_i A_im <= U_m,  Σ_im c_im A_im <= B,  A >= 0

with the value s and the expected cost c of teacher m for prompt i. HiGHS solves it as a linear program. Its
dual prices, λ of the budget and μ of the bounds, give prompt i to argmax_m s_im - λ c_im - μ_m.

Without the budget this is a transportation problem, whose vertices are whole (its matrix is totally
unimodular). With it a vertex splits no more prompts between teachers than there are limits that bind. Those,
and the prompts that are closest to a tie at the prices, are then assigned anew by branch and bound. One
that fits always exists: the cheapest assignment of these prompts within the bounds is a vertex without a
budget, hence whole, and costs no more than the split one.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.errors import InfeasiblePlanError, PipelineError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]

_WHOLE = 1.0 - 1e-6
"""From this share on a prompt counts as not split: HiGHS keeps to its rows by 1e-7."""
_N_FREE = 30
"""Prompts, besides those that were split, that rounding may give to another teacher."""
_N_BRANCHES = 500
"""Of the rounding: a limit in seconds would make plans depend on the machine's load."""
_NO_GAIN = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """What an assignment of N prompts to M teachers must keep to."""

    least_M: IntArray
    """Prompts that each teacher gets at least."""
    most_M: IntArray
    budget_usd: float | None = None
    """Of the expected cost of all answers."""


@dataclass(frozen=True, slots=True, eq=False)
class CorpusAssignment:
    """A teacher for each prompt, and what the limits cost."""

    columns_N: IntArray
    """The teacher of each prompt."""
    value: float
    """Sum over the prompts, in the unit of the values."""
    upper_bound: float
    """Value of the linear program, which no assignment within the limits exceeds."""
    n_split: int
    """Prompts that the linear program split between teachers."""
    usd_price: float
    """λ, at least 0: what one more US dollar of budget would add to the value."""
    prompt_price_M: FloatArray
    """μ: above 0, what one more prompt for this teacher would add, its greatest count being full; below 0,
    what the last prompt that its least count forces on it takes off. 0 where neither binds."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """The K pairs of a prompt and a teacher that are allowed."""

    n_prompts: int
    n_teachers: int
    prompt_K: IntArray
    column_K: IntArray
    value_K: FloatArray
    cost_usd_K: FloatArray

    @property
    def usd_unit(self) -> float:
        """The dearest answer: costs are given to the solver in this unit, so that its tolerances fit."""
        return float(self.cost_usd_K.max()) or 1.0

    def of_prompts(self, is_chosen_N: NDArray[np.bool_]) -> "_Pairs":
        """Those of some of the prompts, which are numbered anew."""
        keep_K = is_chosen_N[self.prompt_K]
        number_N = np.cumsum(is_chosen_N) - 1
        return _Pairs(
            int(is_chosen_N.sum()),
            self.n_teachers,
            number_N[self.prompt_K[keep_K]],
            self.column_K[keep_K],
            self.value_K[keep_K],
            self.cost_usd_K[keep_K],
        )


def assign(
    teachers: Sequence[str],
    values_NM: FloatArray,
    allowed_NM: NDArray[np.bool_],
    limits: Limits,
    cost_usd_NM: FloatArray | None = None,
) -> CorpusAssignment:
    """The assignment of the greatest total value within the limits, up to the prompts that had to be rounded.

    Args:
        teachers: Their ids, for messages.
        values_NM: Higher is better. Read where allowed, and finite there.
        allowed_NM: Which teachers may answer which prompt, one at least for each.
        cost_usd_NM: Expected cost, at least 0; needed for a budget.

    Raises:
        InfeasiblePlanError: No assignment keeps to the limits; with ``least_cost_usd`` in its details where
            the budget is too small.
        PipelineError: The solver gave up.
    """
    _require_counts(teachers, allowed_NM, limits)
    prompt_K, column_K = np.nonzero(allowed_NM)
    cost_usd_K = np.zeros(len(prompt_K)) if cost_usd_NM is None else cost_usd_NM[prompt_K, column_K]
    n_prompts, n_teachers = allowed_NM.shape
    value_K = values_NM[prompt_K, column_K]
    pairs = _Pairs(n_prompts, n_teachers, prompt_K, column_K, value_K, cost_usd_K)
    solution = _linear_solution(pairs, pairs.value_K, limits)
    if solution is None:
        raise _infeasible(pairs, limits)
    usd_price, prompt_price_M = _prices(pairs, solution, limits)
    reduced_NM = values_NM - prompt_price_M
    if cost_usd_NM is not None:
        reduced_NM -= usd_price * cost_usd_NM
    lead_N = _lead(np.where(allowed_NM, reduced_NM, -np.inf))
    columns_N, n_split = _whole_columns(pairs, solution.x, limits, lead_N)
    return CorpusAssignment(
        columns_N=columns_N,
        value=float(values_NM[np.arange(pairs.n_prompts), columns_N].sum()),
        upper_bound=-float(solution.fun),
        n_split=n_split,
        usd_price=usd_price,
        prompt_price_M=prompt_price_M,
    )


def _require_counts(teachers: Sequence[str], allowed_NM: NDArray[np.bool_], limits: Limits) -> None:
    """Refuse bounds that contradict each other, in words that name the teacher."""
    n_prompts = len(allowed_NM)
    allowed_M = allowed_NM.sum(axis=0)
    for name, least, most, n_allowed in zip(teachers, limits.least_M, limits.most_M, allowed_M, strict=True):
        if least > most:
            raise InfeasiblePlanError(
                f"the share of {name!r} holds no whole number of prompts: at least {least} and at most "
                f"{most} of {n_prompts}; widen it"
            )
        if least > n_allowed:
            raise InfeasiblePlanError(
                f"the share of {name!r} asks for at least {least} prompts, but the options allow it for "
                f"{n_allowed} of {n_prompts} only; lower the share, or allow the teacher"
            )
    if limits.least_M.sum() > n_prompts:
        raise InfeasiblePlanError(
            f"the least shares add up to {limits.least_M.sum()} prompts, and there are {n_prompts}; "
            "lower them"
        )
    n_room = int(np.minimum(limits.most_M, allowed_M).sum())
    if n_room < n_prompts:
        raise InfeasiblePlanError(
            f"the greatest shares leave {n_prompts - n_room} of {n_prompts} prompts without a teacher; raise "
            "them, or allow more teachers"
        )


def _linear_solution(
    pairs: _Pairs, worth_K: FloatArray, limits: Limits, open_K: NDArray[np.bool_] | None = None
) -> Any:
    """scipy's result for the greatest sum of ``worth_K``, a vertex; None if nothing keeps to the limits.

    Pairs that are not open get no share.

    The interior-point method with crossover: for 10,000 prompts and 19 teachers it takes 3 s, and the dual
    simplex 78 s.
    """
    # Imported here: planning is offline work, and the serving image has no scipy.
    optimize = importlib.import_module("scipy.optimize")
    counts_MK = _indicator(pairs.column_K, pairs.n_teachers)
    is_capped, is_floored = _binding(limits, pairs.n_prompts)
    rows = [counts_MK[is_capped], -counts_MK[is_floored]]
    bounds = [limits.most_M[is_capped], -limits.least_M[is_floored]]
    if limits.budget_usd is not None:
        rows.append(_row(pairs.cost_usd_K / pairs.usd_unit))
        bounds.append(np.array([limits.budget_usd / pairs.usd_unit]))
    found = optimize.linprog(
        -worth_K,
        A_ub=importlib.import_module("scipy.sparse").vstack(rows, format="csr"),
        b_ub=np.concatenate(bounds),
        A_eq=_indicator(pairs.prompt_K, pairs.n_prompts),
        b_eq=np.ones(pairs.n_prompts),
        bounds=(0, None) if open_K is None else np.column_stack([np.zeros(len(open_K)), open_K]),
        method="highs-ipm",
    )
    if found.status == 2:
        return None
    if found.status != 0:
        raise PipelineError(f"the solver found no plan: {found.message}")
    return found


def _infeasible(pairs: _Pairs, limits: Limits) -> InfeasiblePlanError:
    """Why nothing keeps to the limits: the budget, or else the bounds."""
    cheapest = _linear_solution(pairs, -pairs.cost_usd_K, Limits(limits.least_M, limits.most_M))
    if cheapest is None or limits.budget_usd is None:
        return InfeasiblePlanError(
            "no plan keeps to the shares with the teachers that are allowed for each prompt; widen the "
            "shares, or raise top_k"
        )
    # Rounded up, so that the number in the message is a budget that suffices.
    least_usd = float(np.ceil(cheapest.fun * 1e6) / 1e6)
    return InfeasiblePlanError(
        f"a budget of ${limits.budget_usd:.6f} is too small: the cheapest plan within the shares is expected "
        f"to cost ${least_usd:.6f}; raise the budget, widen the shares, or allow cheaper teachers",
        details={"least_cost_usd": least_usd},
    )


def _prices(pairs: _Pairs, solution: Any, limits: Limits) -> tuple[float, FloatArray]:
    """λ and μ from scipy's marginals, which are those of the negative value by the right-hand side."""
    is_capped, is_floored = _binding(limits, pairs.n_prompts)
    marginals = np.asarray(solution.ineqlin.marginals)
    n_capped, n_floored = int(is_capped.sum()), int(is_floored.sum())
    price_M = np.zeros(pairs.n_teachers)
    price_M[is_capped] -= marginals[:n_capped]
    price_M[is_floored] += marginals[n_capped : n_capped + n_floored]
    usd_price = 0.0 if limits.budget_usd is None else -float(marginals[-1]) / pairs.usd_unit
    # Adding 0 turns -0.0, which would be shown, into 0.0.
    return usd_price + 0.0, price_M + 0.0


def _lead(reduced_NM: FloatArray) -> FloatArray:
    """By how much the best teacher of each prompt leads the second; infinite where there is one only."""
    if reduced_NM.shape[1] < 2:
        return np.full(len(reduced_NM), np.inf)
    two_N2 = np.partition(reduced_NM, -2, axis=1)[:, -2:]
    return np.asarray(two_N2[:, 1] - two_N2[:, 0])


def _whole_columns(
    pairs: _Pairs, share_K: FloatArray, limits: Limits, lead_N: FloatArray
) -> tuple[IntArray, int]:
    """The teacher of each prompt, and how many prompts were split."""
    is_chosen_K = share_K >= _WHOLE
    columns_N = np.full(pairs.n_prompts, -1, dtype=np.intp)
    columns_N[pairs.prompt_K[is_chosen_K]] = pairs.column_K[is_chosen_K]
    is_free_N = columns_N < 0
    n_split = int(is_free_N.sum())
    if not n_split:
        return columns_N, 0
    is_free_N[np.argsort(lead_N, kind="stable")[:_N_FREE]] = True
    is_free_K = is_free_N[pairs.prompt_K]
    free = pairs.of_prompts(is_free_N)
    n_given_M = np.bincount(columns_N[~is_free_N], minlength=pairs.n_teachers)
    room_usd = None
    if limits.budget_usd is not None:
        left_usd = limits.budget_usd - float(pairs.cost_usd_K[is_chosen_K & ~is_free_K].sum())
        # The solver's own tolerance must not leave the rounding without a solution.
        room_usd = max(left_usd, float(free.cost_usd_K @ share_K[is_free_K])) + 1e-9 * free.usd_unit
    left = Limits(limits.least_M - n_given_M, limits.most_M - n_given_M, room_usd)
    columns_N[is_free_N] = _best_whole_columns(free, left)
    return columns_N, n_split


def _best_whole_columns(pairs: _Pairs, limits: Limits) -> IntArray:
    """The best whole assignment of a few prompts, by branch and bound over the linear program.

    Not scipy's ``milp``: it prints to standard output, where ``--json`` puts its answer.

    Raises:
        PipelineError: The solver found none.
    """
    cheapest = _linear_solution(pairs, -pairs.cost_usd_K, Limits(limits.least_M, limits.most_M))
    if cheapest is None:
        raise PipelineError("the solver could not round the prompts that it had split between teachers")
    best_K, best_value = cheapest.x > 0.5, float(pairs.value_K @ (cheapest.x > 0.5))
    branches = [np.ones(len(pairs.value_K), dtype=np.bool_)]
    for _ in range(_N_BRANCHES):
        if not branches:
            break
        open_K = branches.pop()
        found = _linear_solution(pairs, pairs.value_K, limits, open_K)
        if found is None or -found.fun <= best_value + _NO_GAIN:
            continue
        share_K = np.where(found.x < _WHOLE, found.x, 0.0)
        if not (share_K > 1.0 - _WHOLE).any():
            best_K, best_value = found.x > 0.5, float(pairs.value_K @ (found.x > 0.5))
            continue
        # The largest share first: the last branch is the next one taken.
        split = int(share_K.argmax())
        is_split = np.arange(len(share_K)) == split
        branches += [open_K & ~is_split, open_K & (is_split | (pairs.prompt_K != pairs.prompt_K[split]))]
    columns_N = np.zeros(pairs.n_prompts, dtype=np.intp)
    columns_N[pairs.prompt_K[best_K]] = pairs.column_K[best_K]
    return columns_N


def _binding(limits: Limits, n_prompts: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which teachers have a greatest and a least count that say anything."""
    return limits.most_M < n_prompts, limits.least_M > 0


def _indicator(group_K: IntArray, n_groups: int) -> Any:
    """Sparse, groups x K: 1 where the pair belongs to the group."""
    n_pairs = len(group_K)
    entries = (np.ones(n_pairs), (group_K, np.arange(n_pairs)))
    return importlib.import_module("scipy.sparse").csr_array(entries, shape=(n_groups, n_pairs))


def _row(values_K: FloatArray) -> Any:
    """Sparse, 1 x K."""
    return importlib.import_module("scipy.sparse").csr_array(values_K[None])

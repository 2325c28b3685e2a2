"""How good a router's choices are on prompts it has not seen, next to the choices that need no router."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from clients.types import Strategy
from router_model.bradley_terry import pairwise_loss
from router_model.checkpoint import Manifest
from router_model.errors import StrategyError, TableError
from router_model.inference import RouterOutput
from router_model.reward import mix_reward
from router_model.strategies import RouteOptions, chances, ranking
from router_model.table import ScoreTable

FloatArray = NDArray[np.float64]

HELPS = "routing helps"
HELPS_NOT = "routing does not help here: use best_single"

N_BOOTSTRAP = 10_000
N_BINS = 15
_TIE = 1e-12
_BOOTSTRAP_CHUNK = 200


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSet:
    """Held-out prompts with the rewards of their responses. Columns are those of the checkpoint."""

    table: ScoreTable
    reward_NM: FloatArray
    """NaN where a teacher has no response."""
    columns: tuple[int, ...]
    """Column of the checkpoint for each teacher of the table."""
    notes: tuple[str, ...]


def held_out(table: ScoreTable, manifest: Manifest) -> EvaluationSet:
    """The prompts of a table on which a router may be judged: not marked ``train``, not trained on.

    Raises:
        TableError: No prompt is left, or the table has a teacher that the checkpoint does not know.
        RouterError: The checkpoint's alpha needs a learnability that the table does not have.
    """
    known = [teacher.id for teacher in manifest.teachers]
    strangers = [teacher for teacher in table.teachers if teacher not in known]
    if strangers:
        raise TableError(table.source, f"teacher {strangers[0]!r} is unknown to the checkpoint: {known}")
    trained = set(manifest.training.prompt_sha256)
    seen_N = np.array([digest in trained for digest in table.prompt_hashes()])
    marked_N = np.array([split == "train" for split in table.split_N])
    kept_N = ~seen_N & ~marked_N & (table.mask_NM.sum(axis=1) > 1)
    if not kept_N.any():
        raise TableError(
            table.source,
            f"has no prompt to evaluate on: {int(seen_N.sum())} of {table.n_prompts} were trained on. Give a "
            "table of other prompts, or mark some with split = 'test' before training",
        )
    chosen = table.select(kept_N)
    reward_NM = mix_reward(
        chosen.quality_NM,
        chosen.learnability_NM,
        chosen.mask_NM,
        alpha=manifest.alpha,
        normalization=manifest.normalization,
    )
    n_dropped = table.n_prompts - chosen.n_prompts
    notes = [f"{n_dropped} prompts were left out: trained on, or with one response only"] if n_dropped else []
    absent = [name for name in known if name not in table.teachers]
    notes += [f"the table has no responses of {', '.join(absent)}"] if absent else []
    return EvaluationSet(chosen, reward_NM, tuple(known.index(name) for name in table.teachers), tuple(notes))


@dataclass(frozen=True, slots=True, eq=False)
class _Choices:
    """What a method would do: its odds of each teacher, and its ranking of them, prompt by prompt."""

    odds_NM: FloatArray
    ranking_NM: FloatArray
    """Minus infinity where a teacher has no response."""


def evaluate(
    output: RouterOutput, held: EvaluationSet, manifest: Manifest, *, seed: int = 0
) -> dict[str, Any]:
    """The report of a router, ready for JSON.

    A method that would choose a teacher without a response takes the next one of its own ranking.

    Args:
        output: The router's output for the prompts of ``held``, in their order.
        seed: Of the bootstrap.
    """
    strengths_NM = output.strengths_BM[:, held.columns]
    methods, notes = _methods(strengths_NM, held, manifest)
    value_of = {name: _expected(choices.odds_NM, held.reward_NM) for name, choices in methods.items()}
    oracle_N = value_of["oracle"]
    totals_of = dict(zip(value_of, _bootstrap_totals(list(value_of.values()), seed), strict=True))
    report_of = {
        name: {
            **_facts(choices, held),
            "regret": float((oracle_N - value_of[name]).mean()),
            "gap_closed": _gap_closed(name, value_of, totals_of),
        }
        for name, choices in methods.items()
    }
    low = report_of["persyn"]["gap_closed"]["ci95"]
    calibration = pairwise_calibration(strengths_NM, held.reward_NM)
    return {
        "n_prompts": held.table.n_prompts,
        "n_teachers": held.table.n_teachers,
        "alpha": manifest.alpha,
        "learnability": manifest.learnability,
        "checkpoint_id": manifest.checkpoint_id,
        "student": manifest.student.id,
        "head": manifest.heads["strength"],
        "n_training_prompts": manifest.training.n_prompts,
        "methods": report_of,
        "calibration": {name: calibration[name] for name in ("pairwise_ece", "pairwise_log_loss")},
        "reliability": calibration["bins"],
        "verdict": HELPS if low is not None and low[0] > 0 else HELPS_NOT,
        "notes": [*held.notes, *notes],
    }


def _methods(
    strengths_NM: FloatArray, held: EvaluationSet, manifest: Manifest
) -> tuple[dict[str, _Choices], list[str]]:
    """All strategies and the oracle. One that cannot be applied here is left out, with a note."""
    methods: dict[str, _Choices] = {}
    notes: list[str] = []
    for strategy in get_args(Strategy):
        try:
            methods[strategy] = _strategy(strategy, strengths_NM, held, manifest)
        except StrategyError as error:
            notes.append(f"{strategy} is left out: {error.message}")
    present_NM = held.table.mask_NM
    oracle_NM = np.where(present_NM, held.reward_NM, -np.inf)
    first_NM = np.zeros_like(oracle_NM)
    first_NM[np.arange(len(oracle_NM)), oracle_NM.argmax(axis=1)] = 1.0
    methods["oracle"] = _Choices(first_NM, oracle_NM)
    return methods, notes


def _strategy(
    strategy: Strategy, strengths_NM: FloatArray, held: EvaluationSet, manifest: Manifest
) -> _Choices:
    options = RouteOptions(strategy=strategy)
    everyone = [manifest.teachers[column] for column in held.columns]
    # Raises if the strategy cannot be applied to this checkpoint at all.
    ranking(manifest, everyone, np.zeros(len(everyone)), options)
    odds_NM = np.zeros_like(strengths_NM)
    ranking_NM = np.full_like(strengths_NM, -np.inf)
    for row, present_M in enumerate(held.table.mask_NM):
        here = np.flatnonzero(present_M)
        teachers = [manifest.teachers[held.columns[column]] for column in here]
        chosen = options
        if strategy == "family_strong" and not any(t.family == manifest.student.family for t in teachers):
            # Nobody of the family answered this prompt: the next of its ranking is the strongest other.
            chosen = RouteOptions(strategy="strong")
        odds_NM[row, here] = chances(manifest, teachers, strengths_NM[row, here], chosen)
        ranking_NM[row, here] = ranking(manifest, teachers, strengths_NM[row, here], chosen)
    return _Choices(odds_NM, ranking_NM)


def _expected(odds_NM: FloatArray, values_NM: FloatArray) -> FloatArray:
    """Expected value of each prompt's choice, exact rather than sampled."""
    return np.asarray((odds_NM * np.where(np.isnan(values_NM), 0.0, values_NM)).sum(axis=1))


def _facts(choices: _Choices, held: EvaluationSet) -> dict[str, Any]:
    table = held.table
    learnability_NM = table.learnability_NM
    share_M = choices.odds_NM.mean(axis=0)
    return {
        "mean_reward": float(_expected(choices.odds_NM, held.reward_NM).mean()),
        "mean_quality": float(_expected(choices.odds_NM, table.quality_NM).mean()),
        "mean_learnability": None
        if learnability_NM is None
        else float(_expected(choices.odds_NM, learnability_NM).mean()),
        "hit_at_1": float(_expected(choices.odds_NM, _is_best(held).astype(float)).mean()),
        "hit_at_3": float(np.mean(_hit_at_3(choices, held))),
        "share": dict(zip(table.teachers, map(float, share_M), strict=True)),
    }


def _is_best(held: EvaluationSet) -> NDArray[np.bool_]:
    """Cells with the greatest reward of their prompt; ties are all credited."""
    filled_NM = np.where(held.table.mask_NM, held.reward_NM, -np.inf)
    return np.asarray(filled_NM >= filled_NM.max(axis=1, keepdims=True) - _TIE)


def _hit_at_3(choices: _Choices, held: EvaluationSet) -> list[float]:
    """Chance that one of the three teachers ranked first is a best one; ties in the ranking are drawn."""
    hits = []
    for ranking_M, best_M, present_M in zip(
        choices.ranking_NM, _is_best(held), held.table.mask_NM, strict=True
    ):
        values, best = ranking_M[present_M], best_M[present_M]
        third = np.sort(values)[::-1][min(2, len(values) - 1)]
        above, level = values > third, values == third
        n_drawn = min(3, len(values)) - int(above.sum())
        n_level, n_good = int(level.sum()), int((level & best).sum())
        miss = math.comb(n_level - n_good, n_drawn) / math.comb(n_level, n_drawn)
        hits.append(1.0 if (above & best).any() else 1.0 - miss)
    return hits


def _bootstrap_totals(values_N: Sequence[FloatArray], seed: int) -> FloatArray:
    """Sum of each method's values over 10,000 resamples of the prompts, shared by all methods."""
    values_NK = np.column_stack(values_N)
    n_prompts = len(values_NK)
    rng = np.random.default_rng(seed)
    equal = np.full(n_prompts, 1 / n_prompts)
    # In chunks: all counts at once would take 400 MB for 5,000 prompts.
    totals = [
        rng.multinomial(n_prompts, equal, size=_BOOTSTRAP_CHUNK) @ values_NK
        for _ in range(N_BOOTSTRAP // _BOOTSTRAP_CHUNK)
    ]
    return np.concatenate(totals).T


def _gap_closed(
    name: str, value_of: Mapping[str, FloatArray], totals_of: Mapping[str, FloatArray]
) -> dict[str, Any]:
    """(V - V_best_single) / (V_oracle - V_best_single) with its paired bootstrap interval over prompts."""
    best_N = value_of["best_single"]
    gap = float((value_of["oracle"] - best_N).mean())
    if gap <= _TIE:
        return {"value": None, "ci95": None}
    gains = totals_of[name] - totals_of["best_single"]
    gaps = totals_of["oracle"] - totals_of["best_single"]
    # A resample without any gap says nothing about the share that was closed.
    usable = gaps > _TIE * len(best_N)
    low, high = np.quantile(gains[usable] / gaps[usable], [0.025, 0.975])
    return {"value": float((value_of[name] - best_N).mean()) / gap, "ci95": [float(low), float(high)]}


def pairwise_calibration(strengths_NM: FloatArray, reward_NM: FloatArray) -> dict[str, Any]:
    """Whether win probabilities mean what they say, over all pairs of responses to a prompt.

    ``pairwise_log_loss`` is the training loss on these prompts. ``pairwise_ece`` is the mean distance of
    predicted from observed over 15 bins of equal size. Each pair counts in both orders, so the curve is
    symmetric; a tie is half a win. Pairs with one prediction stay in one bin: splitting them would compare
    noise.
    """
    mask_NM = ~np.isnan(reward_NM)
    log_loss = pairwise_loss(*(torch.from_numpy(array) for array in (strengths_NM, reward_NM, mask_NM)))
    first, second = np.triu_indices(strengths_NM.shape[1], k=1)
    present = mask_NM[:, first] & mask_NM[:, second]
    difference = (strengths_NM[:, first] - strengths_NM[:, second])[present]
    outcome = (1 + np.sign(reward_NM[:, first] - reward_NM[:, second]))[present] / 2
    observed = np.concatenate([outcome, 1 - outcome])
    predicted = np.exp(-np.logaddexp(0.0, np.concatenate([-difference, difference])))
    order = np.argsort(predicted, kind="stable")
    edges = predicted[order][np.arange(1, N_BINS) * len(order) // N_BINS]
    bin_of = np.searchsorted(edges, predicted, side="right")
    bins = [
        {
            "predicted": float(predicted[own].mean()),
            "observed": float(observed[own].mean()),
            "n": int(own.sum()),
        }
        for own in (bin_of == number for number in np.unique(bin_of))
    ]
    ece = sum(cell["n"] * abs(cell["predicted"] - cell["observed"]) for cell in bins) / len(predicted)
    return {"pairwise_ece": float(ece), "pairwise_log_loss": float(log_loss), "bins": bins}

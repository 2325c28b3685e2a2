"""The router in training: four heads on the same frozen features, and how they are fitted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_model.bradley_terry import compare, loss_of_pairs
from router_model.errors import RouterError, TableError
from router_model.heads import HEADS, Design, Head, HeadFit, fit_head, prepare
from router_model.reward import Normalization, mix_reward
from router_model.table import ScoreTable

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Bounds of the spread of out-of-fold strengths, in logits: a noise-free ranking has no finite best
# temperature.
MIN_SPREAD, MAX_SPREAD = 1e-3, 10.0


@dataclass(frozen=True, slots=True)
class TeacherSummary:
    """One column of the router: a teacher and its means over its present training cells."""

    id: str
    family: str | None
    size_b: float | None
    mean_quality: float
    mean_learnability: float | None
    mean_reward: float
    mean_n_tokens: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What the router expects of each teacher for each prompt, BM float64."""

    strengths_BM: FloatArray
    """Bradley-Terry logits, centred over the teachers."""
    quality_BM: FloatArray
    """On the raw scale of the table."""
    learnability_BM: FloatArray
    """Nats per response token; NaN if the router was trained without learnability."""
    expected_reward_BM: FloatArray
    """Mixed reward, on the normalised scale."""


@dataclass(frozen=True, slots=True, eq=False)
class RouterModel:
    """A strength head that chooses, and three ridge heads that explain.

    Strengths of a ``bt`` head are logits already; those of ``constant`` and ``ridge`` are predicted rewards.
    Each is multiplied by the inverse temperature at which the pairwise log-loss of its out-of-fold
    predictions is least, so that ``softmax(strengths)`` means the same for every head.
    """

    teachers: tuple[TeacherSummary, ...]
    alpha: float
    normalization: Normalization
    strength: Head
    reward: Head
    quality: Head
    learnability: Head | None
    facts: Mapping[str, Any]
    """Hyper-parameters and cross-validation numbers of the heads, ready for JSON."""

    def predict(self, features_BD: NDArray[np.float32]) -> Predictions:
        """Strengths and expectations for a batch of encoded prompts."""
        quality_BM = self.quality.predict(features_BD)
        absent_BM = np.full_like(quality_BM, np.nan)
        return Predictions(
            strengths_BM=self.strength.predict(features_BD),
            quality_BM=quality_BM,
            learnability_BM=absent_BM
            if self.learnability is None
            else self.learnability.predict(features_BD),
            expected_reward_BM=self.reward.predict(features_BD),
        )


def fit_router(
    features_ND: NDArray[np.float32],
    table: ScoreTable,
    *,
    alpha: float,
    normalization: Normalization = "minmax",
    head_kind: str = "auto",
    seed: int = 0,
) -> RouterModel:
    """Train a router on every prompt of a table. Hold prompts out before, with ``table.select``.

    The expected reward has a ridge head of its own on the mixed reward. A mix of the quality and learnability
    predictions would not be the same: rewards are normalised within the prompt before they are mixed.

    Args:
        features_ND: The backbone's features of ``table.prompts``, in that order.
        table: At least two teachers, each with at least one present cell.
        alpha: Weight of learnability in the reward, in [0, 1].
        head_kind: ``auto`` or a key of ``HEADS``.
        seed: Draws the cross-validation folds; the same seed gives the same router.

    Raises:
        TableError: Too few teachers, or a teacher without a response.
        RouterError: alpha, normalisation, head or features do not fit.
    """
    _require_trainable(features_ND, table)
    reward_NM = mix_reward(
        table.quality_NM, table.learnability_NM, table.mask_NM, alpha=alpha, normalization=normalization
    )
    kept_N = table.mask_NM.any(axis=1)
    mask_NM, design = table.mask_NM[kept_N], prepare(features_ND[kept_N], seed=seed)
    strength = fit_head(head_kind, design, reward_NM[kept_N], mask_NM)
    factor = _inverse_temperature(strength, reward_NM[kept_N], mask_NM)
    explaining = {"reward": reward_NM, "quality": table.quality_NM, "learnability": table.learnability_NM}
    fits = {
        name: HEADS["ridge"].fit(design, values_NM[kept_N], mask_NM, "squared_error")
        for name, values_NM in explaining.items()
        if values_NM is not None
    }
    return RouterModel(
        teachers=_summarise(table, reward_NM),
        alpha=alpha,
        normalization=normalization,
        strength=strength.head.scaled(factor),
        reward=fits["reward"].head,
        quality=fits["quality"].head,
        learnability=fits["learnability"].head if "learnability" in fits else None,
        facts=_facts(design, strength, fits, head_kind=head_kind, seed=seed, factor=factor),
    )


def _require_trainable(features_ND: NDArray[np.float32], table: ScoreTable) -> None:
    """Refuse what no router can be trained on, before any work is done."""
    if table.n_teachers < 2:
        raise TableError(
            table.source, f"has {table.n_teachers} teacher(s); a router needs at least two teachers"
        )
    if not table.mask_NM.any():
        raise TableError(table.source, "has no prompt to train on")
    n_cells_M = table.mask_NM.sum(axis=0)
    empty = [name for name, n_cells in zip(table.teachers, n_cells_M.tolist(), strict=True) if not n_cells]
    if empty:
        reason = f"teacher {empty[0]!r} has no response among the training prompts; leave it out of the table"
        raise TableError(table.source, reason)
    if features_ND.ndim != 2 or len(features_ND) != table.n_prompts:
        raise RouterError(f"features have shape {features_ND.shape}, expected ({table.n_prompts}, width)")
    if not np.isfinite(features_ND).all():
        raise RouterError("features hold NaN or infinity: the backbone's output cannot be used")


def _summarise(table: ScoreTable, reward_NM: FloatArray) -> tuple[TeacherSummary, ...]:
    """The teachers in column order with their means over present cells."""

    def mean(values_NM: FloatArray | None, column: int) -> float | None:
        known = [] if values_NM is None else values_NM[~np.isnan(values_NM[:, column]), column]
        return float(np.mean(known)) if len(known) else None

    def present_mean(values_NM: FloatArray, column: int) -> float:
        return float(values_NM[table.mask_NM[:, column], column].mean())

    return tuple(
        TeacherSummary(
            id=teacher,
            family=table.families.get(teacher),
            size_b=table.sizes_b.get(teacher),
            mean_quality=present_mean(table.quality_NM, column),
            mean_learnability=mean(table.learnability_NM, column),
            mean_reward=present_mean(reward_NM, column),
            mean_n_tokens=mean(table.n_tokens_NM, column),
        )
        for column, teacher in enumerate(table.teachers)
    )


def _inverse_temperature(fit: HeadFit, rewards_NM: FloatArray, mask_NM: BoolArray) -> float:
    """The factor that makes out-of-fold predictions the best calibrated strengths.

    The loss is convex in the factor, so a golden-section search over its logarithm finds the minimum. Without
    folds, or if all predictions are equal, there is nothing to fit and the factor is 1.
    """
    if fit.out_of_fold_NM is None:
        return 1.0
    centred_NM = fit.out_of_fold_NM - fit.out_of_fold_NM.mean(axis=1, keepdims=True)
    spread = float(np.sqrt((centred_NM**2).mean()))
    if spread < 1e-12:
        return 1.0
    predicted = torch.from_numpy(centred_NM)
    pairs = compare(torch.from_numpy(rewards_NM), torch.from_numpy(mask_NM))

    def loss(log_factor: float) -> float:
        with torch.no_grad():
            return float(loss_of_pairs(predicted * math.exp(log_factor), pairs))

    low, high = math.log(MIN_SPREAD / spread), math.log(MAX_SPREAD / spread)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2.0)


def _facts(
    design: Design,
    strength: HeadFit,
    fits: Mapping[str, HeadFit],
    *,
    head_kind: str,
    seed: int,
    factor: float,
) -> dict[str, Any]:
    """What the manifest records about how the heads came to be."""
    return {
        "requested": head_kind,
        "seed": seed,
        "n_folds": len(design.folds),
        "strength": dict(strength.facts),
        "inverse_temperature": factor,
        **{name: dict(fit.facts) for name, fit in fits.items()},
    }

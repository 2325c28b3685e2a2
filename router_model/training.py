"""Training on frozen features: quality and learnability apart, or the paper's one mixed reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.alpha_calibration import COVERAGE, calibrate, calibrate_gated
from router_model.design import Design, prepare, project
from router_model.errors import RouterError, TableError
from router_model.fitting import FITS, HeadFit, fit_constant, fit_head
from router_model.heads import Head, nearest, squared_distances
from router_model.label_curve import label_curve
from router_model.model import Novelty, PartHeads, RouterModel, TeacherSummary
from router_model.objective_fit import fit_objective
from router_model.objectives import OBJECTIVES
from router_model.outlook import ALPHAS, AlphaCalibration, Parts
from router_model.part_fits import PartFits, TrainingData, choose_head, fit_part_ridges
from router_model.reward import Normalization
from router_model.table import ScoreTable
from router_model.top_fit import join_tops
from router_model.unseen import FOLDS_FACT, fold_of_prompt

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

HEAD_KINDS = ("auto", *FITS, *OBJECTIVES)

_NOVELTY_AXES, _NOVELTY_K, _NOVELTY_QUANTILE = 32, 10, 0.99
_PAPER_L2 = (100.0, 10.0, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class TunedHead:
    """A head that was trained together with its backbone."""

    head: Head
    held_out: NDArray[np.int64]
    """Prompts of the table that it did not see: what it is calibrated on."""
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class LentQuality:
    """Quality heads of another router, in place of fitting some."""

    fit: HeadFit
    """With predictions of the table's prompts by heads that did not see them."""
    raw: Head


def fit_router(
    features_ND: NDArray[np.float32],
    table: ScoreTable,
    *,
    alpha: float,
    normalization: Normalization = "minmax",
    head_kind: str = "auto",
    seed: int = 0,
    widths: Sequence[int] | None = None,
    tuned: TunedHead | None = None,
    lent: LentQuality | None = None,
) -> RouterModel:
    """Train a router on every prompt of a table. Hold prompts out before, with ``table.select``.

    A kind that predicts rewards has one head for quality and one for learnability, both normalised within the
    prompt; they are mixed when they are asked, so any alpha can be. The name of an objective gives the
    paper's way: one head of Bradley-Terry strengths, or of its rivals, on the reward mixed at ``alpha``.

    Args:
        features_ND: The backbone's features of ``table.prompts``, in that order.
        table: At least two teachers, each with at least one present cell.
        alpha: Weight of learnability in the reward, in [0, 1].
        head_kind: One of ``HEAD_KINDS``. ``auto`` predicts rewards by ridge regression, or by one of
            ``part_fits.AUTO_RIVALS`` (or a blend) that has less held-out regret by more than a standard
            error, and beside it which teacher is the best; it falls back to the best single teacher at every
            alpha at which that is not clearly better.
        seed: Draws the cross-validation folds; the same seed gives the same router.
        widths: Features of each view, if there are several.
        tuned: A head that was trained with its backbone, in place of fitting one; ``head_kind`` names its
            objective.
        lent: Quality heads of another router (``donor.QualityDonor``); then learnability alone is fitted.

    Raises:
        TableError: Too few teachers, or a teacher without a response.
        RouterError: alpha, normalisation, head or features do not fit.
    """
    require_trainable(table, alpha=alpha)
    _require_features(features_ND, table)
    if head_kind not in HEAD_KINDS:
        raise RouterError(f"unknown head {head_kind!r}: expected one of {list(HEAD_KINDS)}")
    rewards = _rewards(table, alpha, normalization)
    kept_N: BoolArray = np.asarray(table.mask_NM.any(axis=1))
    design = prepare(features_ND[kept_N], seed=seed, widths=widths)
    data = _training_data(design, table, rewards, kept_N, lent)
    fitted = _fit_heads(data, alpha, head_kind, tuned)
    fits, fixed = fitted.fits, fitted.fixed
    calibration = (
        _calibrations(data, fits, fixed, alpha, gated=head_kind == "auto")
        if tuned is None
        else (_tuned_calibration(tuned, features_ND, rewards.mixed_NM, table.mask_NM, alpha),)
    )
    return RouterModel(
        teachers=_summarise(table, rewards),
        alpha=alpha,
        normalization=normalization,
        mode="parts" if fixed is None else "paper",
        kind=fitted.kind,
        chosen=_chosen(fits, fixed),
        members=_members(fits, fixed),
        member_means=_member_means(data),
        quality=fitted.ridges["raw_quality"].head if lent is None else lent.raw,
        learnability=fitted.ridges["raw_learnability"].head if "raw_learnability" in fitted.ridges else None,
        calibration=calibration,
        coverage=COVERAGE,
        novelty=_novelty(design),
        top_alphas=() if fits.top is None else fits.top.alphas,
        baselines=_baselines(data, alpha),
        facts={
            "requested": head_kind,
            "seed": seed,
            **_facts(fitted, data, alpha),
            FOLDS_FACT: fold_of_prompt(design, kept_N),
        },
    )


@dataclass(frozen=True, slots=True, eq=False)
class _FittedHeads:
    """All heads of a router, and why they are of their kind."""

    kind: str
    fits: PartFits
    fixed: HeadFit | None
    """Strengths at the training alpha alone, by an objective: the paper's way."""
    ridges: Mapping[str, HeadFit]
    reasons: Mapping[str, Any]


def _fit_heads(data: TrainingData, alpha: float, head_kind: str, tuned: TunedHead | None) -> _FittedHeads:
    by_objective = head_kind in OBJECTIVES
    tops = data.tops(alpha) if head_kind == "auto" else {}
    ridges = fit_part_ridges(data, tops)
    kind, fits, reasons = choose_head("ridge" if by_objective else head_kind, data, alpha, ridges)
    if tops:
        fits = replace(fits, top=join_tops(data.design, ridges, tops, data.mask_NM))
    if tuned is not None:
        fixed = HeadFit(tuned.head, None, None, (), tuned.facts)
    elif by_objective:
        fixed = fit_objective(head_kind, data.design, data.mixed(alpha), data.mask_NM)
    else:
        return _FittedHeads(kind, fits, None, ridges, reasons)
    return _FittedHeads(head_kind, fits, fixed, ridges, reasons)


def _facts(fitted: _FittedHeads, data: TrainingData, alpha: float) -> dict[str, Any]:
    """Hyper-parameters, cross-validation numbers and the label curve."""
    design = data.design
    return {
        "n_folds": design.n_folds,
        "n_partitions": len(design.folds) // max(design.n_folds, 1),
        **fitted.reasons,
        **fitted.fits.facts(),
        **({"strength": dict(fitted.fixed.facts)} if fitted.fixed is not None else {}),
        "label_curve": label_curve(design, data.quality_NM, data.learnability_NM, data.mask_NM, alpha),
    }


def _kept(lent: HeadFit, kept_N: BoolArray, design: Design) -> HeadFit:
    """Lent heads with the predictions of the prompts that are trained on, and one member per fold at most."""

    def kept(values_NM: FloatArray | None) -> FloatArray | None:
        return None if values_NM is None or not design.folds else values_NM[kept_N]

    return replace(
        lent,
        out_of_fold_NM=kept(lent.out_of_fold_NM),
        means_NM=kept(lent.means_NM),
        members=lent.members[: design.n_folds],
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Rewards:
    """Rewards of a whole table, normalised within the prompt."""

    mixed_NM: FloatArray
    """At the training alpha."""
    quality_NM: FloatArray
    learnability_NM: FloatArray | None


def _rewards(table: ScoreTable, alpha: float, normalization: Normalization) -> _Rewards:
    return _Rewards(
        table.rewards(alpha, normalization),
        table.rewards(0.0, normalization),
        None if table.learnability_NM is None else table.rewards(1.0, normalization),
    )


def _training_data(
    design: Design, table: ScoreTable, rewards: _Rewards, kept_N: BoolArray, lent: LentQuality | None
) -> TrainingData:
    """The prompts that have a response, in the rows of ``design``."""
    kept = table.select(kept_N)
    learnability_NM = rewards.learnability_NM
    return TrainingData(
        design,
        kept.mask_NM,
        rewards.quality_NM[kept_N],
        None if learnability_NM is None else learnability_NM[kept_N],
        kept.quality_NM,
        kept.learnability_NM,
        None if lent is None else _kept(lent.fit, kept_N, design),
    )


def _calibrations(
    data: TrainingData, fits: PartFits, fixed: HeadFit | None, alpha: float, *, gated: bool
) -> tuple[AlphaCalibration, ...]:
    """At the training alpha, and at the others where learnability is known and the head serves them."""
    if fixed is not None:
        return (calibrate(alpha, fixed.out_of_fold_NM, data.mixed(alpha), data.mask_NM),)
    alphas = (alpha,) if data.learnability_NM is None else tuple(sorted({*ALPHAS, alpha}))
    held = {at: fits.held_out(at) for at in alphas}
    return tuple(
        calibrate_gated(at, own, data.mixed(at), data.mask_NM)
        if gated
        else calibrate(at, None if own is None else own.strengths_NM, data.mixed(at), data.mask_NM)
        for at, own in held.items()
    )


def _tuned_calibration(
    tuned: TunedHead,
    features_ND: NDArray[np.float32],
    reward_NM: FloatArray,
    mask_NM: BoolArray,
    alpha: float,
) -> AlphaCalibration:
    rows = tuned.held_out
    predicted_NM = tuned.head.predict(features_ND[rows])
    return calibrate(alpha, predicted_NM, reward_NM[rows], mask_NM[rows])


def _chosen(fits: PartFits, fixed: HeadFit | None) -> PartHeads:
    return PartHeads(
        fits.quality.head,
        None if fits.learnability is None else fits.learnability.head,
        None if fixed is None else fixed.head,
        None if fits.top is None else fits.top.head,
    )


def _members(fits: PartFits, fixed: HeadFit | None) -> tuple[PartHeads, ...]:
    return tuple(
        PartHeads(
            member,
            None if fits.learnability is None else fits.learnability.members[index],
            None if fixed is None or not fixed.members else fixed.members[index],
            None if fits.top is None else fits.top.members[index],
        )
        for index, member in enumerate(fits.quality.members)
    )


def _member_means(data: TrainingData) -> Parts:
    """Each fold's means of the teachers, by part."""

    def means(values_NM: FloatArray) -> FloatArray:
        nothing = np.zeros((1, 0), dtype=np.float32)
        members = fit_constant(data.design, values_NM, data.mask_NM).members
        rows = [member.predict(nothing)[0] for member in members]
        return np.stack(rows) if rows else np.zeros((0, values_NM.shape[1]))

    learnability_NM = data.learnability_NM
    return Parts(means(data.quality_NM), None if learnability_NM is None else means(learnability_NM))


def _novelty(design: Design) -> Novelty:
    """Distances among the training prompts, on whitened axes; the threshold leaves one in a hundred out."""
    projection = project(design.spectrum(), _NOVELTY_AXES, whiten=True)
    points_NK = projection(design.features_ND)
    if len(points_NK) <= _NOVELTY_K + 1:
        return Novelty(projection, points_NK, _NOVELTY_K, float("inf"))
    distances_NN = squared_distances(points_NK, points_NK)
    # A training prompt is its own nearest, so it takes one more.
    index_NK = nearest(distances_NN, _NOVELTY_K + 1)
    kth_N = np.take_along_axis(distances_NN, index_NK, axis=1).max(axis=1)
    return Novelty(projection, points_NK, _NOVELTY_K, float(np.quantile(kth_N, _NOVELTY_QUANTILE)))


def _baselines(data: TrainingData, alpha: float) -> Mapping[str, Head]:
    """The rivals of a report: neighbours, and the paper's loss with ties coded as losses."""
    reward_NM = data.mixed(alpha)
    paper = fit_objective("paper_bt", data.design, reward_NM, data.mask_NM, grid=_PAPER_L2)
    return {"knn": fit_head("knn", data.design, reward_NM, data.mask_NM).head, "paper_bt": paper.head}


def require_trainable(table: ScoreTable, *, alpha: float) -> None:
    """Refuse a table that no router can be trained on. It takes no time, so do it before prompts are encoded.

    Raises:
        TableError: Fewer than two teachers, no prompt with two responses, a teacher without a response, or
            no learnability although ``alpha`` is above 0.
    """
    if table.n_teachers < 2:
        raise TableError(
            table.source,
            f"has {table.n_teachers} teacher(s); a router needs at least two teachers: add the responses of "
            "another to the same prompts",
        )
    if not table.mask_NM.any():
        raise TableError(table.source, "has no prompt to train on")
    n_cells_M = table.mask_NM.sum(axis=0)
    empty = [name for name, n_cells in zip(table.teachers, n_cells_M.tolist(), strict=True) if not n_cells]
    if empty:
        reason = f"teacher {empty[0]!r} has no response among the training prompts; leave it out of the table"
        raise TableError(table.source, reason)
    if not (table.mask_NM.sum(axis=1) > 1).any():
        reason = "no training prompt has responses of two teachers, so none can be compared; add responses"
        raise TableError(table.source, reason)
    if alpha > 0 and table.learnability_NM is None:
        raise TableError(
            table.source,
            f"has no learnability, but alpha is {alpha:g}: score the responses under the student first, or "
            "train with alpha 0",
        )


def _require_features(features_ND: NDArray[np.float32], table: ScoreTable) -> None:
    if features_ND.ndim != 2 or len(features_ND) != table.n_prompts:
        raise RouterError(f"features have shape {features_ND.shape}, expected ({table.n_prompts}, width)")
    if not np.isfinite(features_ND).all():
        raise RouterError("features hold NaN or infinity: the backbone's output cannot be used")


def _summarise(table: ScoreTable, rewards: _Rewards) -> tuple[TeacherSummary, ...]:
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
            mean_reward=present_mean(rewards.mixed_NM, column),
            mean_quality_part=present_mean(rewards.quality_NM, column),
            mean_learnability_part=mean(rewards.learnability_NM, column),
            mean_n_tokens=mean(table.n_tokens_NM, column),
        )
        for column, teacher in enumerate(table.teachers)
    )

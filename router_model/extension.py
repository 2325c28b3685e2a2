"""A router with more teachers: their columns from a few probe prompts, nothing else trained again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.column_fit import Column, Probes, fit_column
from router_model.head_columns import with_block_columns, with_column, without_gaps
from router_model.heads import FeatureArray, Head
from router_model.model import PartHeads, RouterModel, TeacherSummary
from router_model.outlook import Parts
from router_model.probe_answers import ProbeAnswers, Values, probe_answers, require_extendable
from router_model.table import ScoreTable
from router_model.top_fit import top_targets
from router_model.unseen import NO_MEMBER, Unseen, nobody, predict_unseen

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

EXTENSIONS_FACT = "extensions"
"""Among a model's facts: the teachers that were added, from how many probes, and how."""
_REWARD_BASELINES = ("knn",)
"""Rivals that predict the reward. The paper's strengths have a scale of their own, so they are left out."""


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """A new teacher's column of one target, and the same without each fold of the probes."""

    whole: Column
    members: tuple[Column, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _NewTeacher:
    """Everything that is learnt of a new teacher."""

    answers: ProbeAnswers
    quality: _Fit
    learnability: _Fit | None
    raw_quality: _Fit
    raw_learnability: _Fit | None
    tops: tuple[_Fit, ...]
    """Of which teacher is the best, one for each of the router's alphas."""
    baselines: Mapping[str, Column]


def extend_model(
    model: RouterModel,
    features_ND: FeatureArray,
    table: ScoreTable,
    teachers: Sequence[str],
    *,
    unseen: Unseen | None = None,
) -> RouterModel:
    """Add teachers to a router. The heads' columns of the known teachers keep every bit.

    Each new teacher gets a column in every head by ``column_fit``, on the scale that the known teachers span
    (``known_scale``); and in each member of the ensemble the same without a part of the probes, so that the
    doubt about a decision knows how few they were. Where the probes tell nothing the column is a constant.
    Calibration is kept: temperature and conformal width are those of the known teachers.

    Args:
        features_ND: The backbone's features of ``table.prompts``.
        table: Answers of the new teachers and of known ones to the same prompts. Others are ignored.
        teachers: Ids of the new ones, in the order of their columns.
        unseen: Members that have not seen the prompts; None where nothing is known of that.

    Raises:
        RouterError: The router has one head on the mixed reward, or knows a teacher already.
        TableError: A teacher is absent or has too few probes, known ones are, or learnability is missing.
    """
    require_extendable(model, table, teachers)
    unseen = unseen or nobody(table.n_prompts)
    probes = [probe_answers(model, table, teacher) for teacher in teachers]
    # All are fitted beside the known teachers, so the order in which they are named does not matter.
    fitted = [
        _fit_teacher(model, features_ND[answers.rows_K], answers, unseen.rows(answers.rows_K))
        for answers in probes
    ]
    extended = model
    for new in fitted:
        extended = _with_teacher(extended, new, table)
    return extended


def _fit_teacher(
    model: RouterModel, features_KD: FeatureArray, answers: ProbeAnswers, unseen: Unseen
) -> _NewTeacher:
    """The new teacher's column in every head."""

    def fit(
        head: Head,
        values: Values,
        mean: str,
        members: Sequence[Head | None] = (),
        member_K: IndexArray = unseen.quality_N,
    ) -> _Fit:
        """By predictions for the known teachers, whose summaries call their means ``mean``."""
        known = [without_gaps(member) for member in members if member is not None]
        predicted_KM = predict_unseen(without_gaps(head), known, features_KD, member_K)
        center_M = np.array([getattr(teacher, mean) for teacher in model.teachers], dtype=np.float64)
        return _fit_folds(_probes(predicted_KM, values, center_M), len(known), member_K)

    chosen, members = model.chosen, model.members
    quality, learnability = answers.quality.scaled(model.normalization), None
    fit_of_learnability = raw_learnability = None
    if (
        answers.learnability is not None
        and chosen.learnability is not None
        and model.learnability is not None
    ):
        learnability = answers.learnability.scaled(model.normalization)
        own = [member.learnability for member in members]
        fit_of_learnability = fit(
            chosen.learnability, learnability, "mean_learnability_part", own, unseen.learnability_N
        )
        raw_learnability = fit(model.learnability, answers.learnability, "mean_learnability")
    reward = quality.mixed(learnability, model.alpha)
    return _NewTeacher(
        answers,
        fit(chosen.quality, quality, "mean_quality_part", [member.quality for member in members]),
        fit_of_learnability,
        fit(model.quality, answers.quality, "mean_quality"),
        raw_learnability,
        _fit_tops(model, features_KD, quality, learnability, unseen),
        {
            name: fit(head, reward, "mean_reward").whole
            for name, head in model.baselines.items()
            if name in _REWARD_BASELINES
        },
    )


def _fit_tops(
    model: RouterModel,
    features_KD: FeatureArray,
    quality: Values,
    learnability: Values | None,
    unseen: Unseen,
) -> tuple[_Fit, ...]:
    """By what is predicted of the known teachers: deviations, so the new ones' means count no more either."""
    if model.chosen.top is None:
        return ()
    members = [member.top for member in model.members if member.top is not None]
    n_known, fits = len(model.teachers), []
    predicted_KC = predict_unseen(model.chosen.top, members, features_KD, unseen.learnability_N)
    for index, alpha in enumerate(model.top_alphas):
        reward = quality.mixed(learnability, alpha)
        reward_KM = np.column_stack([reward.known_KM, reward.new_K])
        target_K = top_targets(reward_KM, ~np.isnan(reward_KM))[:, -1]
        known_KM = predicted_KC[:, index * n_known : (index + 1) * n_known]
        # Over the teachers the targets have no surprise in common: one is the best where another is not.
        probes = Probes(known_KM, np.zeros(len(target_K)), target_K, np.zeros(n_known))
        fit = _fit_folds(probes, len(members), unseen.learnability_N)
        deviations = tuple(replace(column, mean=0.0) for column in (fit.whole, *fit.members))
        fits.append(_Fit(deviations[0], deviations[1:]))
    return tuple(fits)


def _probes(predicted_KM: FloatArray, values: Values, center_M: FloatArray) -> Probes:
    return Probes(predicted_KM, np.nanmean(values.known_KM - predicted_KM, axis=1), values.new_K, center_M)


def _fit_folds(probes: Probes, n_folds: int, member_K: IndexArray) -> _Fit:
    """With all probes, and with each fold left out, at the same L2.

    A member that has not seen a prompt does not see it as a probe either; other probes are dealt out.
    """
    whole, fold_K = fit_column(probes), member_K.copy()
    dealt = np.random.default_rng(0).permutation(np.flatnonzero(member_K == NO_MEMBER))
    fold_K[dealt] = np.arange(len(dealt)) % max(n_folds, 1)
    kept = [np.flatnonzero(fold_K != fold) for fold in range(n_folds)]
    # A fold that holds every probe leaves nothing to fit: its member has the column of all.
    members = [fit_column(probes.rows(rows), whole.l2) if len(rows) else whole for rows in kept]
    return _Fit(whole, tuple(members))


def _with_teacher(model: RouterModel, new: _NewTeacher, table: ScoreTable) -> RouterModel:
    """The router with one column more."""
    learnability = new.learnability
    return replace(
        model,
        teachers=(*model.teachers, _summary(new, table, model.alpha)),
        chosen=_with_columns(
            model.chosen,
            new.quality.whole,
            None if learnability is None else learnability.whole,
            [fit.whole for fit in new.tops],
        ),
        members=tuple(
            _with_columns(
                member,
                new.quality.members[index],
                None if learnability is None else learnability.members[index],
                [fit.members[index] for fit in new.tops],
            )
            for index, member in enumerate(model.members)
        ),
        member_means=Parts(
            _with_means(model.member_means.quality, new.quality),
            None
            if model.member_means.learnability is None or learnability is None
            else _with_means(model.member_means.learnability, learnability),
        ),
        quality=_with(model.quality, new.raw_quality.whole),
        learnability=None
        if model.learnability is None or new.raw_learnability is None
        else _with(model.learnability, new.raw_learnability.whole),
        baselines={name: _with(model.baselines[name], column) for name, column in new.baselines.items()},
        facts={
            **model.facts,
            EXTENSIONS_FACT: [*model.facts.get(EXTENSIONS_FACT, ()), _facts(new)],
        },
    )


def _with_columns(
    heads: PartHeads, quality: Column, learnability: Column | None, tops: Sequence[Column]
) -> PartHeads:
    return PartHeads(
        _with(heads.quality, quality),
        None
        if heads.learnability is None or learnability is None
        else _with(heads.learnability, learnability),
        top=None if heads.top is None else _with_tops(heads.top, tops),
    )


def _with_tops(head: Head, tops: Sequence[Column]) -> Head:
    weights_AM = np.stack([column.weight_M for column in tops])
    return with_block_columns(head, weights_AM, np.array([column.bias for column in tops]))


def _with(head: Head, column: Column) -> Head:
    return with_column(head, column.weight_M, column.bias)


def _with_means(means_EM: FloatArray, fit: _Fit) -> FloatArray:
    new_E1 = np.array([column.mean for column in fit.members]).reshape(-1, 1)
    return np.hstack([means_EM, new_E1])


def _summary(new: _NewTeacher, table: ScoreTable, alpha: float) -> TeacherSummary:
    """The new teacher's means over the training prompts, as far as its probes tell."""
    quality, learnability = new.quality.whole.mean, None
    if new.learnability is not None:
        learnability = new.learnability.whole.mean
    return TeacherSummary(
        id=new.answers.teacher,
        family=table.families.get(new.answers.teacher),
        size_b=table.sizes_b.get(new.answers.teacher),
        mean_quality=new.raw_quality.whole.mean,
        mean_learnability=None if new.raw_learnability is None else new.raw_learnability.whole.mean,
        mean_reward=quality if learnability is None else (1.0 - alpha) * quality + alpha * learnability,
        mean_quality_part=quality,
        mean_learnability_part=learnability,
        mean_n_tokens=new.answers.mean_n_tokens,
    )


def _facts(new: _NewTeacher) -> dict[str, Any]:
    """For the manifest. An ``l2`` of null means a constant column."""
    parts = {"quality": new.quality, "learnability": new.learnability}
    l2 = {name: fit.whole.l2 for name, fit in parts.items() if fit is not None}
    return {
        "teacher": new.answers.teacher,
        "n_probes": len(new.answers.rows_K),
        "l2": {name: None if math.isinf(value) else value for name, value in l2.items()},
    }

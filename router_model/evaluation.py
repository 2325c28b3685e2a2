"""How good a router's choices are on prompts it has not seen, next to the choices that need no router."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.alpha_calibration import MIN_PROMPTS_TO_ROUTE
from router_model.alpha_curve import alpha_points
from router_model.calibration import conformal_coverage, pairwise_calibration
from router_model.checkpoint import Manifest
from router_model.choices import all_choices, expected, facts, versus
from router_model.evaluation_set import EvaluationSet
from router_model.gap import Contest, gaps_closed
from router_model.learning_curve import advise
from router_model.outlook import Outlook, RouterOutput

FloatArray = NDArray[np.float64]

HELPS = "routing helps"
HELPS_NOT = "routing does not help here: use best_single"
MIN_PROMPTS_FOR_VERDICT = 10
"""Of fewer prompts, the resamples differ too little for their interval to be one."""


def evaluate(
    output: RouterOutput,
    held: EvaluationSet,
    manifest: Manifest,
    *,
    baselines: Mapping[str, FloatArray] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The report of a router, ready for JSON.

    A method that would choose a teacher without a response takes the next one of its own ranking.

    Args:
        output: The router's output for the prompts of ``held``, in their order.
        baselines: Strengths of heads that the router is compared with, for the same prompts and in the
            columns of the checkpoint, by the name of their method.
        seed: Of the bootstrap.
    """
    outlook = output.at()
    strengths_NM = outlook.strengths_BM[:, held.columns]
    methods, notes, curve = _judged(
        output, strengths_NM, held, manifest, baselines=baselines or {}, seed=seed
    )
    calibration = pairwise_calibration(strengths_NM, held.reward_NM)
    label_curve = list(manifest.facts.get("label_curve") or [])
    low = methods["persyn"]["gap_closed"]["ci95"]
    n_prompts = held.table.n_prompts
    enough = n_prompts >= MIN_PROMPTS_FOR_VERDICT
    helps = outlook.helps and enough and low is not None and low[0] > 0
    remarks = [] if outlook.helps else [fallen_back_because(manifest.training.n_prompts)]
    if not enough:
        remarks.append(
            f"{n_prompts} held-out prompts are too few to say that routing helps; "
            f"{MIN_PROMPTS_FOR_VERDICT} are needed, and some hundreds give a narrow interval"
        )
    return {
        "n_prompts": n_prompts,
        "n_teachers": held.table.n_teachers,
        "alpha": manifest.alpha,
        "learnability": manifest.learnability,
        "checkpoint_id": manifest.checkpoint_id,
        "student": manifest.student.id,
        "head": manifest.head,
        "n_training_prompts": manifest.training.n_prompts,
        "methods": methods,
        "calibration": {
            name: calibration[name] for name in ("pairwise_ece", "pairwise_log_loss", "pairwise_accuracy")
        },
        "reliability": calibration["bins"],
        "conformal": _conformal(outlook, strengths_NM, held),
        "out_of_distribution": float(output.out_of_distribution_B.mean()),
        "curves": {"alpha": curve, "labels": label_curve},
        "label_advice": advise(label_curve),
        "verdict": HELPS if helps else HELPS_NOT,
        "fallen_back": not outlook.helps,
        "notes": [*remarks, *held.notes, *notes],
    }


def fallen_back_because(n_training_prompts: int) -> str:
    """That a router has fallen back, and why."""
    few = f"{n_training_prompts} training prompts cannot show a gain, {MIN_PROMPTS_TO_ROUTE} are needed"
    reason = few if n_training_prompts < MIN_PROMPTS_TO_ROUTE else "cross-validation found no clear gain"
    return f"the router has fallen back to the best single teacher: {reason}"


def _judged(
    output: RouterOutput,
    strengths_NM: FloatArray,
    held: EvaluationSet,
    manifest: Manifest,
    *,
    baselines: Mapping[str, FloatArray],
    seed: int,
) -> tuple[dict[str, dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Each method's part of the report, notes, and the curve over alpha, from one bootstrap."""
    baselines_NM = {name: strengths_BM[:, held.columns] for name, strengths_BM in baselines.items()}
    choices_of, notes = all_choices(strengths_NM, baselines_NM, held, manifest)
    values = {name: expected(choices.odds_NM, held.reward_NM) for name, choices in choices_of.items()}
    best_N, oracle_N = values["best_single"], values["oracle"]
    points = alpha_points(output, held, manifest)
    gaps = gaps_closed(
        [
            *(Contest(value_N, best_N, oracle_N) for value_N in values.values()),
            *(point.contest for point in points),
        ],
        seed=seed,
    )
    methods = {
        name: {
            **facts(choices, held),
            "regret": float((oracle_N - values[name]).mean()),
            "gap_closed": gap,
            "versus_best_single": versus(choices, choices_of["best_single"], held.reward_NM),
        }
        for (name, choices), gap in zip(choices_of.items(), gaps[: len(choices_of)], strict=True)
    }
    curve = [
        {**point.facts, "gap_closed": gap} for point, gap in zip(points, gaps[len(choices_of) :], strict=True)
    ]
    if not curve:
        notes.append("there is no curve over alpha: the router or the table knows one alpha only")
    return methods, notes, curve


def _conformal(outlook: Outlook, strengths_NM: FloatArray, held: EvaluationSet) -> dict[str, float] | None:
    """Coverage of the conformal sets, or None if the router was not calibrated for any."""
    if outlook.conformal_width is None or outlook.coverage is None:
        return None
    return conformal_coverage(strengths_NM, held.reward_NM, outlook.conformal_width, outlook.coverage)

"""Stage ``plan``: choose the teachers of a whole corpus, under a budget and shares where they are given."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.errors import UnknownTeacherError
from clients.types import Price, Prompt, RoutingDecision, Strategy
from router_model.answer_cost import expected_cost_usd, teachers_of_unknown_cost, unknown_cost
from router_model.assignment import CorpusAssignment, Limits, assign
from router_model.checkpoint import Manifest
from router_model.errors import PipelineError
from router_model.inference import Router
from router_model.pipeline.artifacts import locked_folder
from router_model.pipeline.config import ProjectFile
from router_model.pipeline.corpus_plan import ASSIGNMENTS_FILE, PLAN_FILE, prompts_hash, write_plan
from router_model.pipeline.decisions import (
    decide_all,
    known_prices,
    require_known_teachers,
    way_of_choosing,
)
from router_model.pipeline.progress import Progress
from router_model.pipeline.prompts import read_prompts
from router_model.pipeline.synthesize import RESPONSES_FILE
from router_model.share_range import ShareRange
from router_model.strategies import RouteOptions, ranking, refusal

FloatArray = NDArray[np.float64]

VALUE_NAMES: Mapping[Strategy, str] = {
    "persyn": "expected reward",
    "best_single": "mean reward",
    "strong": "mean quality",
    "family_strong": "mean quality",
    "car": "compatibility-adjusted reward",
}
"""What a plan under limits makes the most of, by strategy."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How the teachers of a corpus are chosen.

    Args:
        options: Without prices, which the project file states.
        budget_usd: Of the expected cost of all answers.
        shares: Of the prompts, by teacher; one for a teacher at most.

    Raises:
        StrategyError: The budget is no amount, a teacher has two shares, or the options do not fit limits.
    """

    options: RouteOptions
    budget_usd: float | None = None
    shares: Sequence[ShareRange] = ()

    @property
    def has_limits(self) -> bool:
        """Whether there is a budget or a share; without them the strategy chooses prompt by prompt."""
        return self.budget_usd is not None or bool(self.shares)

    def __post_init__(self) -> None:
        """Refuse what would otherwise be ignored without a word."""
        if self.budget_usd is not None and not (math.isfinite(self.budget_usd) and self.budget_usd >= 0):
            raise refusal("budget_usd", f"the budget must be at least 0 US dollars, not {self.budget_usd:g}")
        named = Counter(share.teacher for share in self.shares)
        twice = [teacher for teacher, count in named.items() if count > 1]
        if twice:
            raise refusal(
                "shares", f"more than one share is given for {', '.join(twice)}; state both ends in one"
            )
        if self.has_limits:
            _require_fixed_values(self.options)


def _require_fixed_values(options: RouteOptions) -> None:
    if options.strategy not in VALUE_NAMES:
        raise refusal(
            "strategy",
            f"a budget and shares have no meaning for strategy {options.strategy!r}, which draws by fixed "
            "shares; leave them out, or choose another strategy",
        )
    if options.temperature > 0:
        raise refusal(
            "temperature",
            "a plan under a budget or shares draws nothing at random; leave temperature at 0",
        )
    if options.cost_weight > 0:
        raise refusal(
            "cost_weight",
            "a plan under a budget or shares finds itself what a US dollar is worth; leave cost_weight at 0",
        )


def make_plan(
    project: ProjectFile,
    prompts_path: Path,
    folder: Path,
    settings: PlanSettings,
    *,
    progress: Progress,
    student_id: str | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Choose a teacher for each prompt and write the plan; no teacher is asked.

    Returns:
        What ``plan.json`` says.

    Raises:
        TableError: The prompt file is malformed.
        CheckpointError: The router is missing, or chooses teachers that the project file does not name.
        UnknownTeacherError: A share or an option names a teacher that the router does not know.
        StrategyError: The router cannot serve the options, or not every cost is known and there is a budget.
        InfeasiblePlanError: No plan keeps to the budget and the shares.
        PipelineError: The folder holds a data set.
    """
    student = project.student(student_id)
    specs = project.teacher_specs(with_keys=False)
    prompts = read_prompts(prompts_path)
    with locked_folder(folder):
        is_plan = (folder / ASSIGNMENTS_FILE).exists()
        if (folder / RESPONSES_FILE).exists() or ((folder / PLAN_FILE).exists() and not is_plan):
            raise PipelineError(
                f"{folder}: holds a data set, whose plan.json would be lost; plan to another --out"
            )
        router = Router.load(checkpoint or Path(student.checkpoint), moved_to=project.router.backbone)
        require_known_teachers(router.manifest, specs)
        settings = replace(settings, options=replace(settings.options, prices=known_prices(specs)))
        progress.start("plan", total=len(prompts))
        decisions = decide_all(router, prompts, settings.options, progress=progress.advance)
        progress.finish()
        cost_usd_NM = _costs(router.manifest, settings.options.prices, decisions)
        assignment = None
        if settings.has_limits:
            progress.note("solving for the whole corpus")
            assignment = _assignment(router.manifest, decisions, cost_usd_NM, settings)
            decisions = _reassigned(router.manifest, decisions, assignment)
        costs = _chosen_costs(router.manifest, decisions, cost_usd_NM)
        facts = {
            "student": student.id,
            "checkpoint_id": router.manifest.checkpoint_id,
            **way_of_choosing(router.manifest, settings.options, has_budget=settings.budget_usd is not None),
            **_facts(router.manifest, prompts, decisions, costs, settings),
            **_limit_facts(router.manifest, settings, assignment),
        }
        return write_plan(folder, facts, decisions, costs)


def _costs(
    manifest: Manifest, prices: Mapping[str, Price], decisions: Sequence[RoutingDecision]
) -> FloatArray:
    """Expected costs, NM, US dollars; NaN where none is known."""
    by_length = {
        n_tokens: expected_cost_usd(manifest.teachers, prices, n_tokens)
        for n_tokens in {decision.input_tokens for decision in decisions}
    }
    return np.stack([by_length[decision.input_tokens] for decision in decisions])


def _assignment(
    manifest: Manifest,
    decisions: Sequence[RoutingDecision],
    cost_usd_NM: FloatArray,
    settings: PlanSettings,
) -> CorpusAssignment:
    names = [teacher.id for teacher in manifest.teachers]
    values_NM = _values(manifest, decisions, settings.options)
    allowed_NM = np.isfinite(values_NM)
    if settings.budget_usd is not None:
        unknown_M = (np.isnan(cost_usd_NM) & allowed_NM).any(axis=0)
        if unknown_M.any():
            raise unknown_cost("budget_usd", [names[column] for column in np.flatnonzero(unknown_M)])
    return assign(
        names,
        values_NM,
        allowed_NM,
        _limits(names, len(decisions), settings),
        None if settings.budget_usd is None else cost_usd_NM,
    )


def _values(manifest: Manifest, decisions: Sequence[RoutingDecision], options: RouteOptions) -> FloatArray:
    """What the plan makes the most of, NM; minus infinity where a teacher is no candidate for a prompt.

    For ``persyn`` the expected mixed reward, not the strengths: rewards add up over prompts, and shadow
    prices are then rewards. Where routing does not help, these are the teachers' means. A router that also
    asks which teacher is the best, as ``auto`` does, or has one head on the mixed reward, may rank otherwise
    by its strengths: which teacher is the best does not add up. Other strategies: what they rank by.
    """
    column = {teacher.id: index for index, teacher in enumerate(manifest.teachers)}
    values_NM = np.full((len(decisions), len(column)), -np.inf)
    for row, decision in enumerate(decisions):
        columns = [column[name] for name in decision.distribution]
        if options.strategy == "persyn":
            values_NM[row, columns] = [decision.expected_reward[name] for name in decision.distribution]
        else:
            candidates = [manifest.teachers[index] for index in columns]
            strengths = np.array(list(decision.strengths.values()))
            values_NM[row, columns] = ranking(manifest, candidates, strengths, options)
    return values_NM


def _limits(names: Sequence[str], n_prompts: int, settings: PlanSettings) -> Limits:
    least_M = np.zeros(len(names), dtype=np.intp)
    most_M = np.full(len(names), n_prompts, dtype=np.intp)
    for share in settings.shares:
        if share.teacher not in names:
            raise UnknownTeacherError(
                f"a share names {share.teacher!r}, which the router does not know; known: {', '.join(names)}"
            )
        column = names.index(share.teacher)
        least_M[column], most_M[column] = share.counts(n_prompts)
    return Limits(least_M, most_M, settings.budget_usd)


def _reassigned(
    manifest: Manifest, decisions: Sequence[RoutingDecision], assignment: CorpusAssignment
) -> list[RoutingDecision]:
    """The decisions with the teachers of the plan, which draws nothing: their propensity is 1."""
    return [
        replace(decision, teacher=manifest.teachers[column].id, propensity=1.0)
        for decision, column in zip(decisions, assignment.columns_N, strict=True)
    ]


def _chosen_costs(
    manifest: Manifest, decisions: Sequence[RoutingDecision], cost_usd_NM: FloatArray
) -> list[float | None]:
    """Expected cost of each prompt's answer, None if not known."""
    column = {teacher.id: index for index, teacher in enumerate(manifest.teachers)}
    costs = [float(cost_usd_NM[row, column[d.teacher]]) for row, d in enumerate(decisions)]
    return [None if math.isnan(cost_usd) else cost_usd for cost_usd in costs]


def _facts(
    manifest: Manifest,
    prompts: Sequence[Prompt],
    decisions: Sequence[RoutingDecision],
    costs: Sequence[float | None],
    settings: PlanSettings,
) -> dict[str, Any]:
    """What holds of any plan."""
    counts = Counter(decision.teacher for decision in decisions)
    rewards = [decision.expected_reward.get(decision.teacher) for decision in decisions]
    by_teacher: dict[str, list[float | None]] = {teacher: [] for teacher in counts}
    for decision, cost_usd in zip(decisions, costs, strict=True):
        by_teacher[decision.teacher].append(cost_usd)
    return {
        "prompts_sha256": prompts_hash(prompts),
        "n_prompts": len(prompts),
        "teachers": dict(counts.most_common()),
        "teacher_costs_usd": {teacher: _total(by_teacher[teacher]) for teacher, _ in counts.most_common()},
        "expected_cost_usd": _total(costs),
        "cost_not_known": teachers_of_unknown_cost(manifest.teachers, settings.options.prices),
        "mean_expected_reward": None if (total := _total(rewards)) is None else total / len(rewards),
        "n_uncertain": sum(decision.uncertain for decision in decisions),
        "n_out_of_distribution": sum(decision.out_of_distribution for decision in decisions),
    }


def _total(values: Sequence[float | None]) -> float | None:
    """Their sum, None if one is not known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _limit_facts(
    manifest: Manifest, settings: PlanSettings, assignment: CorpusAssignment | None
) -> dict[str, Any]:
    """The limits, and what they cost; None without any."""
    limits: dict[str, Any] = {
        "budget_usd": settings.budget_usd,
        "shares": {share.teacher: [share.least, share.most] for share in settings.shares},
    }
    if assignment is None:
        return {**limits, "value": None, "shadow_prices": None}
    prices = assignment.prompt_price_M.tolist()
    return {
        **limits,
        "value": {
            "of": VALUE_NAMES[settings.options.strategy],
            "total": assignment.value,
            "upper_bound": assignment.upper_bound,
            "gap": max(0.0, assignment.upper_bound - assignment.value),
        },
        "shadow_prices": {
            "usd": assignment.usd_price,
            "teachers": {teacher.id: price for teacher, price in zip(manifest.teachers, prices, strict=True)},
        },
    }

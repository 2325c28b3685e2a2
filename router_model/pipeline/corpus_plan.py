"""A plan on disk: how and for what it was made (``plan.json``), and a teacher per prompt."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.canonical import content_hash, messages_hash
from clients.types import Prompt, RoutingDecision
from router_model.errors import PipelineError
from router_model.pipeline.artifacts import read_json, write_json, write_jsonl

PLAN_FILE = "plan.json"
ASSIGNMENTS_FILE = "assignments.jsonl"
IDENTITY = (
    "student",
    "checkpoint_id",
    "strategy",
    "allowed_teachers",
    "excluded_teachers",
    "alpha",
    "temperature",
    "seed",
    "cost_weight",
    "top_k",
    "mix_strong_share",
    "car_beta",
    "prices",
)
"""What says how teachers were chosen, in plans and in data sets; prices only where cost counts."""
_OF_ROUTER = (
    "distribution",
    "propensity",
    "margin",
    "uncertain",
    "input_tokens",
    "truncated",
    "out_of_distribution",
)


@dataclass(frozen=True, slots=True, eq=False)
class CorpusPlan:
    """A plan that was read. Its decisions know no strengths, quality, learnability nor rewards by teacher."""

    folder: Path
    facts: Mapping[str, Any]
    """What ``plan.json`` holds."""
    decisions: Mapping[str, RoutingDecision]
    """By prompt id."""

    @property
    def identity(self) -> dict[str, Any]:
        """How its teachers were chosen."""
        return {name: self.facts[name] for name in IDENTITY if name in self.facts}

    @property
    def summary(self) -> dict[str, Any]:
        """What a data set remembers of its plan."""
        names = ("assignments_sha256", "budget_usd", "shares", "expected_cost_usd", "mean_expected_reward")
        return {name: self.facts[name] for name in names}

    def require_prompts(self, prompts: Sequence[Prompt], path: Path) -> None:
        """Raise ``PipelineError`` if the plan was made for other prompts; their order does not matter."""
        if prompts_hash(prompts) != self.facts["prompts_sha256"]:
            raise PipelineError(
                f"{self.folder}: was made for {self.facts['n_prompts']} prompts, and {path} holds other ones "
                f"({len(prompts)}); give the prompts of the plan, or plan again"
            )

    def require_choice(self, choice: Mapping[str, Any], names: Collection[str]) -> None:
        """Raise ``PipelineError`` if, in one of these names, the plan was made otherwise than ``choice``."""
        for name in names:
            if self.facts[name] != choice[name]:
                raise PipelineError(
                    f"{self.folder}: was made with {name} {self.facts[name]!r}, not {choice[name]!r}; leave "
                    "that out to go by the plan, or plan again"
                )


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Hash of ids and messages: the same prompts in another order or file format have the same."""
    return content_hash(sorted([prompt.id, messages_hash(prompt.messages)] for prompt in prompts))


def assignments_hash(decisions: Sequence[RoutingDecision]) -> str:
    """Hash of who answers what, in order."""
    return content_hash([[decision.prompt_id, decision.teacher] for decision in decisions])


def write_plan(
    folder: Path,
    facts: Mapping[str, Any],
    decisions: Sequence[RoutingDecision],
    cost_usd_N: Sequence[float | None],
) -> dict[str, Any]:
    """Write both files; ``plan.json`` last, with the hash of the other, so that a torn plan is not taken.

    Returns:
        What ``plan.json`` says.
    """
    rows = [
        {
            "prompt_id": decision.prompt_id,
            "teacher": decision.teacher,
            "expected_reward": decision.expected_reward.get(decision.teacher),
            "expected_cost_usd": cost_usd,
            **{name: getattr(decision, name) for name in _OF_ROUTER},
        }
        for decision, cost_usd in zip(decisions, cost_usd_N, strict=True)
    ]
    write_jsonl(folder / ASSIGNMENTS_FILE, rows)
    written = {**facts, "assignments_sha256": assignments_hash(decisions)}
    write_json(folder / PLAN_FILE, written)
    return written


def read_plan(folder: Path) -> CorpusPlan:
    """A plan that ``persyn plan`` wrote.

    Raises:
        PipelineError: There is none, or it was changed.
    """
    facts = read_json(folder / PLAN_FILE)
    if "prompts_sha256" not in facts:
        raise PipelineError(
            f"{folder / PLAN_FILE}: is no plan of `persyn plan`, but the record of a data set"
        )
    path = folder / ASSIGNMENTS_FILE
    try:
        decisions = [_decision(json.loads(line)) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path}: damaged: {error}; plan again") from error
    if assignments_hash(decisions) != facts.get("assignments_sha256"):
        raise PipelineError(f"{path}: is not the file that {PLAN_FILE} was written with; plan again")
    return CorpusPlan(folder, facts, {decision.prompt_id: decision for decision in decisions})


def _decision(row: Mapping[str, Any]) -> RoutingDecision:
    return RoutingDecision(
        prompt_id=row["prompt_id"],
        teacher=row["teacher"],
        strengths={},
        quality={},
        learnability={},
        expected_reward={},
        **{name: row[name] for name in _OF_ROUTER},
    )

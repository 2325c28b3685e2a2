"""Stage ``plan``, and ``synthesize`` by a plan, over a router whose rewards are planted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clients.errors import UnknownTeacherError
from clients.testing import FakeTeacher, Reply
from clients.types import Prompt, RoutingDecision
from router_model.errors import InfeasiblePlanError, PipelineError, StrategyError
from router_model.model import TeacherSummary
from router_model.pipeline import plan as plan_stage
from router_model.pipeline import synthesize as synthesize_stage
from router_model.pipeline.config import ProjectFile, load_project
from router_model.pipeline.corpus_plan import read_plan
from router_model.pipeline.plan import PlanSettings, make_plan
from router_model.pipeline.synthesize import SynthesisSettings, synthesize_dataset
from router_model.share_range import ShareRange
from router_model.strategies import RouteOptions
from tests.unit.planted import decided, planted_manifest, planted_output

# Strengths of the teachers big and small; the expected reward is a tenth of them.
STRENGTHS = {"p0": (9.0, 1.0), "p1": (7.0, 1.0), "p2": (5.0, 1.0), "p3": (1.0, 3.0)}
MANIFEST = planted_manifest(
    [
        TeacherSummary("big", None, None, 0.9, -1.0, 0.5, 0.5, 0.5, 1000.0),
        TeacherSummary("small", None, None, 0.4, -1.0, 0.5, 0.5, 0.5, 1000.0),
    ]
)
PRICES = {"big": {"output_usd_per_mtok": 1000.0}, "small": {"output_usd_per_mtok": 100.0}}


class SilentProgress:
    """Counts what is done."""

    n_done = 0

    def start(self, stage: str, *, total: int, done: int = 0) -> None: ...
    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None: ...
    def finish(self) -> None: ...
    def note(self, message: str) -> None: ...


def decisions(
    router: Any, prompts: Sequence[Prompt], options: RouteOptions, *, progress: Any = None
) -> list[RoutingDecision]:
    names = [*STRENGTHS]
    given = {name: getattr(options, name) for name in options.__slots__}
    return [
        decided(
            router.manifest, planted_output(STRENGTHS.get(prompt.id, STRENGTHS[names[0]])), prompt.id, **given
        )
        for prompt in prompts
    ]


@pytest.fixture(autouse=True)
def _planted_router(monkeypatch: pytest.MonkeyPatch) -> None:
    router = SimpleNamespace(manifest=MANIFEST, backbone=None)
    for stage in (plan_stage, synthesize_stage):
        monkeypatch.setattr(stage.Router, "load", lambda folder, moved_to: router)
        monkeypatch.setattr(stage, "decide_all", decisions)
    monkeypatch.setattr(synthesize_stage, "read_checkpoint", lambda folder: (None, MANIFEST))


def project(
    folder: Path, url: str = "http://127.0.0.1:1/v1", prices: Mapping[str, Any] = PRICES
) -> ProjectFile:
    content = {
        "version": 1,
        "students": [{"id": "s", "model": "m", "checkpoint": "checkpoint"}],
        "teachers": [
            {
                "id": name,
                "base_url": url,
                "model": name,
                **({"price": prices[name]} if name in prices else {}),
            }
            for name in ("big", "small")
        ],
        "calibration": {"prompts": "prompts.jsonl"},
        "quality": {"kind": "exact_answer"},
        "router": {"backbone": "b"},
    }
    (folder / "persyn.yaml").write_text(json.dumps(content))
    return load_project(folder / "persyn.yaml")


def prompt_file(folder: Path, names: Sequence[str] = tuple(STRENGTHS), topic: str = "boats") -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": name, "prompt": f"{name} on {topic}"}) + "\n" for name in names)
    )
    return path


def planned(folder: Path, settings: PlanSettings | None = None, **changes: Any) -> dict[str, Any]:
    settings = settings or PlanSettings(RouteOptions())
    arguments = (project(folder, **changes), prompt_file(folder), folder / "plan", settings)
    return make_plan(*arguments, progress=SilentProgress())


def test_without_limits_a_plan_is_the_choice_of_the_strategy(tmp_path: Path) -> None:
    """Three prompts to big, at 1 dollar each, one to small; rewards and propensities are recorded."""
    facts = planned(tmp_path)
    assert facts["teachers"] == {"big": 3, "small": 1}
    assert facts["expected_cost_usd"] == pytest.approx(3.1)
    assert facts["mean_expected_reward"] == pytest.approx((0.9 + 0.7 + 0.5 + 0.3) / 4)
    assert facts["shadow_prices"] is None
    drawn = planned(tmp_path, PlanSettings(RouteOptions(strategy="random")))
    assert drawn["strategy"] == "random"
    rows = [json.loads(line) for line in (tmp_path / "plan" / "assignments.jsonl").read_text().splitlines()]
    assert {row["propensity"] for row in rows} == {0.5}


def test_a_budget_takes_the_dear_teacher_from_whom_it_helps_least(tmp_path: Path) -> None:
    """2.2 dollars pay for big twice: p2 goes to small. One dollar more would be worth 0.4 for 0.9 dollars."""
    facts = planned(tmp_path, PlanSettings(RouteOptions(), budget_usd=2.2))
    written = read_plan(tmp_path / "plan")
    assert {name: d.teacher for name, d in written.decisions.items()} == {
        "p0": "big",
        "p1": "big",
        "p2": "small",
        "p3": "small",
    }
    assert facts["expected_cost_usd"] == pytest.approx(2.2)
    assert facts["value"]["total"] == pytest.approx(0.9 + 0.7 + 0.1 + 0.3)
    assert facts["value"]["gap"] == pytest.approx(0.0, abs=1e-6)
    tighter = planned(tmp_path, PlanSettings(RouteOptions(), budget_usd=2.0))
    assert tighter["shadow_prices"]["usd"] == pytest.approx(0.6 / 0.9)
    assert tighter["value"]["gap"] == pytest.approx(0.6 * 0.7 / 0.9)
    assert tighter["prices"]["big"]["output_usd_per_mtok"] == 1000.0


def test_shares_bind_from_both_sides(tmp_path: Path) -> None:
    """Big at most a quarter: only p0. Small none at all: all to big."""
    planned(tmp_path, PlanSettings(RouteOptions(), shares=[ShareRange("big", 0.0, 0.25)]))
    by_prompt = read_plan(tmp_path / "plan").decisions
    assert [name for name, decision in by_prompt.items() if decision.teacher == "big"] == ["p0"]
    assert by_prompt["p3"].propensity == 1.0
    facts = planned(tmp_path, PlanSettings(RouteOptions(), shares=[ShareRange("big", 1.0, 1.0)]))
    assert facts["teachers"] == {"big": 4}
    assert facts["shadow_prices"]["teachers"]["big"] < 0


@pytest.mark.parametrize(
    ("strategy", "unit", "expected"),
    [("strong", "mean quality", 2 * 0.9 + 2 * 0.4), ("best_single", "mean reward", 2 * 0.14 - 2 * 0.16)],
)
def test_other_strategies_are_planned_by_what_they_rank_by(
    tmp_path: Path, strategy: Any, unit: str, expected: float
) -> None:
    """Mean quality 0.9 and 0.4; mean reward 0.6 * quality - 0.4: with half of the prompts each."""
    settings = PlanSettings(RouteOptions(strategy=strategy), shares=[ShareRange("big", 0.0, 0.5)])
    facts = planned(tmp_path, settings)
    assert facts["value"]["of"] == unit
    assert facts["value"]["total"] == pytest.approx(expected)


def test_an_unknown_cost_is_the_highest_known_or_else_refused(tmp_path: Path) -> None:
    """As for cost_weight: small without a price counts as 1 dollar, named; no price at all: refused."""
    settings = PlanSettings(RouteOptions(), budget_usd=4.0)
    facts = planned(tmp_path, settings, prices={"big": PRICES["big"]})
    assert facts["expected_cost_usd"] == pytest.approx(4.0)
    assert facts["cost_not_known"] == ["small"]
    with pytest.raises(
        StrategyError, match=r"budget_usd cannot be served: the cost of an answer of big, small"
    ):
        planned(tmp_path, settings, prices={})
    free = planned(tmp_path, prices={})
    assert (free["expected_cost_usd"], free["teacher_costs_usd"]) == (None, {"big": None, "small": None})


def test_what_cannot_be_planned_is_told(tmp_path: Path) -> None:
    """Too small a budget with the least cost, a share of a stranger, options that draw or price."""
    with pytest.raises(InfeasiblePlanError, match=r"expected to cost \$0\.400000"):
        planned(tmp_path, PlanSettings(RouteOptions(), budget_usd=0.3))
    with pytest.raises(
        UnknownTeacherError, match="'huge', which the router does not know; known: big, small"
    ):
        planned(tmp_path, PlanSettings(RouteOptions(), shares=[ShareRange("huge")]))
    excluded = RouteOptions(exclude=["big"])
    with pytest.raises(
        InfeasiblePlanError, match="'big' asks for at least 1 prompts, but the options allow it"
    ):
        planned(tmp_path, PlanSettings(excluded, shares=[ShareRange("big", 0.1)]))
    for options, told in (
        (RouteOptions(strategy="mix"), "no meaning for strategy 'mix'"),
        (RouteOptions(strategy="random"), "no meaning for strategy 'random'"),
        (RouteOptions(temperature=1.0), "leave temperature at 0"),
        (RouteOptions(cost_weight=1.0), "leave cost_weight at 0"),
    ):
        with pytest.raises(StrategyError, match=told):
            PlanSettings(options, budget_usd=1.0)
    with pytest.raises(StrategyError, match="at least 0 US dollars"):
        PlanSettings(RouteOptions(), budget_usd=-1.0)
    with pytest.raises(StrategyError, match="more than one share is given for big"):
        PlanSettings(RouteOptions(), shares=[ShareRange("big"), ShareRange("big")])


def synthesized(folder: Path, url: str, out: str = "data", **settings: Any) -> Any:
    options = settings.pop("options", RouteOptions())
    arguments = (project(folder, url), folder / "prompts.jsonl", folder / out)
    asked = SynthesisSettings(options, plan=folder / "plan", **settings)
    return synthesize_dataset(*arguments, asked, progress=SilentProgress())


def test_synthesize_takes_the_teachers_of_the_plan_and_resumes(tmp_path: Path) -> None:
    """Each prompt is answered by the planned teacher, once; card and manifest tell of the plan."""
    planned(tmp_path, PlanSettings(RouteOptions(), budget_usd=2.2))
    with FakeTeacher(lambda body, _n: Reply(content=body["model"])) as teacher:
        first = synthesized(tmp_path, teacher.base_url)
        assert first.summary.shares == {"big": 0.5, "small": 0.5}
        prompt_file(tmp_path, [*reversed(STRENGTHS)])
        again = synthesized(tmp_path, teacher.base_url)
    assert (first.n_generated, again.n_generated, again.n_reused) == (4, 0, 4)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["strategy"] == "persyn"
    assert manifest["plan"]["budget_usd"] == 2.2
    assert (
        "(a budget of $2.2), at an expected cost of $2.2000." in (tmp_path / "data" / "README.md").read_text()
    )
    record = json.loads((tmp_path / "data" / "plan.json").read_text())
    assert record["teachers"] == {"big": 2, "small": 2}
    assert record["plan"]["assignments_sha256"] == manifest["plan"]["assignments_sha256"]


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, options, checkpoint; another plan in the same folder; the plan's own folder; a changed
    or missing file. Nothing is asked."""
    planned(tmp_path, PlanSettings(RouteOptions(), budget_usd=2.2))
    with FakeTeacher(lambda body, _n: Reply(content=body["model"])) as teacher:
        url = teacher.base_url
        synthesized(tmp_path, url)
        n_asked = len(teacher.requests)

        def refused(told: str, **settings: Any) -> None:
            with pytest.raises(PipelineError, match=told):
                synthesized(tmp_path, url, **settings)

        synthesized(tmp_path, url, given={"strategy"})
        refused(
            "made with strategy 'persyn', not 'strong'", options=RouteOptions("strong"), given={"strategy"}
        )
        options = RouteOptions(exclude=["big"])
        refused(r"made with excluded_teachers \[\], not \['big'\]", options=options, given={"exclude"})
        refused("is the folder of a plan; give it as --plan", out="plan")
        prompt_file(tmp_path, topic="birds")
        refused("made for 4 prompts, and .* holds other ones")
        prompt_file(tmp_path)
        other = planted_manifest(MANIFEST.teachers, checkpoint_id="decaf")
        with monkeypatch.context() as patched:
            patched.setattr(synthesize_stage, "read_checkpoint", lambda folder: (None, other))
            refused("made with checkpoint_id 'c0ffee', not 'decaf'")
        planned(tmp_path, PlanSettings(RouteOptions(), budget_usd=4.0))
        refused("was begun with plan")
        assignments = tmp_path / "plan" / "assignments.jsonl"
        assignments.write_text(assignments.read_text().replace('"small"', '"big"'))
        refused("is not the file that plan.json was written with")
        (tmp_path / "plan" / "plan.json").unlink()
        refused("plan.json: cannot be read")
        assert len(teacher.requests) == n_asked
        with pytest.raises(PipelineError, match="holds a data set"):
            make_plan(
                project(tmp_path),
                tmp_path / "prompts.jsonl",
                tmp_path / "data",
                PlanSettings(RouteOptions()),
                progress=SilentProgress(),
            )

"""The command line from prompts to a data set, on a real student and a real backbone."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from clients.testing import FakeTeacher, Reply

TOPICS = ("rivers", "boats", "trees", "birds", "clouds", "roads", "cheeses", "lamps", "songs", "games")
LISTS = [f"Name three {topic} as bullets." for topic in TOPICS]
SHOUTS = [f"A slogan about {topic}, all in capital letters." for topic in TOPICS]


def answers(body: Mapping[str, Any], _n_call: int) -> Reply:
    """One teacher always makes lists, the other always shouts."""
    return Reply(content="- one\n- two\n- three" if body["model"] == "lists" else "WE ARE THE BEST IN TOWN")


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, minilm_path: Path
) -> Iterator[tuple[Path, FakeTeacher]]:
    folder = tmp_path_factory.mktemp("project with a space")
    bullets, capitals = {"kind": "bullet_count", "min": 3, "max": 3}, {"kind": "case", "value": "upper"}
    rows = [
        {"id": f"{kind}{n}", "prompt": prompt, "constraints": [rule], "split": "test" if n > 4 else "train"}
        for kind, prompts, rule in (("list", LISTS, bullets), ("shout", SHOUTS, capitals))
        for n, prompt in enumerate(prompts)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeTeacher(answers) as teacher:
        content = {
            "version": 1,
            "students": [{"id": "smol", "model": str(smollm2_path), "checkpoint": "run/checkpoint"}],
            "teachers": [
                {"id": name, "base_url": teacher.base_url, "model": name} for name in ("lists", "shouts")
            ],
            "calibration": {"prompts": "prompts.jsonl"},
            "quality": {"kind": "verifiable"},
            "router": {"backbone": str(minilm_path), "max_tokens": 64},
        }
        (folder / "persyn.yaml").write_text(yaml.safe_dump(content))
        persyn(folder, "run")
        yield folder, teacher


def persyn(folder: Path, *arguments: str, code: int = 0) -> Any:
    command = [sys.executable, "-m", "service.cli", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def test_the_router_sends_each_kind_to_its_teacher(project: tuple[Path, FakeTeacher]) -> None:
    """On held-out prompts the router closes the whole gap, and the report says that routing helps."""
    folder, _ = project
    report = json.loads((folder / "run" / "report" / "report.json").read_text())
    assert report["n_prompts"] == 10
    assert report["verdict"] == "routing helps"
    assert report["methods"]["persyn"]["gap_closed"]["value"] == pytest.approx(1.0)
    assert persyn(folder, "route", "List three kinds of soup as bullets.")["teacher"] == "lists"
    assert persyn(folder, "route", "A SLOGAN FOR SOUP, IN CAPITAL LETTERS.")["teacher"] == "shouts"


def test_the_score_table_has_a_row_for_each_pair(project: tuple[Path, FakeTeacher]) -> None:
    """Every prompt and teacher is scored, with a real learnability below zero."""
    rows = pq.read_table(project[0] / "run" / "scores.parquet").to_pylist()
    assert len(rows) == 40
    assert all(-20 < row["learnability"] < 0 for row in rows)
    assert {row["quality"] for row in rows} == {0.0, 1.0}


def test_a_second_run_asks_and_computes_nothing(project: tuple[Path, FakeTeacher]) -> None:
    """Run again: no call, the same checkpoint."""
    folder, teacher = project
    n_calls = len(teacher.requests)
    before = (folder / "run" / "checkpoint" / "manifest.json").read_bytes()
    persyn(folder, "run")
    assert len(teacher.requests) == n_calls
    assert (folder / "run" / "checkpoint" / "manifest.json").read_bytes() == before


def test_synthesize_writes_each_prompt_once_and_resumes(project: tuple[Path, FakeTeacher]) -> None:
    """A data set has one answer per prompt from the routed teacher; a longer prompt file adds to it."""
    folder, teacher = project
    prompts = folder / "new.jsonl"
    prompts.write_text(json.dumps({"id": "n1", "prompt": "Name three hats as bullets."}) + "\n")
    arguments = ("synthesize", "--prompts", "new.jsonl", "--out", "data set")
    assert persyn(folder, *arguments)["n_generated"] == 1
    with prompts.open("a") as file:
        file.write(json.dumps({"id": "n2", "prompt": "A slogan about hats, all in capital letters."}) + "\n")
    n_calls = len(teacher.requests)
    assert persyn(folder, *arguments)["n_rows"] == 2
    assert len(teacher.requests) == n_calls + 1
    rows = pq.read_table(folder / "data set" / "data" / "train-00000-of-00001.parquet").to_pylist()
    assert [row["teacher"] for row in rows] == ["lists", "shouts"]
    refused = persyn(folder, *arguments, "--strategy", "random", code=1)
    assert "was begun with strategy 'persyn'" in refused["detail"]
    for options, told in (
        (("--alpha", "0"), "was begun with alpha"),
        (("--exclude", "lists"), "was begun with excluded_teachers [], not ['lists']"),
        (("--strategy", "strong", "--temperature", "1"), "temperature has no meaning for strategy 'strong'"),
    ):
        assert told in persyn(folder, *arguments, *options, code=1)["detail"]


def test_synthesize_and_route_obey_the_options_of_choice(project: tuple[Path, FakeTeacher]) -> None:
    """Allow-list, exclusion, strategy and its parameters, alpha: the same on both commands."""
    folder, _ = project
    prompt = "Name three scarves as bullets."
    (folder / "one.jsonl").write_text(json.dumps({"id": "o1", "prompt": prompt}) + "\n")
    assert persyn(folder, "route", prompt)["teacher"] == "lists"
    for number, options in enumerate((("--teacher", "shouts"), ("--exclude", "lists"))):
        assert persyn(folder, "route", prompt, *options)["teacher"] == "shouts"
        out = f"choice {number}"
        persyn(folder, "synthesize", "--prompts", "one.jsonl", "--out", out, *options)
        plan = json.loads((folder / out / "plan.json").read_text())
        assert plan["teachers"] == {"shouts": 1}
    routed = persyn(folder, "route", prompt, "--alpha", "0")
    assert (routed["alpha"], routed["strategy"], routed["teacher"]) == (0.0, "persyn", "lists")
    assert routed["out_of_distribution"] in (True, False)
    strong = persyn(folder, "route", prompt, "--strategy", "strong")["teacher"]
    for share, is_strong in (("0", False), ("1", True)):
        mixed = persyn(folder, "route", prompt, "--strategy", "mix", "--mix-strong-share", share)
        assert (mixed["teacher"] == strong) is is_strong
    told = persyn(folder, "route", prompt, "--cost-weight", "1", code=1)["detail"]
    assert "cost of an answer of lists, shouts is not known" in told
    assert "'hats'" in persyn(folder, "route", prompt, "--teacher", "hats", code=1)["detail"]


def test_a_plan_under_a_budget_and_shares_is_synthesized(project: tuple[Path, FakeTeacher]) -> None:
    """The dear teacher gets what the budget pays for; ``synthesize --plan`` asks as planned and refuses other
    options; a budget that cannot be kept to says the least cost."""
    folder, teacher = project
    content = yaml.safe_load((folder / "persyn.yaml").read_text())
    for section, usd in zip(content["teachers"], (1000, 10), strict=True):
        section["price"] = {"output_usd_per_mtok": usd}
    (folder / "priced.yaml").write_text(yaml.safe_dump(content))
    rows = [{"id": f"w{n}", "prompt": f"Name three {topic} as bullets."} for n, topic in enumerate(TOPICS)]
    (folder / "wanted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = ("plan", "-c", "priced.yaml", "--prompts", "wanted.jsonl", "--out", "a plan")
    free = persyn(folder, *plan)
    assert free["teachers"] == {"lists": 10}
    half = persyn(folder, *plan, "--budget-usd", str(free["expected_cost_usd"] * 0.6))
    assert half["teachers"]["lists"] == 5
    assert half["shadow_prices"]["usd"] > 0
    planned = persyn(folder, *plan, "--share", "lists=..30%", "--share", "shouts=0.1..")
    assert planned["teachers"] == {"shouts": 7, "lists": 3}
    told = persyn(folder, *plan, "--budget-usd", "0", code=1)
    assert told["error"] == "InfeasiblePlanError"
    assert "the cheapest plan within the shares is expected to cost $0.0" in told["detail"]
    assert "'hats'" in persyn(folder, *plan, "--share", "hats=1%..", code=1)["detail"]

    synthesize = ("synthesize", "-c", "priced.yaml", "--prompts", "wanted.jsonl", "--out", "planned set")
    n_calls = len(teacher.requests)
    assert persyn(folder, *synthesize, "--plan", "a plan")["shares"] == {"shouts": 0.7, "lists": 0.3}
    assert persyn(folder, *synthesize, "--plan", "a plan", "--strategy", "persyn")["n_generated"] == 0
    assert len(teacher.requests) == n_calls + 10
    refused = persyn(folder, *synthesize, "--plan", "a plan", "--strategy", "strong", code=1)
    assert "was made with strategy 'persyn', not 'strong'" in refused["detail"]
    assert "was begun with plan" in persyn(folder, *synthesize, code=1)["detail"]


def test_check_finds_nothing_wrong_and_then_a_tampered_checkpoint(project: tuple[Path, FakeTeacher]) -> None:
    """``persyn check`` passes; with one byte of the head changed it fails and names the file."""
    folder, _ = project
    assert all(item["state"] != "failed" for item in persyn(folder, "check")["findings"])
    head = folder / "run" / "checkpoint" / "head.safetensors"
    content = head.read_bytes()
    try:
        head.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        failed = [item for item in persyn(folder, "check", code=1)["findings"] if item["state"] == "failed"]
        assert "head.safetensors" in failed[0]["detail"]
        assert "head.safetensors" in persyn(folder, "route", "x", code=1)["detail"]
    finally:
        head.write_bytes(content)

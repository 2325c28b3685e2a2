"""How the ``persyn`` command ends: exit codes, one-line errors, Ctrl-C, and what ``check`` finds."""

import errno
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from clients.testing import FakeTeacher, Reply

ROOT = Path(__file__).parents[2]
PERSYN = (sys.executable, "-m", "service.cli")
LIMIT_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, minilm_path: Path) -> Iterator[Path]:
    """A project whose teachers answer, with a score table and a trained checkpoint."""
    folder = tmp_path_factory.mktemp("project")
    prompts = [f"Say the number {n}." for n in range(8)]
    (folder / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"prompt": prompt, "answer": str(n), "split": "test" if n > 5 else "train"}) + "\n"
            for n, prompt in enumerate(prompts)
        )
    )
    rows = [
        {"prompt_id": str(n), "prompt": prompt, "teacher": teacher, "quality": quality, "learnability": -1.0}
        for n, prompt in enumerate(prompts)
        for teacher, quality in (("a", 0.0), ("b", 1.0))
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeTeacher(lambda _body, _n: Reply(content="1")) as teacher:
        write_project(folder / "persyn.yaml", teacher.base_url, smollm2_path, minilm_path)
        train = ("train", "--scores", "scores.jsonl", "--backbone", str(minilm_path), "--out", "checkpoint")
        assert persyn(folder, *train, "--head", "constant").returncode == 0
        yield folder


def write_project(path: Path, url: str, student: Path, backbone: Path, **changes: Any) -> None:
    content = {
        "version": 1,
        "students": [{"id": "smol", "model": str(student), "checkpoint": "checkpoint"}],
        "teachers": [{"id": name, "base_url": url, "model": name} for name in ("a", "b")],
        "calibration": {"prompts": "prompts.jsonl"},
        "quality": {"kind": "exact_answer"},
        "router": {"backbone": str(backbone), "max_tokens": 64},
        **changes,
    }
    path.write_text(yaml.safe_dump(content))


def changed_project(folder: Path, name: str, **changes: Any) -> Path:
    """A copy of the project file with other sections."""
    content = yaml.safe_load((folder / "persyn.yaml").read_text())
    path = folder / name
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def persyn(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PERSYN, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def failed(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The failed findings of ``check --json``, by subject."""
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    return {item["subject"]: item["detail"] for item in findings if item["state"] == "failed"}


@contextmanager
def started(folder: Path, *command: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def read_until(stream: Any, word: str) -> str:
    """The line that holds ``word``."""
    for line in stream:
        if word in line:
            return str(line)
    pytest.fail(f"{word!r} was never written")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        ((), 2),
        (("--nonsense",), 2),
        (("nonsense",), 2),
        (("route", "--nonsense"), 2),
        (("route", "x", "-c", "nowhere.yaml"), 1),
    ],
)
def test_usage_exit_codes(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    """0 for help, 2 for wrong usage, also without any argument, 1 for what cannot be done."""
    done = persyn(tmp_path, *arguments)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


INTERRUPTED = """
import os, signal, sys
import router_model.pipeline.{module} as stage
stage.{function} = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
from service.cli import main
sys.argv[0] = "persyn"
main()
"""


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("score", "score", ("score", "--run", "a run")),
        ("train", "train_router", ("train", "--scores", "s", "--backbone", "b", "--out", "o")),
        ("evaluate", "evaluate_router", ("evaluate", "--checkpoint", "c", "--scores", "s", "--out", "o")),
        ("check", "check_project", ("check",)),
    ],
)
def test_ctrl_c_prints_the_command_that_resumes(
    folder: Path, module: str, function: str, arguments: tuple[str, ...]
) -> None:
    """SIGINT in a stage ends the command with 1 and with the very command line to give again."""
    script = INTERRUPTED.format(module=module, function=function)
    with started(folder, sys.executable, "-c", script, *arguments) as process:
        _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
    shown = " ".join("'a run'" if word == "a run" else word for word in arguments)
    assert said.splitlines()[-2:] == ["stopped; what is finished is kept. Resume with:", f"  persyn {shown}"]
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_drains_and_exits_0(folder: Path, number: signal.Signals) -> None:
    """``persyn serve`` answers the open call after the signal and ends with 0."""
    with FakeTeacher(lambda _body, _n: Reply(content="late", delay_s=1.0)) as teacher:
        content = yaml.safe_load((folder / "persyn.yaml").read_text())
        for section in content["teachers"]:
            section["base_url"] = teacher.base_url
        config = changed_project(folder, "slow.yaml", teachers=content["teachers"])
        port = str(free_port())
        command = (*PERSYN, "serve", "-c", str(config), "--port", port)
        with started(folder, *command, PERSYN_CACHE_PATH=str(folder / "c.sqlite")) as process:
            read_until(process.stderr or (), "service_ready")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                request = {"prompts": ["Say one."], "stream": True, "cache": "off"}
                with http.stream("POST", "/synthesize", json=request) as response:
                    process.send_signal(number)
                    body = response.read().decode()
            assert "late" in body
            assert process.wait(LIMIT_S) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_start_that_fails_for_no_reason_of_ours_exits_1(folder: Path) -> None:
    """uvicorn's exit code 3 would say that some items failed."""
    script = """
import service.app
from service.cli import main
async def broken(*_):
    raise RuntimeError("no reason of ours")
service.app._open = broken
main()
"""
    command = (sys.executable, "-c", script, "serve", "--port", "0")
    with started(folder, *command) as process:
        _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
    assert "no reason of ours" in said


@pytest.mark.parametrize(("n_failing", "code"), [(2, 1), (1, 3), (0, 0)])
def test_synthesize_says_whether_all_or_some_failed(
    folder: Path, tmp_path: Path, n_failing: int, code: int
) -> None:
    """1 if no prompt got an answer, 3 if some did, 0 if all did."""

    def script(body: Mapping[str, Any], _n: int) -> Reply:
        number = int(body["messages"][-1]["content"].split()[-1])
        return Reply(status=400) if number < n_failing else Reply(content="yes")

    with FakeTeacher(script) as teacher:
        teachers = [{"id": name, "base_url": teacher.base_url, "model": name} for name in ("a", "b")]
        config = changed_project(folder, f"failing{n_failing}.yaml", teachers=teachers)
        prompts = tmp_path / "new.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"Number {n}"}) + "\n" for n in range(2)))
        arguments = ("-c", str(config), "--prompts", str(prompts), "--out", str(tmp_path / "out"))
        done = persyn(folder, "synthesize", *arguments, "--json")
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["n_failures"] == n_failing


def test_errors_of_the_machine_are_one_line(folder: Path, tmp_path: Path) -> None:
    """A path that cannot be written is told without traceback, as JSON where asked, with exit code 1."""
    (tmp_path / "file").write_text("")
    done = persyn(folder, "init", str(tmp_path / "file" / "below"), "--json")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.strerror(errno.ENOTDIR) in json.loads(done.stdout)["detail"]


def test_json_is_taken_by_schema_and_serve(tmp_path: Path) -> None:
    """``schema --json`` prints the schema, ``serve --json`` its error."""
    assert "students" in json.loads(persyn(tmp_path, "schema", "--json").stdout)["properties"]
    refused = persyn(tmp_path, "serve", "-c", "nowhere.yaml", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"] == "ConfigurationError"


def test_help_of_serve_lists_the_settings(tmp_path: Path) -> None:
    """Each PERSYN_* variable with default and meaning; a plain --help does not load them."""
    shown = persyn(tmp_path, "serve", "--help").stdout
    line = next(line for line in shown.splitlines() if "PERSYN_SHUTDOWN_GRACE_S" in line)
    assert "30" in line
    assert "SIGTERM" in line
    assert "PERSYN_REDIS_URL" in shown
    timed = [sys.executable, "-X", "importtime", "-m", "service.cli", "--help"]
    loaded = subprocess.run(timed, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert "pydantic_settings" not in loaded.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--temperature", "100.5"),
        ("--temperature", "nan"),
        ("--alpha", "1.5"),
        ("--mix-strong-share", "2"),
        ("--car-beta", "-1"),
        ("--cost-weight", "nan"),
        ("--top-k", "0"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(tmp_path: Path, options: tuple[str, str]) -> None:
    """A seed beyond 63 bits, a temperature above 100 or nan: exit code 2, naming the option."""
    files = ("--prompts", "p", "--out", "o")
    commands: list[tuple[str, ...]] = [("synthesize", *files), ("plan", *files), ("route", "x")]
    if options[0] == "--seed":
        commands.append(("train", "--scores", "s", "--backbone", "b", "--out", "o"))
    for command in commands:
        done = persyn(tmp_path, *command, *options)
        assert done.returncode == 2
        assert options[0] in done.stderr


@pytest.mark.parametrize(
    "options", [("--budget-usd", "-1"), ("--budget-usd", "nan"), ("--share", "b"), ("--share", "b=20%")]
)
def test_limits_that_say_nothing_are_wrong_usage(tmp_path: Path, options: tuple[str, str]) -> None:
    """A negative budget, a share without two ends: exit code 2, naming the option."""
    done = persyn(tmp_path, "plan", "--prompts", "p", "--out", "o", *options)
    assert done.returncode == 2
    assert options[0] in done.stderr


def test_a_router_of_another_measure_is_trained_and_judged_by_it(folder: Path, minilm_path: Path) -> None:
    """``train --learnability`` goes into the manifest, ``evaluate`` reads that measure; a table without it is
    refused by both."""
    path = folder / "measured.jsonl"
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    # By mean log-probability a and b are equal; by the ratio, of which lower is closer, a is.
    ratios = {"a": 1.5, "b": 4.0}
    split = {row["prompt_id"]: "test" if int(row["prompt_id"]) > 5 else "train" for row in rows}
    rows = [
        {**row, "rank_surprisal": ratios[row["teacher"]], "split": split[row["prompt_id"]]} for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ("train", "--backbone", str(minilm_path), "--out", "ratio", "--head", "constant")
    options = ("--learnability", "rank_surprisal", "--alpha", "1")
    assert persyn(folder, *train, *options, "--scores", "measured.jsonl").returncode == 0
    manifest = json.loads((folder / "ratio" / "manifest.json").read_text())
    assert manifest["learnability"] == "rank_surprisal"
    assert {teacher["id"]: teacher["mean_learnability"] for teacher in manifest["teachers"]} == {
        "a": -1.5,
        "b": -4.0,
    }
    evaluate = ("evaluate", "--checkpoint", "ratio", "--out", "ratio report", "--json", "--scores")
    report = json.loads(persyn(folder, *evaluate, "measured.jsonl").stdout)
    assert report["learnability"] == "rank_surprisal"
    assert report["methods"]["persyn"]["mean_learnability"] == -1.5
    assert report["methods"]["persyn"]["share"]["a"] == 1.0
    assert any("car is left out" in note and "log-probabilities" in note for note in report["notes"])
    assert "minus the rank-surprisal ratio" in (folder / "ratio report" / "report.md").read_text()
    for command in ((*train, *options, "--json", "--scores"), evaluate):
        refused = json.loads(persyn(folder, *command, "scores.jsonl").stdout)
        assert refused["error"] == "TableError"
        assert "no rank_surprisal in any row; of the columns" in refused["detail"]
    assert persyn(folder, *train, "--scores", "measured.jsonl", "--learnability", "rsr").returncode == 2


def test_check_passes_and_then_names_each_fault(folder: Path) -> None:
    """No fault in a good project; one teacher, no test prompt, a bad table, a misspelt setting are."""
    scores = ("--scores", "scores.jsonl")
    assert persyn(folder, "check", *scores, "--json").returncode == 0
    (folder / "all_train.jsonl").write_text('{"prompt": "x", "answer": "1", "split": "train"}\n')
    (folder / "bad.jsonl").write_text('{"prompt_id": "1"}\n')
    teachers = yaml.safe_load((folder / "persyn.yaml").read_text())["teachers"]
    calibration = {"prompts": "all_train.jsonl"}
    config = changed_project(folder, "faulty.yaml", teachers=teachers[:1], calibration=calibration)
    arguments = ("check", "-c", str(config), "--scores", "bad.jsonl", "--json")
    faults = failed(persyn(folder, *arguments, env={"PERSYN_PROT": "1"}))
    assert faults["teachers"] == "a router needs at least two teachers"
    assert "1 to train on, 0 to test on" in faults["split"]
    assert "bad.jsonl:1" in faults["scores bad.jsonl"]
    assert "PERSYN_PROT" in faults["response cache"]
    assert "not in the project: b" in faults["checkpoint of smol"]


def test_check_misses_a_backbone_that_is_gone(folder: Path, minilm_path: Path) -> None:
    """A checkpoint whose backbone is gone passes where the project names a copy, and fails without one."""
    copy = folder / "copied backbone"
    shutil.copytree(minilm_path, copy)
    train = ("train", "--scores", "scores.jsonl", "--backbone", str(copy), "--out", "elsewhere")
    assert persyn(folder, *train, "--head", "constant").returncode == 0
    shutil.rmtree(copy)
    students = yaml.safe_load((folder / "persyn.yaml").read_text())["students"]
    students[0]["checkpoint"] = "elsewhere"
    moved = changed_project(folder, "moved.yaml", students=students)
    assert persyn(folder, "check", "-c", str(moved), "--json").returncode == 0
    gone = changed_project(folder, "gone.yaml", students=students, router={"backbone": str(copy)})
    faults = failed(persyn(folder, "check", "-c", str(gone), "--json"))
    assert "copied backbone does not exist" in faults["checkpoint of smol"]


def test_an_error_without_a_message_is_a_finding(folder: Path) -> None:
    """A model whose loading fails without a word is named with the kind of the error."""
    script = """
import sys
import router_model.pipeline.check as check
def fail(*_, **__):
    raise OSError("")
check.AutoConfig.from_pretrained = fail
from service.cli import main
main()
"""
    with started(folder, sys.executable, "-c", script, "check", "--json") as process:
        said, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1, errors
    details = {item["subject"]: item["detail"] for item in json.loads(said)["findings"]}
    assert details["router backbone"].endswith(": OSError")


def test_a_failed_stage_closes_its_bar(folder: Path) -> None:
    """On a terminal the cursor that the bar has hidden is shown again, and then the error is told."""
    script = """
import router_model.pipeline.train as train
from router_model.errors import PipelineError
def fail(*_, progress, **__):
    progress.start("train", total=3)
    raise PipelineError("half way")
train.train_router = fail
from service.cli import main
main()
"""
    ours, theirs = pty.openpty()
    arguments = ("train", "--scores", "s", "--backbone", "b", "--out", "o")
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stderr=theirs,
    )
    os.close(theirs)
    with process:
        shown = read_terminal(ours)
        assert process.wait(LIMIT_S) == 1
    hidden, visible = shown.index("\x1b[?25l"), shown.index("\x1b[?25h")
    assert hidden < visible < shown.index("half way")


def read_terminal(terminal: int) -> str:
    """All that is written to a terminal until its last writer is gone."""
    parts: list[bytes] = []
    with open(terminal, "rb", buffering=0) as stream:
        while select.select([stream], [], [], LIMIT_S)[0]:
            try:
                part = stream.read(4096)
            except OSError:  # how Linux tells that nobody holds the other end
                break
            if not part:
                break
            parts.append(part)
    return b"".join(parts).decode()

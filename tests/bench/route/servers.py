"""The servers under test: each answers the same prompts over HTTP with the same weights."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.settings import PREFIX
from tests.bench.route.load import Generator, Load
from tests.bench.route.preparation import Prepared
from tests.bench.route.processes import (
    BenchError,
    clean_environment,
    free_port,
    running,
    wait_until_ready,
)

INFINITY = "infinity"
NAIVE_LOCK, NAIVE_INLINE = "naive, lock and threads", "naive, inline async"
NAIVE = (NAIVE_LOCK, NAIVE_INLINE)

Body = Callable[[str], str]
"""The request body that asks for one prompt."""


def persyn_name(engine: str) -> str:
    """The name of our service with an engine."""
    return f"persyn {engine}"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    name: str
    base_url: str
    path: str
    pid: int
    body: Body

    @property
    def url(self) -> str:
        """Where prompts go."""
        return self.base_url + self.path

    def route(
        self, generator: Generator, prompts: Sequence[str], connections: int, *, n_times: int = 1
    ) -> Load:
        """Answer each prompt so many times, in a closed loop.

        Raises:
            BenchError: A request failed.
        """
        bodies = [self.body(prompt) for prompt in prompts]
        n_requests = n_times * len(bodies)
        load = generator.closed(
            self.url, bodies, connections=connections, n_requests=n_requests, server_pid=self.pid
        )
        load.require_success(f"{self.name}, {connections} connections")
        return load


def _persyn_body(prompt: str) -> str:
    """A call of our /route."""
    return json.dumps({"prompts": [prompt]})


def _naive_body(prompt: str) -> str:
    return json.dumps({"prompt": prompt})


def _infinity_body(prompt: str) -> str:
    return json.dumps({"model": "classifier", "input": [prompt]})


@contextmanager
def persyn(files: Prepared, *, engine: str, decision_cache_mb: float = 0.0) -> Iterator[Server]:
    """``persyn serve`` while the block runs.

    Args:
        decision_cache_mb: 0, as anywhere else it would answer in place of the router.

    Raises:
        BenchError: It does not start.
    """
    port = free_port()
    name = persyn_name(engine) + (", cache on" if decision_cache_mb else "")
    settings = {
        PREFIX + "ENGINE": engine,
        PREFIX + "DECISION_CACHE_MB": str(decision_cache_mb),
        PREFIX + "CACHE_PATH": str(files.folder / "responses.sqlite"),
    }
    command = [sys.executable, "-m", "service.cli", "serve", "-c", str(files.project), "--port", str(port)]
    env = clean_environment(**settings)
    with _served(name, port, command, files.folder, env=env, ready="/readyz") as pid:
        yield Server(name, f"http://127.0.0.1:{port}", "/route", pid, _persyn_body)


@contextmanager
def naive(files: Prepared, name: str) -> Iterator[Server]:
    """One of the two naive servers while the block runs."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.route.naive", "--classifier", str(files.classifier)]
    command += ["--calls", "lock" if name == NAIVE_LOCK else "inline", "--port", str(port)]
    with _served(name, port, command, files.folder, env=clean_environment(), ready="/livez") as pid:
        yield Server(name, f"http://127.0.0.1:{port}", "/route", pid, _naive_body)


@contextmanager
def infinity(files: Prepared, environment: Path) -> Iterator[Server]:
    """infinity-emb's /classify with its torch engine while the block runs.

    Raises:
        BenchError: It is not installed or does not start.
    """
    program = environment / "bin" / "infinity_emb"
    if not program.exists():
        raise BenchError(f"{program} is missing: infinity-emb could not be installed")
    port = free_port()
    command = [str(program), "v2", "--model-id", str(files.classifier), "--served-model-name", "classifier"]
    command += ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--log-level", "warning"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    env = clean_environment(
        DO_NOT_TRACK="1", INFINITY_ANONYMOUS_USAGE_STATS="0", HF_HUB_OFFLINE="1", PYTHONPATH=""
    )
    with _served(INFINITY, port, command, files.folder, env=env, ready="/health") as pid:
        yield Server(INFINITY, f"http://127.0.0.1:{port}", "/classify", pid, _infinity_body)


@contextmanager
def _served(
    name: str, port: int, command: Sequence[str], folder: Path, *, env: Mapping[str, str], ready: str
) -> Iterator[int]:
    """Start, wait until it is ready, end; gives the process id."""
    log = folder / f"{name.replace(',', '').replace(' ', '-')}.log"
    with running(command, log, env=env) as process:
        wait_until_ready(f"http://127.0.0.1:{port}{ready}", process, log)
        yield process.pid

"""The course of a run: everything starts, rounds interleave all servers, then what is measured once."""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.route.figures import HIGH, LOW, MIDDLE, REFERENCE, Measured
from tests.bench.route.load import Generator
from tests.bench.route.offline import OfflineEngine, offline_engine
from tests.bench.route.preparation import Prepared
from tests.bench.route.processes import BenchError
from tests.bench.route.prompts import long_prompts, mixed_prompts
from tests.bench.route.servers import INFINITY, NAIVE, Server, infinity, naive, persyn, persyn_name
from tests.bench.route.tasks import task_prompts

_N_WARM_UP = 64
_LIVEZ_INTERVAL_S = 0.004
ONE_BY_ONE, TOGETHER = "one call each", "all in one call"
"""How the long prompts come while GET /livez is watched."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    n_rounds: int
    n_prompts: int
    n_alone: int
    """Prompts of the cells with one connection: the first ones."""
    n_agreement: int
    n_long: int
    n_cached: int


FULL = Scale(n_rounds=3, n_prompts=256, n_alone=96, n_agreement=2000, n_long=100, n_cached=8000)
QUICK = Scale(n_rounds=1, n_prompts=128, n_alone=48, n_agreement=500, n_long=100, n_cached=4000)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run works with."""

    files: Prepared
    infinity_environment: Path
    engines: Sequence[str]


class Run:
    """One run; ``measured`` fills as it goes."""

    def __init__(self, setting: Setting, scale: Scale) -> None:
        self.measured = Measured()
        self._setting = setting
        self._scale = scale
        self._generator = Generator(setting.files.folder)
        self._prompts = mixed_prompts(scale.n_prompts, seed=7)
        self._engines: dict[str, OfflineEngine] = {}
        self._servers: dict[str, Server] = {}

    def whole(self) -> Measured:
        """Everything, in order.

        Raises:
            BenchError: The reference engine, or the service with it, cannot be measured.
        """
        with ExitStack() as stack:
            self._open_engines(stack)
            self._compare_engines()
            self._open_servers(stack)
            for number in range(self._scale.n_rounds):
                tell(f"round {number + 1} of {self._scale.n_rounds}")
                # There and back, so that a machine that slows down slows no server more than another.
                self._round(list(self._servers)[:: 1 if number % 2 == 0 else -1])
            for engine in dict.fromkeys((REFERENCE, self.measured.gated)):
                self._watch_livez(engine)
        with self._or_skip("cache of decisions"):
            self._hit_the_cache()
        return self.measured

    def _open_engines(self, stack: ExitStack) -> None:
        for engine in self._setting.engines:
            with self._or_skip(f"engine {engine}", needed=engine == REFERENCE):
                log = self._setting.files.folder / f"offline-{engine}.log"
                opened = offline_engine(engine, self._setting.files.checkpoint, log, self._prompts)
                self._engines[engine] = stack.enter_context(opened)
                tell(f"engine {engine} is warm")

    def _compare_engines(self) -> None:
        """Whether each engine decides as the reference does."""
        texts = [text for _, text in task_prompts(self._scale.n_agreement, seed=1)]
        for name, engine in self._engines.items():
            self.measured.agreement[name] = engine.agreement(texts)
            tell(f"engine {name} is compared with {REFERENCE}")

    def _open_servers(self, stack: ExitStack) -> None:
        for name, start in self._starts().items():
            with self._or_skip(name, needed=name == persyn_name(REFERENCE)):
                server = stack.enter_context(start())
                for connections in (LOW, MIDDLE):
                    server.route(self._generator, self._prompts[:_N_WARM_UP], connections)
                self._servers[name] = server
                tell(f"{name} is warm")

    def _starts(self) -> dict[str, Callable[[], AbstractContextManager[Server]]]:
        setting = self._setting
        starts: dict[str, Callable[[], AbstractContextManager[Server]]] = {}
        for engine in self._engines:
            starts[persyn_name(engine)] = functools.partial(persyn, setting.files, engine=engine)
        for name in NAIVE:
            starts[name] = functools.partial(naive, setting.files, name)
        starts[INFINITY] = functools.partial(infinity, setting.files, setting.infinity_environment)
        return starts

    def _round(self, names: Sequence[str]) -> None:
        engines = {persyn_name(engine): engine for engine in self._engines}
        for connections in (LOW, MIDDLE, HIGH):
            for name in names:
                if name in engines:
                    self._ask_engine(engines[name], connections)
                with self._or_skip(name, needed=name in engines):
                    self._cell(name, connections)

    def _ask_engine(self, engine: str, connections: int) -> None:
        """The engine alone, next to the cell that it is compared with."""
        measured, offline = self.measured, self._engines[engine]
        if connections == LOW:
            measured.latency.setdefault(engine, []).append(offline.median_ms(self._scale.n_alone))
        elif connections == MIDDLE:
            measured.offline.setdefault(engine, []).append(offline.prompts_per_s())

    def _cell(self, name: str, connections: int) -> None:
        if name in self.measured.skipped:
            return
        prompts = self._prompts[: self._scale.n_alone] if connections == LOW else self._prompts
        load = self._servers[name].route(self._generator, prompts, connections)
        self.measured.note(name, connections, load)

    def _watch_livez(self, engine: str) -> None:
        """GET /livez at a steady pace while long prompts are routed, in many calls and in one."""
        server = self._servers[persyn_name(engine)]
        prompts = long_prompts(self._scale.n_long, seed=3)
        found = self.measured.livez.setdefault(engine, {})
        tell(f"GET /livez beside long prompts, {server.name}")
        with self._generator.paced(server.base_url + "/livez", interval_s=_LIVEZ_INTERVAL_S) as one_by_one:
            server.route(self._generator, prompts, len(prompts))
        with self._generator.paced(server.base_url + "/livez", interval_s=_LIVEZ_INTERVAL_S) as together:
            body = json.dumps({"prompts": prompts})
            load = self._generator.closed(server.url, [body], connections=1, n_requests=1)
            load.require_success(f"{server.name}, {len(prompts)} prompts in one call")
        for way, seen in ((ONE_BY_ONE, one_by_one), (TOGETHER, together)):
            seen.load.require_success(f"{server.name}, GET /livez")
            found[way] = seen.load

    def _hit_the_cache(self) -> None:
        """The same prompts again and again, after each was routed once."""
        scale = self._scale
        with persyn(self._setting.files, engine=REFERENCE, decision_cache_mb=64.0) as server:
            server.route(self._generator, self._prompts, MIDDLE)
            self.measured.cache_hit = server.route(
                self._generator, self._prompts, MIDDLE, n_times=scale.n_cached // scale.n_prompts
            )

    @contextmanager
    def _or_skip(self, what: str, *, needed: bool = False) -> Iterator[None]:
        """Say loudly that something cannot be measured, and go on unless it is needed."""
        try:
            yield
        except BenchError as error:
            if needed:
                raise
            self.measured.skipped[what] = str(error)
            tell(f"SKIPPED: {what}: {error}")


def tell(message: str) -> None:
    """What goes on, and when, on standard error."""
    print(f"bench: {time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)

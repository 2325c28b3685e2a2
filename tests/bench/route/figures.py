"""From what was measured to the figures that have goals. Pure: no process, no clock."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.bench.route.load import Load
from tests.bench.route.servers import INFINITY, NAIVE, persyn_name

REFERENCE = "fp32"
"""The engine that others are compared with."""
LOW, MIDDLE, HIGH = 1, 16, 64
"""Connections of the cells."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some rounds, and between what they lie."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the router decides with an engine, beside float32; as ``router_model.engine_gate`` measures it."""

    n_prompts: int
    agreement: float
    """Share of the prompts with the same strongest teacher."""
    max_strength_difference: float
    passes: bool
    """Whether the product would use the engine unasked."""


@dataclass(slots=True)
class Measured:
    """What was seen; lists hold one value per round."""

    offline: dict[str, list[float]] = field(default_factory=dict)
    """Engine → prompts per second."""
    latency: dict[str, list[float]] = field(default_factory=dict)
    """Engine → median latency of one prompt, ms, just before the service's cell with one connection."""
    loads: dict[str, dict[int, list[Load]]] = field(default_factory=dict)
    """Server → connections → runs."""
    agreement: dict[str, Agreement] = field(default_factory=dict)
    """Engine → how it differs from the reference."""
    livez: dict[str, dict[str, Load]] = field(default_factory=dict)
    """Engine → how the long prompts came → GET /livez meanwhile."""
    cache_hit: Load | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """What could not be measured → why."""

    def note(self, server: str, connections: int, load: Load) -> None:
        """Keep one run."""
        self.loads.setdefault(server, {}).setdefault(connections, []).append(load)

    def rps(self, server: str, connections: int = MIDDLE) -> list[float]:
        """Requests per second, by round; nothing if the server was not measured."""
        return [load.rps for load in self.loads.get(server, {}).get(connections, [])]

    @property
    def gated(self) -> str:
        """The fastest engine that passes, by the service's throughput; the reference always does."""
        passing = (engine for engine, agreement in self.agreement.items() if agreement.passes)
        return max(passing, key=lambda engine: statistics.median(self.rps(persyn_name(engine)) or [0.0]))


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be."""

    bound: float
    at_least: bool
    meaning: str

    def met_by(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


GOALS: Mapping[str, Goal] = {
    "service_over_offline": Goal(
        0.90,
        True,
        "service at 16 connections over its engine offline; the lower of fp32 and the gated engine",
    ),
    "over_infinity_fp32": Goal(2.0, True, "requests/s at 16 connections, fp32, over infinity"),
    "over_naive_fp32": Goal(1.4, True, "the same over the better naive server"),
    "gated_over_infinity": Goal(4.0, True, "the gated engine over infinity"),
    "gated_over_naive": Goal(2.5, True, "the gated engine over the better naive server"),
    "gated_agreement": Goal(0.99, True, "share of prompts with the same strongest teacher as in fp32"),
    "c1_overhead_ms": Goal(1.0, False, "median latency at one connection less the engine's own"),
    "livez_p99_ms": Goal(5.0, False, "p99 of GET /livez while 100 prompts of 512 tokens are routed"),
    "c64_over_c16": Goal(1.0, True, "requests/s at 64 connections over that at 16, gated engine"),
    "cache_hit_cpu_ms": Goal(0.3, False, "CPU time of a cached decision, whole process, 16 connections"),
}
"""Every figure of the report."""


def figures(measured: Measured) -> dict[str, float | None]:
    """The figures by name; ``None`` for what could not be measured."""
    service, gated = persyn_name(REFERENCE), persyn_name(measured.gated)
    naive = better_naive(measured)
    overheads = {engine: overhead_ms(measured, engine) for engine in (REFERENCE, measured.gated)}
    livez = [load.p99_ms for runs in measured.livez.values() for load in runs.values()]
    over_offline = [over_offline_of(measured, engine) for engine in (REFERENCE, measured.gated)]
    return {
        "service_over_offline": _least(over_offline),
        "over_infinity_fp32": _ratio(measured.rps(service), measured.rps(INFINITY)),
        "over_naive_fp32": _ratio(measured.rps(service), measured.rps(naive)),
        "gated_over_infinity": _ratio(measured.rps(gated), measured.rps(INFINITY)),
        "gated_over_naive": _ratio(measured.rps(gated), measured.rps(naive)),
        "gated_agreement": measured.agreement[measured.gated].agreement,
        "c1_overhead_ms": overheads[measured.gated],
        "livez_p99_ms": max(livez) if livez else None,
        "c64_over_c16": _ratio(measured.rps(gated, HIGH), measured.rps(gated)),
        "cache_hit_cpu_ms": measured.cache_hit.cpu_ms if measured.cache_hit else None,
    }


def over_offline_of(measured: Measured, engine: str) -> float | None:
    """Throughput of the service over that of its engine called directly, the median of the rounds."""
    return _ratio(measured.rps(persyn_name(engine)), measured.offline.get(engine, []))


def overhead_ms(measured: Measured, engine: str) -> float | None:
    """What the service adds to the latency of one prompt, the median of the rounds."""
    loads = measured.loads.get(persyn_name(engine), {}).get(LOW, [])
    return _over_rounds(
        [load.p50_ms for load in loads], measured.latency.get(engine, []), lambda ours, own: ours - own
    )


def better_naive(measured: Measured) -> str:
    """The name of the faster naive server."""
    return max(NAIVE, key=lambda name: statistics.median(measured.rps(name) or [0.0]))


def as_json(measured: Measured) -> dict[str, Any]:
    """All that was measured, cell by cell."""
    return {
        "gated_engine": measured.gated,
        "better_naive": better_naive(measured),
        "by_engine": {engine: _engine_json(measured, engine) for engine in measured.agreement},
        "cells": [
            {
                "server": server,
                "connections": connections,
                "rps": asdict(Spread.of([load.rps for load in loads])),
                "p50_ms": asdict(Spread.of([load.p50_ms for load in loads])),
                "p99_ms": asdict(Spread.of([load.p99_ms for load in loads])),
                "cpu_ms": asdict(Spread.of([load.cpu_ms for load in loads])),
                "rounds": [asdict(load) for load in loads],
            }
            for server, by_connections in measured.loads.items()
            for connections, loads in by_connections.items()
        ],
        "livez": {
            engine: {way: asdict(load) for way, load in runs.items()}
            for engine, runs in measured.livez.items()
        },
        "cache_hit": asdict(measured.cache_hit) if measured.cache_hit else None,
        "skipped": measured.skipped,
    }


def _engine_json(measured: Measured, engine: str) -> dict[str, Any]:
    return {
        "offline_prompts_per_s": _spread(measured.offline.get(engine, [])),
        "median_ms": _spread(measured.latency.get(engine, [])),
        "service_over_offline": over_offline_of(measured, engine),
        "c1_overhead_ms": overhead_ms(measured, engine),
        "agreement": asdict(measured.agreement[engine]),
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return asdict(Spread.of(values)) if values else None


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median over the rounds of the ratio within each: what slows one round slows both of its sides."""
    return _over_rounds(ours, theirs, lambda one, other: one / other)


def _over_rounds(
    ours: Sequence[float], theirs: Sequence[float], compare: Callable[[float, float], float]
) -> float | None:
    pairs = list(zip(ours, theirs, strict=False))
    return statistics.median(compare(*pair) for pair in pairs) if pairs else None


def _least(values: Sequence[float | None]) -> float | None:
    """The least value; nothing if one is missing."""
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None

"""Does the service's memory grow? 100,000 requests of all kinds after a warm-up, and its size between them.

    python -m tests.bench.route.soak --out runs/bench

Writes soak.json.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.route.figures import MIDDLE
from tests.bench.route.load import Generator, Load
from tests.bench.route.machine import commit_facts, machine_facts
from tests.bench.route.measure import tell
from tests.bench.route.preparation import prepare
from tests.bench.route.processes import ROOT, BenchError, end_on_signals, resident_bytes
from tests.bench.route.servers import Server, persyn

N_WARM_UP, N_MEASURED, N_QUICK, N_PER_SLICE = 20_000, 100_000, 10_000, 2_000
GOAL_PERCENT = 2.0
GIVE_UP_EVERY = 10
"""Each so manieth request is given up."""
_GIVE_UP_AFTER_S = 0.002
_N_KNOWN = 64
_CACHE_MB = 1.0
"""Full long before the measured requests begin: what grows until it is full would look like a leak."""

BAD = (
    "{",
    "{}",
    '{"prompts": []}',
    '{"prompts": [""]}',
    '{"prompts": ["Hello"], "strategy": "guess"}',
    '{"prompts": ["Hello"], "teachers": ["nobody"]}',
    '{"prompts": ["Hello"], "alpha": 7}',
)
"""Bodies that are refused with 4xx."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How resident memory went over the requests after the warm-up."""

    bytes_per_1000_requests: float
    """Slope of the least-squares line."""
    percent: float
    """What the line rises over all of them, of where it begins."""
    first_mb: float
    last_mb: float

    @classmethod
    def of(cls, n_requests: Sequence[int], sizes_bytes: Sequence[int]) -> "Growth":
        """Of at least two sizes, each after so many requests."""
        slope, start = np.polyfit(n_requests, sizes_bytes, deg=1)
        rise = slope * (n_requests[-1] - n_requests[0])
        return cls(
            bytes_per_1000_requests=float(1000 * slope),
            percent=float(100 * rise / (start + slope * n_requests[0])),
            first_mb=sizes_bytes[0] / 1e6,
            last_mb=sizes_bytes[-1] / 1e6,
        )


def mixed_bodies() -> Iterator[str]:
    """Requests without end: of ten, four known prompts, one that is refused, and five new ones, the last of
    which is given up."""
    for number in itertools.count():
        kind = number % 10
        if kind in {1, 3, 5, 7}:
            yield _body(f"Is {number // 10 % _N_KNOWN} a prime number?")
        elif kind == 4:
            yield BAD[number // 10 % len(BAD)]
        else:
            yield _body(f"Write {number} as a word, please.")


def _body(prompt: str) -> str:
    return json.dumps({"prompts": [prompt]})


def main() -> None:
    """Run, write, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench")
    parser.add_argument("--quick", action="store_true", help="10,000 requests, which prove little.")
    options = parser.parse_args()
    end_on_signals()
    try:
        report = soak(options.out.resolve(), N_QUICK if options.quick else N_MEASURED)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: stopped; nothing was written")
    (options.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{report['n_requests']} requests at {report['rps']:.0f}/s: {report['first_mb']:.1f} to "
        f"{report['last_mb']:.1f} MB, {report['bytes_per_1000_requests']:.0f} bytes per 1,000 requests; "
        f"growth {report['percent']:.2f} %, goal below {GOAL_PERCENT:g} %: "
        f"{'met' if report['met'] else 'MISSED'}"
    )
    print(f"Written: {options.out / 'soak.json'}")


def soak(out: Path, n_measured: int) -> dict[str, Any]:
    """The report.

    Raises:
        BenchError: The service does not start, or a request ended as none should.
    """
    facts = {**commit_facts(), "machine": machine_facts()}
    files = prepare(out / "soak")
    generator = Generator(files.folder)
    bodies = mixed_bodies()
    with persyn(files, engine="auto", decision_cache_mb=_CACHE_MB) as server:
        for _ in range(min(N_WARM_UP, n_measured) // N_PER_SLICE):
            _slice(generator, server, bodies)
        sizes, loads = [resident_bytes(server.pid)], []
        for number in range(n_measured // N_PER_SLICE):
            loads.append(_slice(generator, server, bodies))
            sizes.append(resident_bytes(server.pid))
            tell(f"{(number + 1) * N_PER_SLICE} requests, {sizes[-1] / 1e6:.1f} MB")
    growth = Growth.of([N_PER_SLICE * index for index in range(len(sizes))], sizes)
    return {
        **asdict(growth),
        "goal_percent": GOAL_PERCENT,
        "met": growth.percent < GOAL_PERCENT,
        "n_requests": n_measured,
        "rps": n_measured / sum(load.seconds for load in loads),
        **{name: sum(getattr(load, name) for load in loads) for name in _OUTCOMES},
        **facts,
        "sizes_bytes": sizes,
    }


_OUTCOMES = ("status_2xx", "status_4xx", "status_5xx", "given_up", "broken")


def _slice(generator: Generator, server: Server, bodies: Iterator[str]) -> Load:
    """Some requests at once on new connections.

    Raises:
        BenchError: One was answered by 5xx or not at all, or the bad ones were not refused.
    """
    load = generator.closed(
        server.url,
        list(itertools.islice(bodies, N_PER_SLICE)),
        connections=MIDDLE,
        n_requests=N_PER_SLICE,
        give_up_every=GIVE_UP_EVERY,
        give_up_after_s=_GIVE_UP_AFTER_S,
    )
    if not load.complete or load.status_5xx or load.broken or load.status_4xx != N_PER_SLICE // 10:
        raise BenchError(
            f"{load.status_4xx} requests of {N_PER_SLICE} were refused, expected a tenth; "
            f"{load.status_5xx} failed, {load.broken} broke"
        )
    return load


if __name__ == "__main__":
    main()

"""Measure `POST /route` side by side with the engine alone and with other servers.

    python -m tests.bench.route --out runs/bench [--quick]

Writes route.json and route.md, and shows the same tables. docs/benchmarks.md says how to read them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.route.figures import Measured, as_json, figures
from tests.bench.route.machine import commit_facts, machine_facts, version_facts
from tests.bench.route.measure import FULL, QUICK, Run, Setting, tell
from tests.bench.route.preparation import prepare
from tests.bench.route.processes import ROOT, BenchError, end_on_signals
from tests.bench.route.report import closing_lines, markdown, terminal_tables

ENGINES = ("fp32", "bf16")


def main() -> None:
    """Run, write, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench")
    parser.add_argument("--quick", action="store_true", help="One round over fewer prompts.")
    parser.add_argument("--engines", default=",".join(ENGINES), help="By comma; fp32 among them.")
    parser.add_argument("--infinity", type=Path, default=ROOT / ".venv-infinity", help="Its environment.")
    options = parser.parse_args()
    end_on_signals()
    try:
        report = measure(options)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: stopped; nothing was written")
    (options.out / "route.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "route.md").write_text(markdown(report))
    for table in terminal_tables(report):
        Console().print(table, "", highlight=False)
    for line in (*closing_lines(report), f"Written: {options.out / 'route.md'} and route.json"):
        print(line)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report of one run.

    Raises:
        BenchError: It cannot be measured.
    """
    engines = [engine.strip() for engine in options.engines.split(",")]
    folder: Path = options.out.resolve() / "route"
    facts = {**commit_facts(), "quick": options.quick, "machine": machine_facts()}
    infinity_environment: Path = options.infinity.resolve()
    tell("training a router")
    setting = Setting(prepare(folder), infinity_environment, engines)
    measured = Run(setting, QUICK if options.quick else FULL).whole()
    return report_of(measured, {**facts, "versions": version_facts(infinity_environment)})


def report_of(measured: Measured, facts: dict[str, Any]) -> dict[str, Any]:
    """The figures first, then what they come from."""
    return {**figures(measured), **facts, "detail": as_json(measured)}


if __name__ == "__main__":
    main()

"""What every run begins with: a router trained on the spot."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.bench.route.processes import ROOT, BenchError


@dataclass(frozen=True, slots=True)
class Prepared:
    """Files to serve from."""

    folder: Path
    """For logs and whatever else a run writes."""
    project: Path
    checkpoint: Path
    classifier: Path


def prepare(folder: Path) -> Prepared:
    """Train the router in a process of its own: this one stays without torch and its threads.

    Raises:
        BenchError: It cannot be trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.bench.route.project", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the router could not be trained:\n{done.stderr[-2000:]}")
    return Prepared(folder, folder / "persyn.yaml", folder / "checkpoint", folder / "classifier")

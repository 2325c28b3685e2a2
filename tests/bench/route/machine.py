"""On what a run was measured: the commit, the machine, the versions."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench.route.processes import ROOT

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "fastapi", "uvicorn", "uvloop", "pydantic")
_INFINITY_PACKAGES = ("infinity_emb", "torch", "transformers")


def machine_facts() -> dict[str, Any]:
    """What figures without a ratio depend on."""
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "load_average_at_start": os.getloadavg()[0],
    }


def version_facts(infinity_environment: Path) -> dict[str, Any]:
    """Versions of what is compared; of infinity's environment only what is installed."""
    site = next(iter(infinity_environment.glob("lib/python*/site-packages")), None)
    found = {} if site is None else _versions_in(site)
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "infinity": {name: found.get(name) for name in _INFINITY_PACKAGES},
    }


def commit_facts() -> dict[str, Any]:
    """The commit that is checked out, and whether the files differ from it; unknown outside a checkout."""
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "changed": None if status is None else bool(status),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions_in(site: Path) -> dict[str, str]:
    distributions = importlib.metadata.distributions(path=[str(site)])
    return {item.metadata["Name"].replace("-", "_"): item.version for item in distributions}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

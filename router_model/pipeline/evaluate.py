"""Stage ``evaluate``: checkpoint + score table → ``report.json``, ``report.md`` and pictures."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from router_model.evaluation import evaluate, held_out
from router_model.inference import Router, RouterOutput
from router_model.pipeline.artifacts import write_atomically, write_json
from router_model.pipeline.progress import Progress
from router_model.plots import write_plots
from router_model.report import report_markdown
from router_model.table import read_table

REPORT_FILE = "report.json"
_BATCH = 256


def evaluate_router(checkpoint: Path, scores: Path, folder: Path, *, progress: Progress) -> dict[str, Any]:
    """Judge a router on the prompts of a table that it has not seen, and write the report.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        TableError: The table is malformed, lacks the router's measure of learnability, or leaves no prompt to
            evaluate on.
    """
    router = Router.load(checkpoint)
    table = read_table(scores, learnability=router.manifest.learnability)
    held = held_out(table, router.manifest)
    report = evaluate(_score(router, held.table.prompts, progress), held, router.manifest)
    write_json(folder / REPORT_FILE, report)
    write_plots(report, folder)
    write_atomically(folder / "report.md", report_markdown(report).encode())
    return report


def _score(router: Router, prompts: tuple[str, ...], progress: Progress) -> RouterOutput:
    progress.start("evaluate", total=len(prompts))
    outputs = []
    for start in range(0, len(prompts), _BATCH):
        outputs.append(router.score(prompts[start : start + _BATCH]))
        progress.advance(len(prompts[start : start + _BATCH]))
    progress.finish()
    names = [item.name for item in dataclasses.fields(RouterOutput)]
    return RouterOutput(
        **{name: np.concatenate([getattr(output, name) for output in outputs]) for name in names}
    )

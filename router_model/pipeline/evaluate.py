"""Stage ``evaluate``: checkpoint + score table → ``report.json``, ``report.md`` and pictures."""

from pathlib import Path
from typing import Any

from router_model.embedding_cache import encode_all
from router_model.evaluation import evaluate
from router_model.evaluation_set import held_out
from router_model.inference import Router
from router_model.pipeline.artifacts import write_atomically, write_json
from router_model.pipeline.progress import Progress
from router_model.plots import write_plots
from router_model.report import report_markdown
from router_model.table import read_table

REPORT_FILE = "report.json"


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
    progress.start("evaluate", total=held.table.n_prompts)
    encoded = encode_all(router.backbone, held.table.prompts, progress=progress.advance)
    progress.finish()
    output, baselines = router.answer(encoded), router.baselines(encoded)
    report = evaluate(output, held, router.manifest, baselines=baselines)
    write_json(folder / REPORT_FILE, report)
    write_plots(report, folder)
    write_atomically(folder / "report.md", report_markdown(report).encode())
    return report

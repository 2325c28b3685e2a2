"""Commands from prompts to a judged router: ``collect``, ``score``, ``train``, ``evaluate``, ``run``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.types import HeadChoice, LearnabilityMeasure
from service.options import DEFAULT_CONFIG, ConfigOption, JsonOption, RunOption, SeedOption, StudentOption
from service.progress import progress_for
from service.terminal import EXIT_FAILED, EXIT_SOME_FAILED, show, stopped

if TYPE_CHECKING:
    from router_model.pipeline.generation import GenerationResult
    from router_model.pipeline.train import TrainResult, TrainSettings
    from router_model.recipe import FineTuneRecipe


def collect(
    run: RunOption,
    config: ConfigOption = DEFAULT_CONFIG,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="In place of calibration.prompts.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let every teacher answer the calibration prompts. Resumable."""
    from router_model.pipeline.collect import collect as collect_stage
    from router_model.pipeline.config import load_project

    with progress_for() as progress:
        result = collect_stage(load_project(config), run, progress=progress, prompts_path=prompts)
    _finish_generation(result, run, as_json)


def score(
    run: RunOption,
    config: ConfigOption = DEFAULT_CONFIG,
    student: StudentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge quality and learnability of the collected answers: RUN/scores.parquet. Resumable."""
    from router_model.pipeline.config import load_project
    from router_model.pipeline.score import score as score_stage

    with progress_for() as progress:
        result = score_stage(load_project(config), run, progress=progress, student_id=student)
    show(
        {
            "scores": str(result.path),
            "rows": result.n_rows,
            "missing": result.n_missing,
            "unscorable": result.n_unscorable,
        },
        as_json,
        [
            f"{result.n_rows} scored answers in {result.path}"
            + (f"; {result.n_missing} cells have no answer" if result.n_missing else "")
            + (f"; {result.n_unscorable} answers could not be scored" if result.n_unscorable else "")
        ],
    )
    if result.n_missing or result.n_unscorable:
        raise typer.Exit(EXIT_SOME_FAILED)


def train(
    context: typer.Context,
    scores: Annotated[Path, typer.Option("--scores", help="Score table, .parquet or .jsonl.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the checkpoint.")],
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", help="Hub id, folder or .gguf file; by default the recipe's."),
    ] = None,
    student: Annotated[str, typer.Option("--student", help="Student id.")] = "student",
    student_family: Annotated[str | None, typer.Option("--student-family")] = None,
    alpha: Annotated[float, typer.Option("--alpha", min=0.0, max=1.0, help="Weight of learnability.")] = 0.4,
    learnability: Annotated[
        LearnabilityMeasure, typer.Option("--learnability", help="Measure of learnability.")
    ] = "mean_logprob",
    head: Annotated[HeadChoice, typer.Option("--head")] = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8)] = 2048,
    views: Annotated[
        str | None, typer.Option("--views", help="Hidden states to use, such as last@22,mean@15.")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option("--embeddings", help="Cache of embeddings; by default in the user's cache folder."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Fine-tune the backbone by this file (see recipes/); for a GPU."),
    ] = None,
    quality_from: Annotated[
        Path | None,
        typer.Option("--quality-from", help="Take the quality heads of this checkpoint; fit learnability."),
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a router on a score table."""
    from router_model.evaluation import fallen_back_because
    from router_model.pipeline.train import TrainSettings, parse_views

    plan = None if recipe is None else _read_recipe(recipe)
    if backbone is None and plan is not None:
        backbone = plan.backbone
    if backbone is None:
        raise typer.BadParameter("give a backbone, or a recipe that names one", param_hint="--backbone")
    if plan is not None:
        _refuse_beside_recipe(context)
    settings = TrainSettings(
        student=student,
        student_family=student_family,
        backbone=backbone,
        head=head,
        alpha=alpha,
        learnability=learnability,
        seed=seed,
        max_tokens=max_tokens,
        views=parse_views(views),
    )
    result = _trained(scores, out, settings, plan, embeddings, quality_from=quality_from)
    lines = [
        f"router {result.checkpoint_id[:12]} for {student!r}: head {result.head!r} on "
        f"{result.n_prompts} prompts x {result.n_teachers} teachers, in {out}",
        *([] if result.helps else [fallen_back_because(result.n_prompts)]),
    ]
    show(result.as_json(), as_json, lines)


def _trained(
    scores: Path,
    out: Path,
    settings: "TrainSettings",
    recipe: "FineTuneRecipe | None",
    embeddings: Path | None,
    *,
    quality_from: Path | None,
) -> "TrainResult":
    """A router on a frozen backbone, or on one that the recipe fine-tunes."""
    with progress_for() as progress:
        if recipe is not None:
            from router_model.pipeline.fine_tune import fine_tune_router

            return fine_tune_router(scores, out, settings, recipe, progress=progress)
        from router_model.pipeline.train import train_router
        from service.settings import cache_folder

        cache = embeddings or cache_folder() / "embeddings.sqlite"
        return train_router(
            scores, out, settings, progress=progress, embeddings=cache, quality_from=quality_from
        )


def _refuse_beside_recipe(context: typer.Context) -> None:
    """An option that a recipe decides, or has no use for, would be dropped without a word."""
    for name in ("alpha", "head", "max_tokens", "views", "embeddings", "quality_from"):
        # By name: newer releases of typer carry a copy of click, so the enumeration has no one home.
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter("the recipe decides this: leave the option out", param_hint=option)


def _read_recipe(path: Path) -> "FineTuneRecipe":
    from router_model.recipe import read_recipe

    return read_recipe(path)


def evaluate(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="Folder of the checkpoint.")],
    scores: Annotated[Path, typer.Option("--scores", help="Score table, .parquet or .jsonl.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")],
    as_json: JsonOption = False,
) -> None:
    """Compare the router with best single, random, oracle and the other strategies on held-out prompts."""
    from router_model.pipeline.evaluate import evaluate_router
    from router_model.report import summary_lines

    with progress_for() as progress:
        report = evaluate_router(checkpoint, scores, out, progress=progress)
    show(report, as_json, [*summary_lines(report), f"report: {out / 'report.md'}"])


def run_command(
    config: ConfigOption = DEFAULT_CONFIG,
    student: StudentOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the run; that of the checkpoint if absent.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Collect, score, train and evaluate. Resumable."""
    from router_model.pipeline.config import load_project
    from router_model.pipeline.run import run_pipeline
    from router_model.report import summary_lines

    with progress_for() as progress:
        result = run_pipeline(load_project(config), progress=progress, student_id=student, run_folder=run)
    if result.interrupted:
        stopped()
    show(
        {
            "failed": result.n_failed,
            "checkpoint": str(result.checkpoint),
            "report": str(result.report_folder),
            "verdict": result.report["verdict"],
        },
        as_json,
        [*summary_lines(result.report), f"report: {result.report_folder / 'report.md'}"],
    )
    if result.n_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _finish_generation(result: "GenerationResult", run: Path, as_json: bool) -> None:
    facts = {
        "generated": result.n_generated,
        "reused": result.n_reused,
        "failed": len(result.failures),
        "cost_usd": result.cost_usd,
        "run": str(run),
    }
    lines = [
        f"{result.n_generated} answers generated, {result.n_reused} kept from before, "
        f"{len(result.failures)} failed, ${result.cost_usd:.4f}"
    ]
    reasons = sorted({failure.reason for failure in result.failures})
    lines += [f"  {reason}" for reason in reasons[:5]]
    if len(reasons) > 5:
        lines.append(f"  and {len(reasons) - 5} more reasons in {run / 'failures.jsonl'}")
    show(facts, as_json, lines)
    if result.interrupted:
        stopped()
    if result.failures:
        raise typer.Exit(EXIT_FAILED if not result.n_generated + result.n_reused else EXIT_SOME_FAILED)

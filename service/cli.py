"""The ``persyn`` command. Each stage is imported only when it is called."""

import asyncio
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from clients.errors import ConfigurationError, PersynError
from clients.types import CAR_BETA, MIX_STRONG_SHARE, HeadChoice
from service.decision_text import by_share, decision_lines
from service.options import (
    AlphaOption,
    CarBetaOption,
    CostWeightOption,
    ExcludeOption,
    MixStrongShareOption,
    StrategyOption,
    TeachersOption,
    TemperatureOption,
    TopKOption,
)
from service.progress import progress_for

if TYPE_CHECKING:
    from router_model.pipeline.check import Finding
    from router_model.pipeline.generation import GenerationResult
    from router_model.recipe import FineTuneRecipe

EXIT_FAILED, EXIT_SOME_FAILED = 1, 3
"""Beside 0 for done, and 2 for wrong usage, which typer sets."""


class Commands(TyperGroup):
    """The commands. Ctrl-C in any of them is told as a stop that can be resumed."""

    @override
    def invoke(self, ctx: Any) -> Any:
        """See ``TyperGroup.invoke``. Caught here because typer would make exit code 130 of it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _stopped()


class ServeCommand(TyperCommand):
    """``persyn serve``, whose help lists the settings. They are imported only when that is asked for."""

    @override
    def format_help(self, ctx: Any, formatter: Any) -> None:
        """See ``TyperCommand.format_help``."""
        from service.server import settings_table

        super().format_help(ctx, formatter)
        Console().print(settings_table())


app = typer.Typer(
    cls=Commands,
    name="persyn",
    help="Route each prompt to the teacher whose answer is good and learnable for your student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MeasureName = Literal["mean_logprob", "rank_surprisal", "local_logprob"]

ConfigOption = Annotated[Path, typer.Option("-c", "--config", help="The project file.")]
RunOption = Annotated[Path, typer.Option("--run", help="Folder of the run.")]
PromptsOption = Annotated[Path, typer.Option("--prompts", help="JSONL, Parquet or OpenAI batch input.")]
StudentOption = Annotated[str | None, typer.Option("--student", help="Student id; the first if absent.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

DEFAULT_CONFIG = Path("persyn.yaml")

_FALLEN_BACK = "cross-validation found no gain over the best single teacher: the router falls back to it"


def main() -> None:
    """Run the command line; an error of PerSyn or of the machine becomes one message and exit code 1."""
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    try:
        app()
    except (PersynError, OSError) as error:
        # OSError: a full disk, a path that may not be read. Told in one line, as it is no bug.
        detail = _reason(error)
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "detail": detail}))
        Console(stderr=True).print(f"[red]error:[/red] {escape(detail)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write the example.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Write an example project: persyn.yaml, its schema, and three prompts."""
    from router_model.pipeline.artifacts import write_atomically, write_jsonl
    from router_model.pipeline.config import EXAMPLE_PROMPTS, SCHEMA_FILE, example_project, schema_text

    project_file, prompts_file = folder / "persyn.yaml", folder / "prompts.jsonl"
    for path in (project_file, prompts_file):
        if path.exists():
            raise ConfigurationError(f"{path} exists already and is left as it is")
    write_atomically(project_file, example_project().encode())
    write_atomically(folder / SCHEMA_FILE, schema_text().encode())
    write_jsonl(prompts_file, EXAMPLE_PROMPTS)
    lines = [f"wrote {project_file}, {SCHEMA_FILE} and {prompts_file.name}"]
    lines.append(f"next: persyn check -c {project_file}")
    _show({"files": [str(project_file), str(folder / SCHEMA_FILE), str(prompts_file)]}, as_json, lines)


@app.command()
def schema(_as_json: JsonOption = False) -> None:
    """Print the JSON Schema of persyn.yaml. It is JSON with and without --json."""
    from router_model.pipeline.config import schema_text

    print(schema_text(), end="")


@app.command()
def check(
    config: ConfigOption = DEFAULT_CONFIG,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="A score table to validate as well, .parquet or .jsonl.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate the project; probe teachers, cache, models and checkpoints. Exit 1 if something would fail."""
    from router_model.pipeline.check import check_project, check_scores
    from router_model.pipeline.config import load_project

    findings = [*check_project(config), _check_cache(config)]
    if scores is not None:
        findings.append(check_scores(scores, load_project(config).reward.learnability))
    table = Table("", "what", "finding", box=None)
    marks = {"ok": "[green]ok[/green]", "warning": "[yellow]warn[/yellow]", "failed": "[red]FAIL[/red]"}
    for finding in findings:
        table.add_row(marks[finding.state], escape(finding.subject), escape(finding.detail))
    if as_json:
        print(json.dumps({"findings": [finding.as_json() for finding in findings]}, indent=2))
    else:
        Console().print(table)
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command()
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


@app.command()
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
    _show(
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


def _read_recipe(path: Path) -> "FineTuneRecipe":
    from router_model.recipe import read_recipe

    return read_recipe(path)


@app.command()
def train(
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
        MeasureName, typer.Option("--learnability", help="Measure of learnability.")
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
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a router on a score table."""
    from router_model.pipeline.train import TrainSettings, parse_views, train_router

    plan = None if recipe is None else _read_recipe(recipe)
    if backbone is None:
        if plan is None:
            raise typer.BadParameter("give a backbone, or a recipe that names one", param_hint="--backbone")
        backbone = plan.backbone
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
    with progress_for() as progress:
        if plan is not None:
            from router_model.pipeline.fine_tune import fine_tune_router

            result = fine_tune_router(scores, out, settings, plan, progress=progress)
        else:
            from service.settings import cache_folder

            cache = embeddings or cache_folder() / "embeddings.sqlite"
            result = train_router(scores, out, settings, progress=progress, embeddings=cache)
    _show(
        result.as_json(),
        as_json,
        [
            f"router {result.checkpoint_id[:12]} for {student!r}: head {result.head!r} on "
            f"{result.n_prompts} prompts x {result.n_teachers} teachers, in {out}",
            *([] if result.helps else [_FALLEN_BACK]),
        ],
    )


@app.command()
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
    _show(report, as_json, [*summary_lines(report), f"report: {out / 'report.md'}"])


@app.command(name="run")
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
        _stopped()
    _show(
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


@app.command()
def synthesize(
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option("--out", help="Folder of the data set.")],
    config: ConfigOption = DEFAULT_CONFIG,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="That of the student if absent.")
    ] = None,
    student: StudentOption = None,
    strategy: StrategyOption = "persyn",
    teachers: TeachersOption = None,
    exclude: ExcludeOption = None,
    alpha: AlphaOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    cost_weight: CostWeightOption = 0.0,
    top_k: TopKOption = None,
    mix_strong_share: MixStrongShareOption = MIX_STRONG_SHARE,
    car_beta: CarBetaOption = CAR_BETA,
    as_json: JsonOption = False,
) -> None:
    """Route each prompt, let its teacher answer, and write a data set. Resumable."""
    from router_model.pipeline.config import load_project
    from router_model.pipeline.synthesize import SynthesisSettings, synthesize_dataset
    from router_model.strategies import RouteOptions

    options = RouteOptions(
        strategy=strategy,
        teachers=teachers or None,
        exclude=exclude or (),
        alpha=alpha,
        temperature=temperature,
        seed=seed,
        cost_weight=cost_weight,
        top_k=top_k,
        mix_strong_share=mix_strong_share,
        car_beta=car_beta,
    )
    with progress_for() as progress:
        result = synthesize_dataset(
            load_project(config),
            prompts,
            out,
            SynthesisSettings(options, command=_command_line()),
            progress=progress,
            student_id=student,
            checkpoint=checkpoint,
        )
    if result.interrupted:
        _stopped()
    _show(
        result.as_json(),
        as_json,
        [
            f"{result.summary.n_rows} records in {out}, {result.summary.n_failures} prompts without one, "
            f"${result.summary.cost_usd:.4f}",
            *(f"  {share:>6.1%}  {teacher}" for teacher, share in result.summary.shares.items()),
        ],
    )
    if result.summary.n_failures:
        raise typer.Exit(EXIT_SOME_FAILED if result.summary.n_rows else EXIT_FAILED)


@app.command(cls=ServeCommand)
def serve(
    config: ConfigOption = DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option("--host", help="In place of PERSYN_HOST.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="In place of PERSYN_PORT.")
    ] = None,
    _as_json: Annotated[
        bool, typer.Option("--json", help="Print an error as JSON; logs stay as PERSYN_LOG_FORMAT says.")
    ] = False,
) -> None:
    """Serve /route and /synthesize over HTTP, until Ctrl-C or SIGTERM.

    Every other setting of the process is an environment variable PERSYN_*, listed below.
    """
    from router_model.pipeline.config import load_project
    from service.server import serve_project
    from service.settings import load_settings

    project = load_project(config)
    settings = load_settings(known=project.key_variables(), host=host, port=port)
    serve_project(settings, project.project())


@app.command()
def route(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    config: ConfigOption = DEFAULT_CONFIG,
    student: StudentOption = None,
    strategy: StrategyOption = "persyn",
    teachers: TeachersOption = None,
    exclude: ExcludeOption = None,
    alpha: AlphaOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    cost_weight: CostWeightOption = 0.0,
    top_k: TopKOption = None,
    mix_strong_share: MixStrongShareOption = MIX_STRONG_SHARE,
    car_beta: CarBetaOption = CAR_BETA,
    as_json: JsonOption = False,
) -> None:
    """Show which teacher suits a prompt, as a bar chart. No teacher is asked."""
    from router_model.inference import Router
    from router_model.pipeline.config import load_project
    from router_model.pipeline.decisions import decide_all, known_prices
    from router_model.pipeline.prompts import prompt_from_text
    from router_model.strategies import RouteOptions

    project = load_project(config)
    options = RouteOptions(
        strategy=strategy,
        teachers=teachers or None,
        exclude=exclude or (),
        alpha=alpha,
        temperature=temperature,
        seed=seed,
        cost_weight=cost_weight,
        top_k=top_k,
        mix_strong_share=mix_strong_share,
        car_beta=car_beta,
        prices=known_prices(project.teacher_specs(with_keys=False)),
    )
    router = Router.load(Path(project.student(student).checkpoint), moved_to=project.router.backbone)
    decision = decide_all(router, [prompt_from_text(prompt)], options)[0]
    result = {
        "teacher": decision.teacher,
        "strategy": strategy,
        "alpha": router.manifest.alpha if alpha is None else alpha,
        "distribution": dict(by_share(decision)),
        "margin": decision.margin,
        "uncertain": decision.uncertain,
        "conformal_set": list(decision.conformal_set),
        "out_of_distribution": decision.out_of_distribution,
    }
    _show(result, as_json, decision_lines(decision))


def _check_cache(config: Path) -> "Finding":
    """Whether the response cache that ``persyn serve`` would use answers, and its settings are valid."""
    from router_model.pipeline.check import Finding
    from router_model.pipeline.config import load_project
    from service.server import ping_cache
    from service.settings import load_settings

    try:
        settings = load_settings(known=load_project(config).key_variables())
        return Finding("ok", "response cache", asyncio.run(ping_cache(settings)))
    except (PersynError, OSError) as error:
        return Finding("failed", "response cache", _reason(error))


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
    _show(facts, as_json, lines)
    if result.interrupted:
        _stopped()
    if result.failures:
        raise typer.Exit(EXIT_FAILED if not result.n_generated + result.n_reused else EXIT_SOME_FAILED)


def _show(result: Mapping[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for line in lines:
        print(line)


def _reason(error: PersynError | OSError) -> str:
    if isinstance(error, PersynError):
        return error.message
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _stopped() -> NoReturn:
    print(f"stopped; what is finished is kept. Resume with:\n  {_command_line()}", file=sys.stderr)
    sys.exit(EXIT_FAILED)


def _command_line() -> str:
    return shlex.join(["persyn", *sys.argv[1:]])


if __name__ == "__main__":
    main()

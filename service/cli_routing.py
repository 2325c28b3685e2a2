"""Commands that use a trained router: ``plan``, ``synthesize``, ``route``, ``serve``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand
from typing_extensions import override

from service.decision_text import by_share, decision_lines
from service.options import (
    DEFAULT_CONFIG,
    CheckpointOption,
    Choosing,
    ConfigOption,
    JsonOption,
    PromptsOption,
    StudentOption,
    given_choosing,
    with_choosing,
)
from service.plan_text import plan_lines
from service.progress import progress_for
from service.terminal import EXIT_FAILED, EXIT_SOME_FAILED, command_line, show, stopped

if TYPE_CHECKING:
    from router_model.share_range import ShareRange


@with_choosing
def plan(
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option("--out", help="Folder of the plan.")],
    config: ConfigOption = DEFAULT_CONFIG,
    checkpoint: CheckpointOption = None,
    student: StudentOption = None,
    budget_usd: Annotated[
        float | None,
        typer.Option("--budget-usd", min=0.0, max=1e12, help="Limit of the expected cost of all answers."),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(
            "--share",
            metavar="TEACHER=MIN..MAX",
            help="Limits of a teacher's share, such as big=5%..20%, big=0.05.. or big=..20%; repeatable.",
        ),
    ] = None,
    *,
    choosing: Choosing,
    as_json: JsonOption = False,
) -> None:
    """Choose the teachers of a whole corpus, under a budget and shares, for synthesize --plan.

    No teacher is asked.
    """
    from router_model.pipeline.config import load_project
    from router_model.pipeline.plan import PlanSettings, make_plan

    settings = PlanSettings(choosing.options(), budget_usd, [_share(text) for text in share or ()])
    with progress_for() as progress:
        facts = make_plan(
            load_project(config),
            prompts,
            out,
            settings,
            progress=progress,
            student_id=student,
            checkpoint=checkpoint,
        )
    show({**facts, "folder": str(out)}, as_json, [*plan_lines(facts), f"plan: {out}"])


def _share(text: str) -> "ShareRange":
    from router_model.errors import StrategyError
    from router_model.share_range import parse_share

    try:
        return parse_share(text)
    except StrategyError as error:
        raise typer.BadParameter(error.message, param_hint="--share") from error


@with_choosing
def synthesize(
    context: typer.Context,
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option("--out", help="Folder of the data set.")],
    config: ConfigOption = DEFAULT_CONFIG,
    checkpoint: CheckpointOption = None,
    student: StudentOption = None,
    plan_folder: Annotated[
        Path | None, typer.Option("--plan", help="Folder of a plan: teachers are taken from it.")
    ] = None,
    *,
    choosing: Choosing,
    as_json: JsonOption = False,
) -> None:
    """Route each prompt, let its teacher answer, and write a data set. Resumable."""
    from router_model.pipeline.config import load_project
    from router_model.pipeline.synthesize import SynthesisSettings, synthesize_dataset

    with progress_for() as progress:
        result = synthesize_dataset(
            load_project(config),
            prompts,
            out,
            SynthesisSettings(
                choosing.options(),
                command=command_line(),
                plan=plan_folder,
                given=given_choosing(context),
            ),
            progress=progress,
            student_id=student,
            checkpoint=checkpoint,
        )
    if result.interrupted:
        stopped()
    show(
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


@with_choosing
def route(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    config: ConfigOption = DEFAULT_CONFIG,
    student: StudentOption = None,
    *,
    choosing: Choosing,
    as_json: JsonOption = False,
) -> None:
    """Show which teacher suits a prompt, as a bar chart. No teacher is asked."""
    from router_model.inference import Router
    from router_model.pipeline.config import load_project
    from router_model.pipeline.decisions import decide_all, known_prices
    from router_model.pipeline.prompts import prompt_from_text

    project = load_project(config)
    prices = known_prices(project.teacher_specs(with_keys=False))
    options = replace(choosing.options(), prices=prices)
    router = Router.load(Path(project.student(student).checkpoint), moved_to=project.router.backbone)
    decision = decide_all(router, [prompt_from_text(prompt)], options)[0]
    result = {
        "teacher": decision.teacher,
        "strategy": choosing.strategy,
        "alpha": router.manifest.alpha if choosing.alpha is None else choosing.alpha,
        "distribution": dict(by_share(decision)),
        "margin": decision.margin,
        "uncertain": decision.uncertain,
        "conformal_set": list(decision.conformal_set),
        "out_of_distribution": decision.out_of_distribution,
    }
    show(result, as_json, decision_lines(decision))


class ServeCommand(TyperCommand):
    """``persyn serve``, whose help lists the settings. They are imported only when that is asked for."""

    @override
    def format_help(self, ctx: Any, formatter: Any) -> None:
        """See ``TyperCommand.format_help``."""
        from service.server import settings_table

        super().format_help(ctx, formatter)
        Console().print(settings_table())


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
    from service.settings import load_settings, prepare_runtime

    prepare_runtime()
    from router_model.pipeline.config import load_project
    from service.server import serve_project

    project = load_project(config)
    settings = load_settings(known=project.key_variables(), host=host, port=port)
    serve_project(settings, project.project())

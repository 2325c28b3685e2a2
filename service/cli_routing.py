"""Commands that use a trained router: ``synthesize``, ``route``, ``serve``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand
from typing_extensions import override

from service.decision_text import by_share, decision_lines
from service.options import (
    DEFAULT_CONFIG,
    Choosing,
    ConfigOption,
    JsonOption,
    PromptsOption,
    StudentOption,
    with_choosing,
)
from service.progress import progress_for
from service.terminal import EXIT_FAILED, EXIT_SOME_FAILED, command_line, show, stopped


@with_choosing
def synthesize(
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option("--out", help="Folder of the data set.")],
    config: ConfigOption = DEFAULT_CONFIG,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="That of the student if absent.")
    ] = None,
    student: StudentOption = None,
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
            SynthesisSettings(choosing.options(), command=command_line()),
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
    from router_model.pipeline.config import load_project
    from service.server import serve_project
    from service.settings import load_settings

    project = load_project(config)
    settings = load_settings(known=project.key_variables(), host=host, port=port)
    serve_project(settings, project.project())

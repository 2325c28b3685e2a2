"""Commands about the project file: ``init``, ``schema``, ``check``."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clients.errors import ConfigurationError, PersynError
from service.options import DEFAULT_CONFIG, ConfigOption, JsonOption
from service.terminal import EXIT_FAILED, reason, show

if TYPE_CHECKING:
    from router_model.pipeline.check import Finding


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
    show({"files": [str(project_file), str(folder / SCHEMA_FILE), str(prompts_file)]}, as_json, lines)


def schema(_as_json: JsonOption = False) -> None:
    """Print the JSON Schema of persyn.yaml. It is JSON with and without --json."""
    from router_model.pipeline.config import schema_text

    print(schema_text(), end="")


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
        return Finding("failed", "response cache", reason(error))

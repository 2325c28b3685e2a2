"""The ``persyn`` command. Each stage is imported only when it is called."""

import json
import logging
import sys
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup
from typing_extensions import override

from clients.errors import PersynError
from service.cli_labels import advise, extend
from service.cli_project import check, init, schema
from service.cli_routing import ServeCommand, plan, route, serve, synthesize
from service.cli_training import collect, evaluate, run_command, score, train
from service.terminal import EXIT_FAILED, reason, stopped


class Commands(TyperGroup):
    """The commands. Ctrl-C in any of them is told as a stop that can be resumed."""

    @override
    def invoke(self, ctx: Any) -> Any:
        """See ``TyperGroup.invoke``. Caught here because typer would make exit code 130 of it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stopped()


app = typer.Typer(
    cls=Commands,
    name="persyn",
    help="Route each prompt to the teacher whose answer is good and learnable for your student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# In the order of work, which --help keeps.
app.command()(init)
app.command()(check)
app.command()(schema)
app.command()(collect)
app.command()(score)
app.command()(train)
app.command()(evaluate)
app.command()(advise)
app.command()(extend)
app.command(name="run")(run_command)
app.command()(plan)
app.command()(synthesize)
app.command()(route)
app.command(cls=ServeCommand)(serve)


def main() -> None:
    """Run the command line; an error of PerSyn or of the machine becomes one message and exit code 1."""
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    try:
        app()
    except (PersynError, OSError) as error:
        # OSError: a full disk, a path that may not be read. Told in one line, as it is no bug.
        detail = reason(error)
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "detail": detail}))
        Console(stderr=True).print(f"[red]error:[/red] {escape(detail)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()

"""Options that several commands take, among them those that say how teachers are chosen."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.types import CAR_BETA, MIX_STRONG_SHARE, Strategy

if TYPE_CHECKING:
    from router_model.strategies import RouteOptions

ConfigOption = Annotated[Path, typer.Option("-c", "--config", help="The project file.")]
RunOption = Annotated[Path, typer.Option("--run", help="Folder of the run.")]
PromptsOption = Annotated[Path, typer.Option("--prompts", help="JSONL, Parquet or OpenAI batch input.")]
StudentOption = Annotated[str | None, typer.Option("--student", help="Student id; the first if absent.")]
CheckpointOption = Annotated[Path | None, typer.Option("--checkpoint", help="That of the student if absent.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

DEFAULT_CONFIG = Path("persyn.yaml")


@dataclass(frozen=True, slots=True)
class Choosing:
    """How teachers are chosen, by the command line. The names are those of ``RouteRequest``."""

    strategy: Annotated[Strategy, typer.Option("--strategy", help="How teachers are chosen.")] = "persyn"
    teachers: Annotated[
        list[str] | None, typer.Option("--teacher", help="Allow this teacher; repeatable. All if absent.")
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Never choose this teacher; repeatable.")
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha", min=0.0, max=1.0, help="Weight of learnability; that of the checkpoint if absent."
        ),
    ] = None
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, max=100.0, help="0 takes the best. Of persyn alone."),
    ] = 0.0
    seed: SeedOption = 0
    cost_weight: Annotated[
        float,
        typer.Option(
            "--cost-weight",
            min=0.0,
            max=1e9,
            help="What a US dollar of expected cost takes off the value that the strategy ranks by.",
        ),
    ] = 0.0
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Only the k strongest teachers stay candidates.")
    ] = None
    mix_strong_share: Annotated[
        float,
        typer.Option("--mix-strong-share", min=0.0, max=1.0, help="Share of the strongest teacher in mix."),
    ] = MIX_STRONG_SHARE
    car_beta: Annotated[
        float, typer.Option("--car-beta", min=0.0, max=1e6, help="Weight of the student's loss in car.")
    ] = CAR_BETA

    def options(self) -> "RouteOptions":
        """The same as the router takes them, without prices.

        Raises:
            StrategyError: An option has no meaning for the strategy.
        """
        from router_model.strategies import RouteOptions

        return RouteOptions(
            strategy=self.strategy,
            teachers=self.teachers or None,
            exclude=self.exclude or (),
            alpha=self.alpha,
            temperature=self.temperature,
            seed=self.seed,
            cost_weight=self.cost_weight,
            top_k=self.top_k,
            mix_strong_share=self.mix_strong_share,
            car_beta=self.car_beta,
        )


def with_choosing(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``Choosing`` in the place of its parameter ``choosing``.

    typer reads a command's options off its signature, so the signature is what is changed.
    """
    chosen = inspect.signature(Choosing).parameters
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += chosen.values() if name == "choosing" else [parameter]

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        choosing = Choosing(**{field.name: arguments.pop(field.name) for field in fields(Choosing)})
        command(**arguments, choosing=choosing)

    keyword_only = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    vars(wrapped)["__signature__"] = inspect.Signature(keyword_only)
    return wrapped


def given_choosing(context: typer.Context) -> frozenset[str]:
    """Names of the options of ``Choosing`` that the command line states, as opposed to defaults."""
    sources = {field.name: context.get_parameter_source(field.name) for field in fields(Choosing)}
    return frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")

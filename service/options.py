"""Options of the command line that say how teachers are chosen. Their names are those of ``RouteRequest``."""

from typing import Annotated

import typer

from clients.types import Strategy

StrategyOption = Annotated[Strategy, typer.Option("--strategy", help="How teachers are chosen.")]
TeachersOption = Annotated[
    list[str] | None, typer.Option("--teacher", help="Allow this teacher; repeatable. All if absent.")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", help="Never choose this teacher; repeatable.")
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        "--alpha", min=0.0, max=1.0, help="Weight of learnability; that of the checkpoint if absent."
    ),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, max=100.0, help="0 takes the best. Of persyn alone.")
]
CostWeightOption = Annotated[
    float,
    typer.Option(
        "--cost-weight",
        min=0.0,
        max=1e9,
        help="What a US dollar of expected cost takes off the value that the strategy ranks by.",
    ),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", min=1, help="Only the k strongest teachers stay candidates.")
]
MixStrongShareOption = Annotated[
    float,
    typer.Option("--mix-strong-share", min=0.0, max=1.0, help="Share of the strongest teacher in mix."),
]
CarBetaOption = Annotated[
    float, typer.Option("--car-beta", min=0.0, max=1e6, help="Weight of the student's loss in car.")
]

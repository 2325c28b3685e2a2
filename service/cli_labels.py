"""The commands about labels: which prompts to label next, and teachers that come later."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli import JsonOption, PromptsOption, app, show
from service.progress import progress_for

CheckpointOption = Annotated[Path, typer.Option("--checkpoint", help="Folder of the checkpoint.")]
EmbeddingsOption = Annotated[
    Path | None,
    typer.Option("--embeddings", help="Cache of embeddings; by default in the user's cache folder."),
]

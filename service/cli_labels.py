"""Commands about labels that a router has not seen: which to make next, and those of new teachers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.options import JsonOption, PromptsOption
from service.progress import progress_for
from service.terminal import show

if TYPE_CHECKING:
    from router_model.pipeline.advise import AdviseResult

CheckpointOption = Annotated[Path, typer.Option("--checkpoint", help="Folder of the checkpoint.")]
EmbeddingsOption = Annotated[
    Path | None,
    typer.Option("--embeddings", help="Cache of embeddings; by default in the user's cache folder."),
]


def advise(
    checkpoint: CheckpointOption,
    prompts: PromptsOption,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many prompts can be labelled.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL file of the chosen prompts, best first.")],
    for_new_teacher: Annotated[
        bool,
        typer.Option(
            "--for-new-teacher", help="Choose probes of a new teacher: the prompts that cover the file best."
        ),
    ] = False,
    embeddings: EmbeddingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose the prompts that are worth labelling next, and say whether more labels would pay."""
    from router_model.pipeline.advise import advise_labels

    with progress_for() as progress:
        result = advise_labels(
            checkpoint,
            prompts,
            n,
            out,
            for_new_teacher=for_new_teacher,
            progress=progress,
            embeddings=_cache(embeddings),
        )
    show(result.as_json(), as_json, _advice_lines(result))


def _advice_lines(result: "AdviseResult") -> list[str]:
    n_chosen = len(result.prompt_ids)
    if not n_chosen:
        return ["no prompt is chosen: the router has seen all of them in training"]
    return [
        f"{n_chosen} of {result.n_prompts} prompts in {result.path}, best first",
        f"labels: {result.label_advice['text']}",
        f"next: persyn collect --prompts {result.path} --run DIR",
    ]


def extend(
    checkpoint: CheckpointOption,
    scores: Annotated[
        Path,
        typer.Option("--scores", help="Score table with answers of the new and of known teachers."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the extended checkpoint.")],
    teachers: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher", help="Teacher to add; repeatable. All unknown ones of the table if absent."
        ),
    ] = None,
    embeddings: EmbeddingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add teachers to a router from their answers to a few prompts; nothing else is trained again."""
    from router_model.pipeline.extend import extend_router

    with progress_for() as progress:
        result = extend_router(
            checkpoint,
            scores,
            out,
            teachers=teachers or None,
            progress=progress,
            embeddings=_cache(embeddings),
        )
    lines = [f"router {result.checkpoint_id[:12]} for {result.n_teachers} teachers, in {out}"]
    lines += [
        f"  {teacher.id}: {teacher.n_probes} probes"
        + (", a constant quality: they tell no more than its mean" if teacher.constant else "")
        for teacher in result.added
    ]
    show(result.as_json(), as_json, lines)


def _cache(embeddings: Path | None) -> Path:
    from service.settings import cache_folder

    return embeddings or cache_folder() / "embeddings.sqlite"

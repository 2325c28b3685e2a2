"""Stage ``advise``: checkpoint + prompts → the prompts that are worth labelling next."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router_model.doubt import expected_loss
from router_model.embedding_cache import EmbeddingCache, encode_all
from router_model.errors import TableError
from router_model.inference import Router
from router_model.label_advice import choose_prompts
from router_model.learning_curve import advise
from router_model.pipeline.artifacts import write_jsonl
from router_model.pipeline.progress import Progress
from router_model.pipeline.prompts import read_prompt_rows
from router_model.tokenization import prompt_text


@dataclass(frozen=True, slots=True)
class AdviseResult:
    """The choice, and what more labels are expected to bring."""

    prompt_ids: tuple[str, ...]
    """Best first."""
    n_prompts: int
    """How many there were to choose from."""
    label_advice: dict[str, Any]
    """Of ``learning_curve.advise``."""
    path: Path

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "chosen": list(self.prompt_ids),
            "n_chosen": len(self.prompt_ids),
            "n_prompts": self.n_prompts,
            "label_advice": self.label_advice,
            "prompts": str(self.path),
        }


def advise_labels(
    checkpoint: Path,
    prompts_path: Path,
    n: int,
    out: Path,
    *,
    for_new_teacher: bool,
    progress: Progress,
    embeddings: Path | None = None,
) -> AdviseResult:
    """Choose prompts to label and write their rows as they were, best first.

    For all teachers: those where the router's first choice may cost most, away from each other and from the
    training prompts. For a new teacher: those that cover the file best, whatever is labelled, as the best
    probes are prompts to which the known teachers' answers are there already. Test prompts are passed over.

    Args:
        n: How many; fewer are written if no others differ.
        out: A JSONL file.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        TableError: The prompt file is malformed, or all its prompts are held out as test prompts.
    """
    router = Router.load(checkpoint)
    every_row = read_prompt_rows(prompts_path)
    # What is held out for the report is no use as a label or a probe: training would pass it over.
    rows = [(prompt, raw) for prompt, raw in every_row if raw.get("split") != "test"]
    if every_row and not rows:
        raise TableError(prompts_path, "every prompt is marked as a test prompt: none is left to label")
    texts = [prompt_text(prompt.messages) for prompt, _ in rows]
    cache = None if embeddings is None else EmbeddingCache(embeddings)
    progress.start("encode", total=len(rows))
    encoded = encode_all(router.backbone, texts, cache=cache, progress=progress.advance)
    progress.finish()
    novelty = router.model.novelty
    chosen = choose_prompts(
        novelty.projection(encoded.features_BD),
        np.ones(len(rows)) if for_new_teacher else expected_loss(router.answer(encoded).at()),
        n,
        labelled_LD=None if for_new_teacher else novelty.points_NK,
    )
    write_jsonl(out, [rows[row][1] for row in chosen])
    return AdviseResult(
        prompt_ids=tuple(rows[row][0].id for row in chosen),
        n_prompts=len(rows),
        label_advice=advise(router.manifest.facts.get("label_curve", ())),
        path=out,
    )

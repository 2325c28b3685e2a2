"""The held-out prompts on which a router is judged."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_model.checkpoint import Manifest
from router_model.errors import TableError
from router_model.reward import all_equal
from router_model.table import ScoreTable

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSet:
    """Held-out prompts with the rewards of their responses. Columns are those of the table."""

    table: ScoreTable
    reward_NM: FloatArray
    """At the checkpoint's alpha; NaN where a teacher has no response."""
    columns: tuple[int, ...]
    """Column of the checkpoint for each teacher of the table."""
    notes: tuple[str, ...]


def held_out(table: ScoreTable, manifest: Manifest) -> EvaluationSet:
    """The prompts of a table on which a router may be judged: not marked ``train``, not trained on.

    Raises:
        TableError: No prompt is left, the table has a teacher that the checkpoint does not know, or it lacks
            the learnability that the checkpoint's alpha needs.
    """
    known = [teacher.id for teacher in manifest.teachers]
    strangers = [teacher for teacher in table.teachers if teacher not in known]
    if strangers:
        raise TableError(
            table.source,
            f"has teachers that the checkpoint does not know: {', '.join(map(repr, strangers))}. Leave them "
            "out of the table, or add them to the router by `persyn extend`",
        )
    trained = set(manifest.training.prompt_sha256)
    seen_N = np.array([digest in trained for digest in table.prompt_hashes()])
    marked_N = np.array([split == "train" for split in table.split_N])
    alone_N = ~seen_N & ~marked_N & (table.mask_NM.sum(axis=1) < 2)
    kept_N = ~seen_N & ~marked_N & ~alone_N
    if not kept_N.any():
        n_marked = int((marked_N & ~seen_N).sum())
        raise TableError(
            table.source,
            f"has no prompt to evaluate on: of {table.n_prompts}, {int(seen_N.sum())} were trained on, "
            f"{n_marked} others are marked 'train', and {int(alone_N.sum())} have fewer than two responses. "
            "Give a table of other prompts with several teachers' responses, or mark some with "
            "split = 'test' before training",
        )
    chosen = table.select(kept_N)
    n_dropped = table.n_prompts - chosen.n_prompts
    notes = [f"{n_dropped} prompts were left out: trained on, or with one response only"] if n_dropped else []
    absent = [name for name in known if name not in table.teachers]
    notes += [f"the table has no responses of {', '.join(absent)}"] if absent else []
    columns = tuple(known.index(name) for name in table.teachers)
    if manifest.alpha > 0 and table.learnability_NM is None:
        raise TableError(
            table.source,
            f"has no learnability, but the checkpoint's alpha is {manifest.alpha:g}: score the responses "
            "under the student first, or train a router with alpha 0",
        )
    reward_NM = chosen.rewards(manifest.alpha, manifest.normalization)
    return EvaluationSet(chosen, reward_NM, columns, (*notes, *_notes_on_equals(chosen, reward_NM)))


def _notes_on_equals(table: ScoreTable, reward_NM: FloatArray) -> list[str]:
    """What a table without differences cannot show. A constant is more often a mistake than a finding."""
    if all_equal(reward_NM):
        return [
            "all responses to a prompt have the same reward: this table cannot tell one teacher from another"
        ]
    if table.learnability_NM is not None and all_equal(table.learnability_NM):
        return [
            "all responses to a prompt have the same learnability: quality alone decides at any alpha below 1"
        ]
    return []

"""What a score table says of a new teacher: its answers to prompts that known teachers answered too."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_model.errors import RouterError, TableError
from router_model.known_scale import normalize_beside
from router_model.model import RouterModel
from router_model.reward import Normalization, normalize
from router_model.table import ScoreTable

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IndexArray = NDArray[np.int64]

MIN_PROBES = 5
MIN_KNOWN = 2
"""Known teachers that must have answered a prompt for it to be a probe: one alone spans no scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Values of K answers of the new teacher, and of the M known ones to the same prompts."""

    new_K: FloatArray
    known_KM: FloatArray
    """NaN where a teacher did not answer."""

    def scaled(self, method: Normalization) -> "Values":
        """On the scale that the known teachers of each prompt span."""
        mask_KM = ~np.isnan(self.known_KM)
        return Values(
            normalize_beside(self.new_K, self.known_KM, mask_KM, method),
            normalize(self.known_KM, mask_KM, method),
        )

    def mixed(self, other: "Values | None", alpha: float) -> "Values":
        """Quality, ``self``, and learnability as the reward mixes them."""
        if other is None or alpha == 0.0:
            return self
        return Values(
            (1.0 - alpha) * self.new_K + alpha * other.new_K,
            (1.0 - alpha) * self.known_KM + alpha * other.known_KM,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ProbeAnswers:
    """The probes of one new teacher."""

    teacher: str
    rows_K: IndexArray
    """Of the table."""
    quality: Values
    learnability: Values | None
    """None for a router that knows none."""
    mean_n_tokens: float | None


def probe_answers(model: RouterModel, table: ScoreTable, teacher: str) -> ProbeAnswers:
    """The probes of one new teacher, known teachers in the router's order.

    Raises:
        TableError: There are fewer than ``MIN_PROBES``.
    """
    own = table.teachers.index(teacher)
    columns = [
        table.teachers.index(known.id) if known.id in table.teachers else None for known in model.teachers
    ]

    def known(values_NM: FloatArray) -> FloatArray:
        missing_N = np.full(table.n_prompts, np.nan)
        return np.column_stack([missing_N if column is None else values_NM[:, column] for column in columns])

    n_known_N = (~np.isnan(known(table.quality_NM))).sum(axis=1)
    rows_K = np.flatnonzero(table.mask_NM[:, own] & (n_known_N >= MIN_KNOWN))
    if len(rows_K) < MIN_PROBES:
        raise TableError(
            table.source,
            f"teacher {teacher!r} has {len(rows_K)} probe prompts, those that {MIN_KNOWN} known teachers or "
            f"more answered as well; at least {MIN_PROBES} are needed, 20 to 100 are advised",
        )

    def values(values_NM: FloatArray) -> Values:
        return Values(values_NM[rows_K, own], known(values_NM)[rows_K])

    n_tokens_K = None if table.n_tokens_NM is None else table.n_tokens_NM[rows_K, own]
    return ProbeAnswers(
        teacher,
        rows_K,
        values(table.quality_NM),
        None
        if model.learnability is None or table.learnability_NM is None
        else values(table.learnability_NM),
        None if n_tokens_K is None or np.isnan(n_tokens_K).all() else float(np.nanmean(n_tokens_K)),
    )


def require_extendable(model: RouterModel, table: ScoreTable, teachers: Sequence[str]) -> None:
    """Refuse what no column can be fitted for, and say why.

    Raises:
        RouterError: The router has one head on the mixed reward, or knows a teacher already.
        TableError: The table lacks a teacher, all known ones, or learnability.
    """
    if model.mode == "paper":
        raise RouterError(
            f"the router has one head of kind {model.kind!r} on the reward mixed at alpha = {model.alpha:g}, "
            "which takes no new teacher: train again with all teachers, or train once with --head auto or "
            "ridge, whose routers can be extended"
        )
    known = [teacher.id for teacher in model.teachers]
    if not teachers:
        raise TableError(table.source, f"has no teacher that the router does not know; it knows {known}")
    for index, name in enumerate(teachers):
        if name in known:
            raise RouterError(f"teacher {name!r} is known to the router already; name new teachers only")
        if name in teachers[:index]:
            raise RouterError(f"teacher {name!r} is named twice; name each new teacher once")
        if name not in table.teachers:
            raise TableError(
                table.source, f"has no answer of teacher {name!r}; its teachers are {list(table.teachers)}"
            )
    if not set(known) & set(table.teachers):
        raise TableError(
            table.source,
            f"has no answer of a teacher that the router knows ({known}). New teachers are measured beside "
            "known ones: put the answers of both to the same prompts into one table",
        )
    if model.learnability is not None and table.learnability_NM is None:
        raise TableError(
            table.source, "has no learnability, which the router predicts: score the responses first"
        )

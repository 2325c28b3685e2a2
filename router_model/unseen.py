"""Predictions for prompts of the training by the ensemble members that have not seen them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.design import Design
from router_model.heads import FeatureArray, Head

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

FOLDS_FACT = "fold_of_prompt"
"""Among a model's facts: for each training prompt the member that was trained without it, -1 for none."""
NO_MEMBER = -1


def fold_of_prompt(design: Design, kept_N: NDArray[np.bool_]) -> list[int]:
    """The fold of the first partition that held each prompt out, for ``FOLDS_FACT``.

    Args:
        kept_N: Which of the training prompts the design holds.
    """
    fold_N = np.full(len(kept_N), NO_MEMBER, dtype=np.int64)
    rows = np.flatnonzero(kept_N)
    for number, fold in enumerate(design.partition):
        fold_N[rows[fold.held_out]] = number
    return [int(number) for number in fold_N]


def unseen_by(facts: Mapping[str, Any], trained: Sequence[str], hashes: Sequence[str]) -> IndexArray:
    """For each prompt the member that was trained without it; -1 for one that no member leaves out.

    Args:
        facts: The model's.
        trained: Hashes of its training prompts, in order.
        hashes: Those of the prompts that are asked about.
    """
    # Of a prompt that stands twice the first counts, as in cross-validation, where its twin was seen too.
    known = dict(zip(reversed(trained), reversed(_padded(facts, len(trained))), strict=True))
    return np.array([known.get(digest, NO_MEMBER) for digest in hashes], dtype=np.int64)


def _padded(facts: Mapping[str, Any], n_prompts: int) -> list[int]:
    """The fact, with no member for prompts that came later."""
    folds = list(facts.get(FOLDS_FACT, ()))
    return folds + [NO_MEMBER] * (n_prompts - len(folds))


def predict_unseen(
    head: Head, members: Sequence[Head], features_BD: FeatureArray, member_B: IndexArray
) -> FloatArray:
    """Predictions of each prompt by its member, and by the head itself where it has none, BM.

    Args:
        member_B: As ``unseen_by`` gives it.
    """
    predicted_BM = head.predict(features_BD)
    for number, member in enumerate(members):
        rows = np.flatnonzero(member_B == number)
        if len(rows):
            predicted_BM[rows] = member.predict(features_BD[rows])
    return predicted_BM

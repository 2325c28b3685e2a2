"""Predictions for prompts of the training by the ensemble members that have not seen them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.design import Design
from router_model.heads import FeatureArray, Head

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

FOLDS_FACT = "fold_of_prompt"
"""Among a model's facts: for each training prompt the member that was trained without it, -1 for none."""
QUALITY_FOLDS_FACT = "quality_fold_of_prompt"
"""The same for quality heads that are another router's."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Unseen:
    """For each of N prompts the member that was trained without it; -1 for one that no member leaves out."""

    quality_N: IndexArray
    learnability_N: IndexArray

    def rows(self, index: IndexArray) -> "Unseen":
        """Of some of the prompts."""
        return Unseen(self.quality_N[index], self.learnability_N[index])


def unseen_by(facts: Mapping[str, Any], trained: Sequence[str], hashes: Sequence[str]) -> Unseen:
    """The members that have not seen some prompts.

    Args:
        facts: The model's.
        trained: Hashes of its training prompts, in order.
        hashes: Those of the prompts that are asked about.
    """

    def members(folds: Sequence[int]) -> IndexArray:
        # Prompts that came later have no fold. Of one that stands twice the first counts, as in
        # cross-validation, where its twin was seen too.
        padded = [*folds, *[NO_MEMBER] * (len(trained) - len(folds))]
        known = dict(zip(reversed(trained), reversed(padded), strict=True))
        return np.array([known.get(digest, NO_MEMBER) for digest in hashes], dtype=np.int64)

    folds = facts.get(FOLDS_FACT, ())
    return Unseen(members(facts.get(QUALITY_FOLDS_FACT, folds)), members(folds))


def nobody(n_prompts: int) -> Unseen:
    """No member has left any of the prompts out."""
    none_N = np.full(n_prompts, NO_MEMBER, dtype=np.int64)
    return Unseen(none_N, none_N)


def predict_unseen(
    head: Head, members: Sequence[Head], features_BD: FeatureArray, member_B: IndexArray
) -> FloatArray:
    """Predictions of each prompt by its member, and by the head itself where it has none, BM.

    Args:
        member_B: Of this part, as ``unseen_by`` gives it.
    """
    predicted_BM = head.predict(features_BD)
    for number, member in enumerate(members):
        rows = np.flatnonzero(member_B == number)
        if len(rows):
            predicted_BM[rows] = member.predict(features_BD[rows])
    return predicted_BM

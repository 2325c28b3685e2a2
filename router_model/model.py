"""The router itself: heads on frozen features, with what training learnt of their spread and calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.heads import FeatureArray, Head, Projection, nearest, squared_distances
from router_model.outlook import AlphaCalibration, Mode, Parts, RouterOutput, RouterTraits, TopDeviations
from router_model.reward import Normalization

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TeacherSummary:
    """One column of the router: a teacher and its means over its present training cells."""

    id: str
    family: str | None
    size_b: float | None
    mean_quality: float
    mean_learnability: float | None
    mean_reward: float
    """Mixed, at the checkpoint's alpha."""
    mean_quality_part: float
    """Normalised within the prompt."""
    mean_learnability_part: float | None
    mean_n_tokens: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PartHeads:
    """Heads of the two parts of the reward, and of the paper's mixed one where there is one."""

    quality: Head
    learnability: Head | None
    fixed: Head | None = None
    top: Head | None = None
    """Of which teacher is the best: M columns for each alpha, alpha by alpha."""


@dataclass(frozen=True, slots=True, eq=False)
class Novelty:
    """Tells prompts that are far from all training prompts, by the distance to the k-th nearest of them."""

    projection: Projection
    points_NK: FloatArray
    k: int
    threshold: float
    """Squared distance; infinite where there were too few prompts to tell."""

    def flags(self, features_BD: FeatureArray) -> NDArray[np.bool_]:
        """Which prompts are out of distribution."""
        if len(self.points_NK) <= self.k or not np.isfinite(self.threshold):
            return np.zeros(len(features_BD), dtype=np.bool_)
        distances_BN = squared_distances(self.projection(features_BD), self.points_NK)
        index_BK = nearest(distances_BN, self.k)
        return np.asarray(np.take_along_axis(distances_BN, index_BK, axis=1).max(axis=1) > self.threshold)


@dataclass(frozen=True, slots=True, eq=False)
class RouterModel:
    """Heads that choose, heads that explain, and the calibration that gives strengths their meaning."""

    teachers: tuple[TeacherSummary, ...]
    alpha: float
    normalization: Normalization
    mode: Mode
    kind: str
    """Of the heads that choose, as it was asked for or chosen."""
    chosen: PartHeads
    members: tuple[PartHeads, ...]
    """Trained without one fold each."""
    member_means: Parts
    """Of the same folds, EM: the teachers' mean parts."""
    quality: Head
    """On the raw scale of the table."""
    learnability: Head | None
    calibration: tuple[AlphaCalibration, ...]
    coverage: float
    novelty: Novelty
    top_alphas: tuple[float, ...]
    """Of the columns of ``PartHeads.top``; empty without one."""
    baselines: Mapping[str, Head]
    """Rivals trained on the same features and rewards, for reports."""
    facts: Mapping[str, Any]
    """Hyper-parameters and cross-validation numbers, ready for JSON."""

    def predict(
        self,
        features_BD: FeatureArray,
        input_tokens_B: NDArray[np.int64] | None = None,
        truncated_B: NDArray[np.bool_] | None = None,
    ) -> RouterOutput:
        """What the router says of a batch of encoded prompts."""
        n_prompts = len(features_BD)
        quality_BM = self.quality.predict(features_BD)
        return RouterOutput(
            traits=RouterTraits(self.mode, self.alpha, self.calibration, self.coverage, self._means()),
            parts_F=self._parts(features_BD),
            fixed_FBM=self._fixed(features_BD),
            quality_BM=quality_BM,
            learnability_BM=np.full_like(quality_BM, np.nan)
            if self.learnability is None
            else self.learnability.predict(features_BD),
            input_tokens_B=np.zeros(n_prompts, np.int64) if input_tokens_B is None else input_tokens_B,
            truncated_B=np.zeros(n_prompts, np.bool_) if truncated_B is None else truncated_B,
            out_of_distribution_B=self.novelty.flags(features_BD),
        )

    def _means(self) -> Parts:
        """The teachers' means by the router itself and by each member, FM."""
        learnability = [teacher.mean_learnability_part for teacher in self.teachers]
        own_M = np.array([teacher.mean_quality_part for teacher in self.teachers])
        of_members = self.member_means
        return Parts(
            np.concatenate([own_M[None], of_members.quality]),
            None
            if None in learnability or of_members.learnability is None
            else np.concatenate([np.array([learnability], dtype=np.float64), of_members.learnability]),
        )

    def _parts(self, features_BD: FeatureArray) -> Parts:
        """Each FBM. All heads predict what the first one does."""
        heads_F = (self.chosen, *self.members)
        tops = [heads.top.predict(features_BD) for heads in heads_F if heads.top is not None]
        shape = (len(heads_F), len(features_BD), len(self.top_alphas), len(self.teachers))
        return Parts(
            np.stack([heads.quality.predict(features_BD) for heads in heads_F]),
            _stacked([heads.learnability for heads in heads_F], features_BD),
            TopDeviations(self.top_alphas, np.stack(tops).reshape(shape)) if tops else None,
        )

    def _fixed(self, features_BD: FeatureArray) -> FloatArray | None:
        """Of ``paper`` mode; FBM, or fewer members."""
        return _stacked([heads.fixed for heads in (self.chosen, *self.members)], features_BD)


def _stacked(heads: Sequence[Head | None], features_BD: FeatureArray) -> FloatArray | None:
    """Predictions of the heads there are, along a new first axis; None if there are none."""
    values = [head.predict(features_BD) for head in heads if head is not None]
    return np.stack(values) if values else None

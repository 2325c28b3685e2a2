"""The router itself: heads on frozen features, with what training learnt of their spread and calibration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.heads import FeatureArray, Head, Projection, nearest, squared_distances
from router_model.outlook import AlphaCalibration, Mode, Parts, RouterOutput, TopDeviations
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
        fixed = self.chosen.fixed
        return RouterOutput(
            mode=self.mode,
            alpha=self.alpha,
            calibration=self.calibration,
            coverage=self.coverage,
            parts=self._parts(self.chosen, features_BD),
            member_parts=self._member_parts(features_BD),
            mean_parts=self._mean_parts(),
            member_means=self.member_means,
            fixed_BM=None if fixed is None else fixed.predict(features_BD),
            member_fixed_EBM=None
            if fixed is None
            else _stacked([member.fixed for member in self.members], features_BD, len(self.teachers)),
            quality_BM=quality_BM,
            learnability_BM=np.full_like(quality_BM, np.nan)
            if self.learnability is None
            else self.learnability.predict(features_BD),
            input_tokens_B=np.zeros(n_prompts, np.int64) if input_tokens_B is None else input_tokens_B,
            truncated_B=np.zeros(n_prompts, np.bool_) if truncated_B is None else truncated_B,
            out_of_distribution_B=self.novelty.flags(features_BD),
        )

    def _mean_parts(self) -> Parts:
        learnability = [teacher.mean_learnability_part for teacher in self.teachers]
        return Parts(
            np.array([teacher.mean_quality_part for teacher in self.teachers]),
            None if None in learnability else np.array(learnability, dtype=np.float64),
        )

    def _parts(self, heads: PartHeads, features_BD: FeatureArray) -> Parts:
        learnability = None if heads.learnability is None else heads.learnability.predict(features_BD)
        top = None
        if heads.top is not None:
            shape = (len(features_BD), len(self.top_alphas), len(self.teachers))
            top = TopDeviations(self.top_alphas, heads.top.predict(features_BD).reshape(shape))
        return Parts(heads.quality.predict(features_BD), learnability, top)

    def _member_parts(self, features_BD: FeatureArray) -> Parts:
        members = [self._parts(member, features_BD) for member in self.members]
        if not members:
            nothing_EBM = np.zeros((0, len(features_BD), len(self.teachers)))
            return Parts(nothing_EBM, None if self.chosen.learnability is None else nothing_EBM)
        learnability = [member.learnability for member in members if member.learnability is not None]
        top = [member.top.values for member in members if member.top is not None]
        return Parts(
            np.stack([member.quality for member in members]),
            np.stack(learnability) if learnability else None,
            TopDeviations(self.top_alphas, np.stack(top)) if top else None,
        )


def _stacked(heads: list[Head | None], features_BD: FeatureArray, n_teachers: int) -> FloatArray:
    """Predictions of the heads there are, EBM."""
    values = [head.predict(features_BD) for head in heads if head is not None]
    return np.stack(values) if values else np.zeros((0, len(features_BD), n_teachers))

"""The training prompts of a router: their features, and the folds of its cross-validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_model.heads import Projection
from router_model.linear_fit import Spectrum, decompose

FloatArray = NDArray[np.float64]
FeatureArray = NDArray[np.float32]
IndexArray = NDArray[np.int64]

N_FOLDS = 5
N_REPEATS = 3
"""Cross-validations over different partitions are averaged: one partition of few prompts is noisy."""
N_AXES = 64
"""Principal axes in which distances between prompts are taken."""
MANY_PROMPTS = 1000
"""With more prompts one partition is enough."""


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """One split of the prompts for cross-validation."""

    train: IndexArray
    held_out: IndexArray


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """Features of N prompts under one or several views, and the folds, partition after partition."""

    features_ND: FeatureArray
    widths: tuple[int, ...]
    """Features that belong to each view, in order."""
    folds: tuple[Fold, ...]
    """Empty when there is one prompt only: nothing can be held out."""
    n_folds: int
    """Folds of one partition."""
    projections: dict[Fold | None, Projection] = field(default_factory=dict)
    """Of each fold's training prompts, and of all for None, as they were asked for."""

    @property
    def n_prompts(self) -> int:
        """Number of prompts, N."""
        return len(self.features_ND)

    @property
    def partition(self) -> tuple[Fold, ...]:
        """The folds of the first partition."""
        return self.folds[: self.n_folds]

    @property
    def views(self) -> list[slice]:
        """Columns of each view."""
        ends = np.cumsum(self.widths)
        return [slice(int(end) - width, int(end)) for end, width in zip(ends, self.widths, strict=True)]

    def rows(self, fold: Fold | None) -> IndexArray:
        """The prompts to train on: those of a fold, or all."""
        return np.arange(self.n_prompts) if fold is None else fold.train

    def spectrum(self, fold: Fold | None = None) -> Spectrum:
        """All views at once, decomposed over the prompts to train on."""
        return decompose(self.features_ND[self.rows(fold)], self.widths)

    def projection(self, fold: Fold | None = None) -> Projection:
        """The ``N_AXES`` widest principal axes of the prompts to train on."""
        if fold not in self.projections:
            self.projections[fold] = project(self.spectrum(fold), N_AXES)
        return self.projections[fold]


def prepare(features_ND: FeatureArray, *, seed: int, widths: Sequence[int] | None = None) -> Design:
    """Draw the folds: five per partition, or as many as there are prompts if that is fewer."""
    n_prompts = len(features_ND)
    n_folds = min(N_FOLDS, n_prompts) if n_prompts > 1 else 0
    rng = np.random.default_rng(seed)
    folds = []
    for _ in range((1 if n_prompts > MANY_PROMPTS else N_REPEATS) if n_folds else 0):
        for held_out in np.array_split(rng.permutation(n_prompts), n_folds):
            train = np.setdiff1d(np.arange(n_prompts), held_out)
            folds.append(Fold(train, np.sort(held_out)))
    return Design(features_ND, tuple(widths or (features_ND.shape[1],)), tuple(folds), n_folds)


def project(spectrum: Spectrum, n_axes: int, *, whiten: bool = False) -> Projection:
    """The widest axes of a spectrum as a map of raw features; whitened, each has variance 1."""
    kept = min(n_axes, len(spectrum.variance_K))
    if not kept:
        # Prompts that all look alike are one point.
        return Projection(np.zeros((len(spectrum.mean_D), 1)), np.zeros(1))
    scale_K = np.sqrt(spectrum.variance_K[:kept]) if whiten else np.ones(kept)
    weight_DK = spectrum.axes_DK[:, :kept] / spectrum.scale_D[:, None] / scale_K
    return Projection(weight_DK, -spectrum.mean_D @ weight_DK)


def average_held_out(design: Design, n_columns: int, predict: Callable[[Fold], FloatArray]) -> FloatArray:
    """Predictions for each prompt by models that did not see it, averaged over the partitions."""
    total = np.zeros((design.n_prompts, n_columns))
    for fold in design.folds:
        total[fold.held_out] += predict(fold)
    return total / (len(design.folds) // design.n_folds)

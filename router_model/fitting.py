"""How heads are fitted: hyper-parameters by cross-validation over prompts, then once more on all of them."""

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from router_model.design import Design, Fold, average_held_out
from router_model.errors import RouterError
from router_model.heads import (
    BlendHead,
    ClusterHead,
    ConstantHead,
    Head,
    LinearHead,
    MLPHead,
    NeighbourHead,
)
from router_model.linear_fit import LinearMap, column_means, decompose, ridge_path, ridge_path_left_out
from router_model.mlp import train_mlp

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Strongest first, so that among equals the one nearer to the constant is taken.
L2_GRID = (math.inf, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-3, 1e-4)
NEIGHBOURS = (80, 40, 20, 10, 5)
CLUSTERS = (2, 4, 8, 16, 32)
SHRINKAGE = 20.0
"""How many prompts the teachers' means weigh in a mean over neighbours or a cluster."""
WEIGHT_DECAYS = (3.0, 1.0, 0.3, 0.1)


@dataclass(frozen=True, slots=True, eq=False)
class HeadFit:
    """A fitted head and what cross-validation says of it."""

    head: Head
    out_of_fold_NM: FloatArray | None
    """Predictions for each training prompt by heads that did not see it, with hyper-parameters chosen on the
    other folds. None without folds."""
    means_NM: FloatArray | None
    """The teachers' means over the prompts that those heads saw: what a constant would have predicted. None
    for strengths, which have no scale."""
    members: tuple[Head, ...]
    """The head fitted without each fold of the first partition: how much it depends on the sample."""
    facts: Mapping[str, Any]
    """Hyper-parameters, ready for JSON. An ``l2`` of null means zero weights."""


Size = TypeVar("Size", int, float)
Fit = Callable[[Design, FloatArray, BoolArray], HeadFit]


def fit_constant(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """Teacher means; cross-validated too, so that the other heads have something to beat."""
    head = ConstantHead(column_means(targets_NM, mask_NM))
    if not design.folds:
        return HeadFit(head, None, None, (), {})
    means_NM = _fold_means(design, targets_NM, mask_NM)
    members = tuple(
        ConstantHead(column_means(targets_NM[fold.train], mask_NM[fold.train])) for fold in design.partition
    )
    return HeadFit(head, means_NM, means_NM, members, {})


def _fold_means(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    def means(fold: Fold) -> FloatArray:
        mean_M = column_means(targets_NM[fold.train], mask_NM[fold.train])
        return np.tile(mean_M, (len(fold.held_out), 1))

    return average_held_out(design, targets_NM.shape[1], means)


def fit_ridge(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """One target of ``fit_ridges``."""
    return fit_ridges(design, {"": targets_NM}, mask_NM)[""]


def fit_ridges(design: Design, targets: Mapping[str, FloatArray], mask_NM: BoolArray) -> dict[str, HeadFit]:
    """For each target the mean of one ridge regression per view, with an L2 of its own for each teacher.

    Averaging over layers costs little and is safer than choosing one. A teacher whose answers' rewards the
    features do not foretell gets a strong L2 and stays near its mean, and pulls nobody else there.

    Args:
        targets: By name, each NM. They share the decompositions, which is where the time goes.
    """
    if not design.folds:
        return {name: fit_constant(design, values_NM, mask_NM) for name, values_NM in targets.items()}
    # Teachers side by side: M columns for each target.
    targets_NC = np.concatenate(list(targets.values()), axis=1)
    mask_NC = np.tile(mask_NM, (1, len(targets)))
    # With every cell present, leaving out one prompt at a time has a closed form: nothing is drawn by chance.
    full = bool(mask_NM.all())
    held_VGNC = (_left_out_paths if full else _held_out_paths)(design, targets_NC, mask_NC)
    means_NC = left_out_means(targets_NC) if full else _fold_means(design, targets_NC, mask_NC)
    error_VGNC = np.where(mask_NC, held_VGNC - targets_NC, 0.0) ** 2
    total_VGC = error_VGNC.sum(axis=2)
    chosen_VC = total_VGC.argmin(axis=1)
    out_of_fold_NC = np.empty_like(targets_NC)
    for fold in design.partition:
        # The L2 for these prompts is chosen without them.
        others_VGC = total_VGC - error_VGNC[:, :, fold.held_out].sum(axis=2)
        out_of_fold_NC[fold.held_out] = _picked(held_VGNC[:, :, fold.held_out], others_VGC.argmin(axis=1))

    def solve(fold: Fold | None) -> LinearMap:
        rows = design.rows(fold)
        return _solve_views(design, rows, targets_NC[rows], mask_NC[rows], chosen_VC)

    whole, members = solve(None), [solve(fold) for fold in design.partition]
    fits = {}
    for index, name in enumerate(targets):
        own = slice(index * mask_NM.shape[1], (index + 1) * mask_NM.shape[1])
        held_NM, values_NM = out_of_fold_NC[:, own], targets_NC[:, own]
        error = float((np.where(mask_NM, held_NM - values_NM, 0.0) ** 2).sum() / mask_NM.sum())
        l2 = [[_json_l2(L2_GRID[step]) for step in row] for row in chosen_VC[:, own].tolist()]
        parts = tuple(LinearHead(member.columns(own)) for member in members)
        facts = {"l2": l2, "cv_squared_error": error}
        fits[name] = HeadFit(LinearHead(whole.columns(own)), held_NM, means_NC[:, own], parts, facts)
    return fits


def left_out_means(targets_NM: FloatArray) -> FloatArray:
    """Mean of each column over all other prompts, NM; at least two prompts, no gaps."""
    return np.asarray((targets_NM.sum(axis=0) - targets_NM) / (len(targets_NM) - 1))


def _left_out_paths(design: Design, targets_NM: FloatArray, _mask_NM: BoolArray) -> FloatArray:
    """Predictions of each prompt from all the others, by view and L2. No gaps."""
    spectra = (decompose(design.features_ND[:, columns]) for columns in design.views)
    paths_VGNM = np.stack([ridge_path_left_out(spectrum, targets_NM, L2_GRID) for spectrum in spectra])
    # Zero weights are the means of the others to the bit: rounding must not choose between equal teachers.
    paths_VGNM[:, [math.isinf(l2) for l2 in L2_GRID]] = left_out_means(targets_NM)
    return paths_VGNM


def _held_out_paths(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """Predictions of held-out prompts by view and L2, averaged over the partitions."""
    held_VGNM = np.zeros((len(design.views), len(L2_GRID), *targets_NM.shape))
    for view, columns in enumerate(design.views):
        features_ND = design.features_ND[:, columns]
        for fold in design.folds:
            spectrum = decompose(features_ND[fold.train])
            weights_GKM, bias_GM = ridge_path(spectrum, targets_NM[fold.train], mask_NM[fold.train], L2_GRID)
            rotated_BK = spectrum.rotate(features_ND[fold.held_out])
            held_VGNM[view][:, fold.held_out] += rotated_BK @ weights_GKM + bias_GM[:, None]
    return held_VGNM / (len(design.folds) // design.n_folds)


def _picked(held_VGNM: FloatArray, chosen_VM: NDArray[np.int64]) -> FloatArray:
    """Mean over the views of the predictions at each teacher's L2."""
    picked_V1NM = np.take_along_axis(held_VGNM, chosen_VM[:, None, None, :], axis=1)
    return np.asarray(picked_V1NM[:, 0].mean(axis=0))


def _solve_views(
    design: Design,
    rows: NDArray[np.int64],
    targets_NM: FloatArray,
    mask_NM: BoolArray,
    chosen_VM: NDArray[np.int64],
) -> LinearMap:
    weights, biases = [], []
    used = sorted(set(chosen_VM.ravel().tolist()))
    for columns, chosen_M in zip(design.views, chosen_VM, strict=True):
        spectrum = decompose(design.features_ND[rows, columns])
        weights_GKM, bias_GM = ridge_path(spectrum, targets_NM, mask_NM, [L2_GRID[index] for index in used])
        index_M, teachers_M = np.searchsorted(used, chosen_M), np.arange(len(chosen_M))
        linear = spectrum.fold(weights_GKM[index_M, :, teachers_M].T, bias_GM[index_M, teachers_M])
        weights.append(linear.weight_DM / len(design.views))
        biases.append(linear.bias_M / len(design.views))
    return LinearMap(np.concatenate(weights), np.sum(biases, axis=0))


def _json_l2(l2: float) -> float | None:
    """JSON has no infinity: null stands for zero weights."""
    return None if math.isinf(l2) else l2


def fit_neighbours(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """k nearest neighbours, shrunk to the teachers' means; k by squared error."""

    def solve(fold: Fold | None, k: int) -> NeighbourHead:
        rows, projection = design.rows(fold), design.projection(fold)
        targets, mask = targets_NM[rows], mask_NM[rows]
        points_NK = projection(design.features_ND[rows])
        known_NM = np.where(mask, targets, np.nan)
        return NeighbourHead(projection, points_NK, known_NM, column_means(targets, mask), k, SHRINKAGE)

    return _fit_by_size(design, targets_NM, mask_NM, solve, {"k": NEIGHBOURS})


def fit_clusters(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """k-means clusters with a table of shrunken means each; their number by squared error."""

    def solve(fold: Fold | None, n_clusters: int) -> ClusterHead:
        # Imported here: fitting clusters is offline work, and the serving image has no scipy.
        kmeans2 = importlib.import_module("scipy.cluster.vq").kmeans2
        rows, projection = design.rows(fold), design.projection(fold)
        points_NK, targets, mask = projection(design.features_ND[rows]), targets_NM[rows], mask_NM[rows]
        n_clusters = min(n_clusters, len(rows))
        with warnings.catch_warnings():
            # An empty cluster is a row of means that no prompt uses; equal prompts have no distances.
            warnings.simplefilter("ignore")
            centres_CK, own_N = kmeans2(points_NK, n_clusters, minit="++", rng=np.random.default_rng(0))
        inside_CN = own_N == np.arange(n_clusters)[:, None]
        total_CM = inside_CN @ np.where(mask, targets, 0.0)
        n_CM = inside_CN.astype(float) @ mask.astype(float)
        values_CM = (total_CM + SHRINKAGE * column_means(targets, mask)) / (n_CM + SHRINKAGE)
        return ClusterHead(projection, np.asarray(centres_CK), values_CM)

    return _fit_by_size(design, targets_NM, mask_NM, solve, {"n_clusters": CLUSTERS})


def fit_mlp(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """A small multilayer perceptron; its weight decay by squared error."""

    def solve(fold: Fold | None, weight_decay: float) -> MLPHead:
        rows, projection = design.rows(fold), design.projection(fold)
        points_NK = projection(design.features_ND[rows])
        return train_mlp(projection, points_NK, targets_NM[rows], mask_NM[rows], weight_decay=weight_decay)

    return _fit_by_size(design, targets_NM, mask_NM, solve, {"weight_decay": WEIGHT_DECAYS})


def _fit_by_size(
    design: Design,
    targets_NM: FloatArray,
    mask_NM: BoolArray,
    solve: Callable[[Fold | None, Size], Head],
    sizes: Mapping[str, Sequence[Size]],
) -> HeadFit:
    """A head with one number to choose, by the squared error of held-out prompts."""
    if not design.folds:
        return fit_constant(design, targets_NM, mask_NM)

    ((name, choices),) = sizes.items()

    def held_out(size: Size) -> FloatArray:
        def predict(fold: Fold) -> FloatArray:
            return solve(fold, size).predict(design.features_ND[fold.held_out])

        return average_held_out(design, targets_NM.shape[1], predict)

    held_GNM = np.stack([held_out(size) for size in choices])
    error_GN = (np.where(mask_NM, held_GNM - targets_NM, 0.0) ** 2).sum(axis=2)
    best = int(error_GN.sum(axis=1).argmin())
    out_of_fold_NM = np.empty_like(targets_NM)
    for fold in design.partition:
        others_G = error_GN.sum(axis=1) - error_GN[:, fold.held_out].sum(axis=1)
        out_of_fold_NM[fold.held_out] = held_GNM[int(others_G.argmin()), fold.held_out]
    members = tuple(solve(fold, choices[best]) for fold in design.partition)
    means_NM = _fold_means(design, targets_NM, mask_NM)
    return HeadFit(solve(None, choices[best]), out_of_fold_NM, means_NM, members, {name: choices[best]})


def blend(linear: HeadFit, neighbours: HeadFit) -> HeadFit | None:
    """The mean of a linear and a neighbour fit; None where one of them is only a constant."""
    if not (isinstance(linear.head, LinearHead) and isinstance(neighbours.head, NeighbourHead)):
        return None
    if linear.out_of_fold_NM is None or neighbours.out_of_fold_NM is None:
        return None
    if linear.means_NM is None or neighbours.means_NM is None:
        return None
    members = tuple(
        BlendHead(first, second)
        for first, second in zip(linear.members, neighbours.members, strict=True)
        if isinstance(first, LinearHead) and isinstance(second, NeighbourHead)
    )
    return HeadFit(
        BlendHead(linear.head, neighbours.head),
        (linear.out_of_fold_NM + neighbours.out_of_fold_NM) / 2,
        (linear.means_NM + neighbours.means_NM) / 2,
        members,
        {"ridge": dict(linear.facts), "knn": dict(neighbours.facts)},
    )


FITS: Mapping[str, Fit] = MappingProxyType(
    {
        "constant": fit_constant,
        "ridge": fit_ridge,
        "knn": fit_neighbours,
        "cluster": fit_clusters,
        "mlp": fit_mlp,
    }
)
"""Heads that predict a reward, of which quality and learnability have one each."""


def fit_head(kind: str, design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """Fit a head of a kind of ``FITS``.

    Raises:
        RouterError: There is no such kind.
    """
    if kind not in FITS:
        raise RouterError(f"unknown head {kind!r}: expected one of {list(FITS)}")
    return FITS[kind](design, targets_NM, mask_NM)

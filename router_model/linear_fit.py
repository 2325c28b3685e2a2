"""Linear maps from frozen features to one value per teacher: ridge, and any objective by L-BFGS.

Both work in the eigenbasis of the scaled features, where one decomposition serves every L2 strength, and both
leave the bias free, so that a strong L2 gives the best constant and not zero.

``l2`` is that of ``(X'X + l2 I)^-1 X'Y`` with centred features whose mean squared length is 1, so its size
means the same for every backbone; ``inf`` means zero weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from router_model.objectives import Objective

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MAX_CG_STEPS = 60
# Of the squared residual, relative to the first one.
CG_TOLERANCE = 1e-14
MAX_LBFGS_STEPS = 40
# Relative L2 of an objective's bias: a teacher that wins every pair has no finite best strength.
BIAS_L2 = 1e-3
_LEAST_FREEDOM = 1e-6
# A few features of a language model may vary a thousand times more than the others and say no more.
MAX_SCALE_RATIO = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """``values_BM = features_BD @ weight_DM + bias_M``, on raw features."""

    weight_DM: FloatArray
    bias_M: FloatArray

    def __call__(self, features_BD: NDArray[np.floating]) -> FloatArray:
        """Values for a batch of prompts, float64."""
        return np.asarray(features_BD.astype(np.float64) @ self.weight_DM + self.bias_M)

    def columns(self, own: slice) -> "LinearMap":
        """Some of its columns."""
        return LinearMap(np.ascontiguousarray(self.weight_DM[:, own]), self.bias_M[own])

    @staticmethod
    def side_by_side(maps: Sequence["LinearMap"]) -> "LinearMap":
        """The columns of several maps of the same features, one after the other."""
        return LinearMap(
            np.concatenate([linear.weight_DM for linear in maps], axis=1),
            np.concatenate([linear.bias_M for linear in maps]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Centred and scaled features in the basis of their principal axes, K of them, widest first."""

    mean_D: FloatArray
    scale_D: FloatArray
    axes_DK: FloatArray
    variance_K: FloatArray
    rotated_NK: FloatArray

    def rotate(self, features_BD: NDArray[np.floating], n_axes: int | None = None) -> FloatArray:
        """Coordinates of prompts along the (first) axes."""
        return np.asarray((features_BD - self.mean_D) / self.scale_D @ self.axes_DK[:, :n_axes])

    def fold(self, weight_KM: FloatArray, bias_M: FloatArray) -> LinearMap:
        """The same map on raw features: the scaler and the rotation go into the weights."""
        weight_DM = (self.axes_DK[:, : len(weight_KM)] @ weight_KM) / self.scale_D[:, None]
        return LinearMap(weight_DM, bias_M - self.mean_D @ weight_DM)


def decompose(features_ND: NDArray[np.floating], widths: Sequence[int] | None = None) -> Spectrum:
    """Centre the features, scale them to a mean squared length of 1, and find their principal axes.

    One scale serves all features of a view, except those that vary much more than most of them, which are
    brought down; features and axes that do not vary are dropped.

    Args:
        widths: Where the features are those of several views, how many belong to each; all then count alike.
    """
    raw_ND = features_ND.astype(np.float64)
    n_prompts, width = raw_ND.shape
    mean_D, deviation_D = raw_ND.mean(axis=0), raw_ND.std(axis=0)
    # A constant feature says nothing; its rounding noise must not be blown up to variance 1.
    varies_D = deviation_D > 1e-9 * np.maximum(np.abs(mean_D), 1e-30)
    ends = np.cumsum(widths or [width])
    blocks = [slice(end - size, end) for end, size in zip(ends, widths or [width], strict=True)]
    scale_D = np.concatenate([_scales(deviation_D[own], varies_D[own], len(blocks)) for own in blocks])
    centred_ND = np.where(varies_D, (raw_ND - mean_D) / scale_D, 0.0)
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    wide = width > n_prompts
    gram = centred_ND @ centred_ND.T if wide else centred_ND.T @ centred_ND
    variance_K, vectors = np.linalg.eigh(gram / n_prompts)
    kept_K = np.flatnonzero(variance_K > 1e-10 * max(float(variance_K.max(initial=0.0)), 1e-10))[::-1]
    variance_K, vectors = variance_K[kept_K], vectors[:, kept_K]
    axes_DK = centred_ND.T @ (vectors / np.sqrt(n_prompts * variance_K)) if wide else vectors
    return Spectrum(mean_D, scale_D, axes_DK, variance_K, centred_ND @ axes_DK)


def _scales(deviation_D: FloatArray, varies_D: BoolArray, n_views: int) -> FloatArray:
    """By what the features of one view are divided, so that their mean squared length is ``1 / n_views``."""
    if not varies_D.any():
        return np.ones_like(deviation_D)
    scale_D = np.maximum(deviation_D / (MAX_SCALE_RATIO * np.median(deviation_D[varies_D])), 1.0)
    length = math.sqrt(n_views * float(((deviation_D / scale_D)[varies_D] ** 2).sum()))
    return np.asarray(scale_D * length)


def column_means(targets_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """Mean of each teacher's present cells; a teacher without any gets the mean over all of them."""
    n_M = mask_NM.sum(axis=0)
    total_M = np.where(mask_NM, targets_NM, 0.0).sum(axis=0)
    overall = float(total_M.sum() / max(int(n_M.sum()), 1))
    return np.where(n_M > 0, total_M / np.maximum(n_M, 1), overall)


def ridge_path(
    spectrum: Spectrum, targets_NM: FloatArray, mask_NM: BoolArray, grid: Sequence[float]
) -> tuple[FloatArray, FloatArray]:
    """Ridge regression of each teacher's present targets around its mean, for every L2 of a grid.

    A full table has a closed form for all of the grid at once. A table with gaps takes conjugate gradients,
    some ten steps for each L2; a teacher with few cells stays near its mean.

    Returns:
        Weights, G × K × M, on the spectrum's axes, and biases, G × M.
    """
    mean_M = column_means(targets_NM, mask_NM)
    if mask_NM.all():
        product_KM = spectrum.rotated_NK.T @ (targets_NM - mean_M)
        sum_K = spectrum.variance_K * len(targets_NM)
        weights = [
            np.zeros_like(product_KM) if math.isinf(l2) else product_KM / (sum_K + l2)[:, None] for l2 in grid
        ]
        return np.stack(weights), np.tile(mean_M, (len(grid), 1))
    solved = [_ridge_with_gaps(spectrum, targets_NM, mask_NM, mean_M, l2) for l2 in grid]
    return np.stack([weight for weight, _ in solved]), np.stack([bias for _, bias in solved])


def ridge_path_left_out(spectrum: Spectrum, targets_NM: FloatArray, grid: Sequence[float]) -> FloatArray:
    """What ridge regression on all other prompts predicts of each prompt, for every L2 of a grid, GNM.

    The closed form for a full table: ``y - (I - H)^-1_nn (I - H) y`` with the hat matrix H of the centred
    features and the bias (Allen, 1974), as exact as fitting N times.
    """
    n_prompts = len(targets_NM)
    sum_K = spectrum.variance_K * n_prompts
    basis_NK = spectrum.rotated_NK / np.sqrt(sum_K)
    centred_NM = targets_NM - targets_NM.mean(axis=0)
    along_KM = basis_NK.T @ centred_NM
    left_out = np.empty((len(grid), *targets_NM.shape))
    for index, l2 in enumerate(grid):
        kept_K = np.zeros_like(sum_K) if math.isinf(l2) else sum_K / (sum_K + l2)
        residual_NM = centred_NM - basis_NK @ (kept_K[:, None] * along_KM)
        free_N = 1.0 - 1.0 / n_prompts - (basis_NK**2) @ kept_K
        # A prompt that alone spans an axis has no other that could foretell it: its residual is 0 / 0.
        left_out[index] = targets_NM - residual_NM / np.maximum(free_N, _LEAST_FREEDOM)[:, None]
    return left_out


def _ridge_with_gaps(
    spectrum: Spectrum, targets_NM: FloatArray, mask_NM: BoolArray, mean_M: FloatArray, l2: float
) -> tuple[FloatArray, FloatArray]:
    n_prompts, n_axes = spectrum.rotated_NK.shape
    if math.isinf(l2):
        return np.zeros((n_axes, targets_NM.shape[1])), mean_M
    # The last axis is the bias: constant, orthogonal to the centred features, not regularised.
    inputs_NK = np.column_stack([spectrum.rotated_NK, np.ones(n_prompts)])
    penalty_K1 = np.append(np.full(n_axes, l2 / n_prompts), 0.0)[:, None]
    full_K1 = np.append(spectrum.variance_K, 1.0)[:, None] + penalty_K1

    def curvature(weight_KM: FloatArray) -> FloatArray:
        present_NM = np.where(mask_NM, inputs_NK @ weight_KM, 0.0)
        return np.asarray(inputs_NK.T @ present_NM / n_prompts + penalty_K1 * weight_KM)

    residual_KM = inputs_NK.T @ np.where(mask_NM, targets_NM - mean_M, 0.0) / n_prompts
    weight_KM = _conjugate_gradients(curvature, residual_KM, full_K1)
    return weight_KM[:-1], mean_M + weight_KM[-1]


def solve_ridge(spectrum: Spectrum, targets_NM: FloatArray, mask_NM: BoolArray, l2: float) -> LinearMap:
    """One ridge regression, as a map of raw features: see ``ridge_path``."""
    weights_GKM, bias_GM = ridge_path(spectrum, targets_NM, mask_NM, (l2,))
    return spectrum.fold(weights_GKM[0], bias_GM[0])


def _conjugate_gradients(
    curvature: Callable[[FloatArray], FloatArray], target_KM: FloatArray, preconditioner_K1: FloatArray
) -> FloatArray:
    """Solve ``curvature(w) = target`` column by column, all columns in step."""
    solution_KM, residual_KM = np.zeros_like(target_KM), target_KM
    scaled_KM = residual_KM / preconditioner_K1
    direction_KM, product_M = scaled_KM, (residual_KM * scaled_KM).sum(axis=0)
    goal = CG_TOLERANCE * float(product_M.max(initial=0.0))
    for _ in range(MAX_CG_STEPS):
        if float(product_M.max(initial=0.0)) <= goal:
            break
        bent_KM = curvature(direction_KM)
        curve_M = (direction_KM * bent_KM).sum(axis=0)
        step_M = np.divide(product_M, curve_M, out=np.zeros_like(product_M), where=curve_M > 0)
        solution_KM = solution_KM + step_M * direction_KM
        residual_KM = residual_KM - step_M * bent_KM
        scaled_KM = residual_KM / preconditioner_K1
        previous_M, product_M = product_M, (residual_KM * scaled_KM).sum(axis=0)
        turn_M = np.divide(product_M, previous_M, out=np.zeros_like(product_M), where=previous_M > 0)
        direction_KM = scaled_KM + turn_M * direction_KM
    return solution_KM


def solve_objective(
    spectrum: Spectrum,
    rewards_NM: FloatArray,
    mask_NM: BoolArray,
    l2: float,
    objective: Objective,
    *,
    temperature: float = 1.0,
    max_axes: int | None = None,
) -> LinearMap:
    """Strengths, linear in the features, that minimise an objective plus an L2: L-BFGS, float64.

    The curvature of the all-pairs loss is at most ``variance / (2 (M - 1))`` along each axis (Böhning's
    bound, exact at equal strengths), and the others are near it, so the axes are scaled by it first: L-BFGS
    then needs some ten steps in place of hundreds. ``l2`` is scaled by the same bound, so that it shrinks as
    much as in ridge regression.

    Args:
        max_axes: Use the widest axes only: the cost of a step grows with their number.
    """
    n_prompts, n_teachers = rewards_NM.shape
    curvature = 1.0 / (2 * max(n_teachers - 1, 1))
    n_axes = 0 if math.isinf(l2) else len(spectrum.variance_K[:max_axes])
    variance_K = spectrum.variance_K[:n_axes]
    relative = l2 / n_prompts if n_axes else 0.0
    unit_K = np.sqrt(curvature * (variance_K + relative)) if n_axes else variance_K
    penalty_K1 = torch.from_numpy(relative / (variance_K + relative) if n_axes else variance_K)[:, None]
    whitened_NK = torch.from_numpy(np.ascontiguousarray(spectrum.rotated_NK[:, :n_axes] / unit_K))
    rewards, mask = (torch.from_numpy(np.ascontiguousarray(array)) for array in (rewards_NM, mask_NM))
    weight_KM = torch.zeros((n_axes, n_teachers), dtype=torch.float64, requires_grad=True)
    bias_M = torch.zeros(n_teachers, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_KM, bias_M],
        max_iter=MAX_LBFGS_STEPS,
        tolerance_grad=1e-5,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss_with_gradient() -> float:
        optimizer.zero_grad()
        strengths_NM = whitened_NK @ weight_KM + bias_M / math.sqrt(curvature)
        penalty = (penalty_K1 * weight_KM**2).sum() + BIAS_L2 * (bias_M**2).sum()
        loss = objective(strengths_NM, rewards, mask, temperature) + penalty / 2
        torch.autograd.backward(loss)
        return float(loss.detach())

    step: Callable[[Callable[[], float]], object] = optimizer.step
    step(loss_with_gradient)
    weight = weight_KM.detach().numpy() / (unit_K[:, None] if n_axes else 1.0)
    bias = bias_M.detach().numpy() / math.sqrt(curvature)
    # Only differences of strengths matter: centre them over the teachers.
    return spectrum.fold(weight - weight.mean(axis=1, keepdims=True), bias - bias.mean())

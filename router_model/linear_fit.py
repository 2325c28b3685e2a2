"""Linear maps from frozen features to one value per teacher: the two solvers behind ``heads.py``.

Both work in the eigenbasis of the standardised features, where one decomposition serves every L2 strength,
and both leave the bias free, so that a strong L2 gives the best constant and not zero.

``l2`` is relative to the mean variance of a standardised feature (which is 1), whatever the number of
prompts: ``inf`` means zero weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from router_model.bradley_terry import compare, loss_of_pairs

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MAX_CG_STEPS = 60
# Of the squared residual, relative to the first one.
CG_TOLERANCE = 1e-14
MAX_BT_STEPS = 40
# Relative L2 of the Bradley-Terry bias: a teacher that wins every pair has no finite maximum-likelihood
# strength.
BIAS_L2 = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """``values_BM = features_BD @ weight_DM + bias_M``, on raw features."""

    weight_DM: FloatArray
    bias_M: FloatArray

    def __call__(self, features_BD: NDArray[np.floating]) -> FloatArray:
        """Values for a batch of prompts, float64."""
        return np.asarray(features_BD.astype(np.float64) @ self.weight_DM + self.bias_M)


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Standardised features in the basis of their principal axes, K of them."""

    mean_D: FloatArray
    scale_D: FloatArray
    axes_DK: FloatArray
    variance_K: FloatArray
    rotated_NK: FloatArray

    def fold(self, weight_KM: FloatArray, bias_M: FloatArray) -> LinearMap:
        """The same map on raw features: the scaler and the rotation go into the weights."""
        weight_DM = (self.axes_DK[:, : len(weight_KM)] @ weight_KM) / self.scale_D[:, None]
        return LinearMap(weight_DM, bias_M - self.mean_D @ weight_DM)

    def axes_for(self, l2: float) -> int:
        """How many axes a fit with this L2 uses: none at ``inf``."""
        return 0 if math.isinf(l2) else len(self.variance_K)


Solver = Callable[[Spectrum, FloatArray, BoolArray, float], LinearMap]


def decompose(features_ND: NDArray[np.floating]) -> Spectrum:
    """Standardise the features and rotate them onto their principal axes; empty axes are dropped."""
    raw_ND = features_ND.astype(np.float64)
    n_prompts, width = raw_ND.shape
    mean_D, scale_D = raw_ND.mean(axis=0), raw_ND.std(axis=0)
    # A constant feature says nothing; its rounding noise must not be blown up to variance 1.
    constant_D = scale_D <= 1e-9 * np.maximum(np.abs(mean_D), 1e-30)
    scale_D = np.where(constant_D, 1.0, scale_D)
    standard_ND = np.where(constant_D, 0.0, (raw_ND - mean_D) / scale_D)
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    wide = width > n_prompts
    gram = standard_ND @ standard_ND.T if wide else standard_ND.T @ standard_ND
    variance_K, vectors = np.linalg.eigh(gram / n_prompts)
    kept_K = variance_K > 1e-10 * max(float(variance_K.max(initial=0.0)), 1e-10)
    variance_K, vectors = variance_K[kept_K], vectors[:, kept_K]
    axes_DK = standard_ND.T @ (vectors / np.sqrt(n_prompts * variance_K)) if wide else vectors
    return Spectrum(mean_D, scale_D, axes_DK, variance_K, standard_ND @ axes_DK)


def column_means(targets_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """Mean of each teacher's present cells; a teacher without any gets the mean over all of them."""
    n_M = mask_NM.sum(axis=0)
    total_M = np.where(mask_NM, targets_NM, 0.0).sum(axis=0)
    overall = float(total_M.sum() / max(int(n_M.sum()), 1))
    return np.where(n_M > 0, total_M / np.maximum(n_M, 1), overall)


def solve_ridge(spectrum: Spectrum, targets_NM: FloatArray, mask_NM: BoolArray, l2: float) -> LinearMap:
    """Ridge regression of each teacher's present targets, around the teacher's mean.

    Conjugate gradients for all teachers at once, preconditioned by the solution for a full table: a full
    table takes one step, a table with gaps some ten. A teacher with few cells stays near its mean.
    """
    n_prompts, n_axes = len(targets_NM), spectrum.axes_for(l2)
    # The last axis is the bias: constant, orthogonal to the centred features, not regularised.
    inputs_NK = np.column_stack([spectrum.rotated_NK[:, :n_axes], np.ones(n_prompts)])
    penalty_K1 = np.append(np.full(n_axes, l2 if n_axes else 0.0), 0.0)[:, None]
    full_K1 = np.append(spectrum.variance_K[:n_axes], 1.0)[:, None] + penalty_K1
    mean_M = column_means(targets_NM, mask_NM)

    def curvature(weight_KM: FloatArray) -> FloatArray:
        present_NM = np.where(mask_NM, inputs_NK @ weight_KM, 0.0)
        return np.asarray(inputs_NK.T @ present_NM / n_prompts + penalty_K1 * weight_KM)

    residual_KM = inputs_NK.T @ np.where(mask_NM, targets_NM - mean_M, 0.0) / n_prompts
    weight_KM = _conjugate_gradients(curvature, residual_KM, full_K1)
    return spectrum.fold(weight_KM[:-1], mean_M + weight_KM[-1])


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


def solve_bradley_terry(
    spectrum: Spectrum, rewards_NM: FloatArray, mask_NM: BoolArray, l2: float
) -> LinearMap:
    """Bradley-Terry strengths, linear in the features: L-BFGS in float64 on the all-pairs loss.

    The curvature of the loss is at most ``variance / (2 (M - 1))`` along each axis (Böhning's bound, exact at
    equal strengths), so the axes are scaled by it first: L-BFGS then needs some ten steps in place of
    hundreds.
    """
    curvature = 1.0 / (2 * max(rewards_NM.shape[1] - 1, 1))
    n_axes = spectrum.axes_for(l2)
    variance_K = spectrum.variance_K[:n_axes]
    unit_K = np.sqrt(curvature * (variance_K + l2)) if n_axes else variance_K
    penalty_K = torch.from_numpy(l2 / (variance_K + l2) if n_axes else variance_K)
    whitened_NK = torch.from_numpy(np.ascontiguousarray(spectrum.rotated_NK[:, :n_axes] / unit_K))
    pairs = compare(
        torch.from_numpy(np.ascontiguousarray(rewards_NM)), torch.from_numpy(np.ascontiguousarray(mask_NM))
    )
    weight_KM = torch.zeros((n_axes, rewards_NM.shape[1]), dtype=torch.float64, requires_grad=True)
    bias_M = torch.zeros(rewards_NM.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_KM, bias_M],
        max_iter=MAX_BT_STEPS,
        tolerance_grad=1e-5,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss_with_gradient() -> float:
        optimizer.zero_grad()
        strengths_NM = whitened_NK @ weight_KM + bias_M / math.sqrt(curvature)
        penalty = (penalty_K[:, None] * weight_KM**2).sum() + BIAS_L2 * (bias_M**2).sum()
        loss = loss_of_pairs(strengths_NM, pairs) + penalty / 2
        torch.autograd.backward(loss)
        return float(loss.detach())

    step: Callable[[Callable[[], float]], object] = optimizer.step
    step(loss_with_gradient)
    weight = weight_KM.detach().numpy() / unit_K[:, None]
    bias = bias_M.detach().numpy() / math.sqrt(curvature)
    # Only differences of strengths matter: centre them over the teachers.
    return spectrum.fold(weight - weight.mean(axis=1, keepdims=True), bias - bias.mean())

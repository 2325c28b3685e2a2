"""Heads: frozen features of a prompt → one value per teacher, behind one small protocol.

Each head chooses its L2 by k-fold cross-validation over prompts. ``auto`` chooses the head: see ``fit_auto``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from router_model.errors import CheckpointError, RouterError
from router_model.linear_fit import (
    LinearMap,
    Solver,
    Spectrum,
    column_means,
    decompose,
    solve_bradley_terry,
    solve_ridge,
)
from router_model.reward import regret

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Criterion = Literal["regret", "squared_error"]

N_FOLDS = 5
MIN_PROMPTS_FOR_AUTO = 10
# Strongest first, so that among equals the one nearer to the constant is taken.
RIDGE_L2 = (math.inf, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-4)
BT_L2 = (math.inf, 100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-3)


class Head(Protocol):
    """One value per teacher for each prompt."""

    @property
    def kind(self) -> str:
        """Name in the registry."""
        ...

    def predict(self, features_BD: NDArray[np.float32]) -> FloatArray:
        """Values, BM float64."""
        ...

    def tensors(self) -> dict[str, FloatArray]:
        """What a checkpoint stores, by name."""
        ...

    def scaled(self, factor: float) -> "Head":
        """The head whose values are these, centred over the teachers and multiplied by ``factor``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ConstantHead:
    """The same values for every prompt: the teachers' means. Its choice is the best single teacher."""

    mean_M: FloatArray
    kind: str = "constant"

    def predict(self, features_BD: NDArray[np.float32]) -> FloatArray:
        """The means, once per prompt."""
        return np.tile(self.mean_M, (len(features_BD), 1))

    def tensors(self) -> dict[str, FloatArray]:
        """The means."""
        return {"mean": self.mean_M}

    def scaled(self, factor: float) -> "ConstantHead":
        """Centred means times ``factor``."""
        return ConstantHead((self.mean_M - self.mean_M.mean()) * factor)


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """A linear map of the features. ``kind`` says what it was trained on: ``ridge`` or ``bt``."""

    kind: str
    linear: LinearMap

    def predict(self, features_BD: NDArray[np.float32]) -> FloatArray:
        """Features times weights plus bias."""
        return self.linear(features_BD)

    def tensors(self) -> dict[str, FloatArray]:
        """Weights, D × M, and bias, M."""
        return {"weight": self.linear.weight_DM, "bias": self.linear.bias_M}

    def scaled(self, factor: float) -> "LinearHead":
        """Centred over the teachers, times ``factor``."""
        weight_DM, bias_M = self.linear.weight_DM, self.linear.bias_M
        centred = LinearMap(
            (weight_DM - weight_DM.mean(axis=1, keepdims=True)) * factor, (bias_M - bias_M.mean()) * factor
        )
        return LinearHead(self.kind, centred)


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """One split of the prompts for cross-validation."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    spectrum: Spectrum


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """The features of the training prompts, decomposed once for all heads and folds."""

    features_ND: NDArray[np.float32]
    spectrum: Spectrum
    folds: tuple[Fold, ...]
    """Empty when there is one prompt only: nothing can be held out."""


def prepare(features_ND: NDArray[np.float32], *, seed: int) -> Design:
    """Decompose the features and draw the folds: five, or as many as there are prompts if that is fewer."""
    n_prompts = len(features_ND)
    n_folds = min(N_FOLDS, n_prompts)
    order = np.random.default_rng(seed).permutation(n_prompts)
    folds = []
    for held_out in np.array_split(order, n_folds) if n_folds > 1 else []:
        train = np.setdiff1d(np.arange(n_prompts), held_out)
        folds.append(Fold(train, np.sort(held_out), decompose(features_ND[train])))
    return Design(features_ND, decompose(features_ND), tuple(folds))


@dataclass(frozen=True, slots=True, eq=False)
class HeadFit:
    """A fitted head and what cross-validation said about it."""

    head: Head
    out_of_fold_NM: FloatArray | None
    """Predictions for each training prompt by a head that did not see it. None without folds."""
    facts: Mapping[str, Any]
    """Hyper-parameters and cross-validation numbers, ready for JSON. ``l2`` null means zero weights."""


Fit = Callable[[Design, FloatArray, BoolArray, Criterion], HeadFit]
Restore = Callable[[Mapping[str, FloatArray]], Head]


@dataclass(frozen=True, slots=True)
class HeadKind:
    """How a kind of head is fitted and how it is rebuilt from a checkpoint's tensors."""

    fit: Fit
    restore: Restore


def _loss(
    criterion: Criterion, values_NM: FloatArray, targets_NM: FloatArray, mask_NM: BoolArray
) -> FloatArray:
    """Loss of each prompt: what its choice costs, or the mean squared error over its present cells."""
    if criterion == "regret":
        return regret(values_NM, targets_NM, mask_NM)
    squared_NM = np.where(mask_NM, values_NM - targets_NM, 0.0) ** 2
    return np.asarray(squared_NM.sum(axis=1) / mask_NM.sum(axis=1))


def _spread(loss_N: FloatArray) -> float:
    """Standard error of a mean over prompts."""
    return float(loss_N.std(ddof=1) / math.sqrt(len(loss_N))) if len(loss_N) > 1 else 0.0


def _fit_constant(
    design: Design, targets_NM: FloatArray, mask_NM: BoolArray, criterion: Criterion
) -> HeadFit:
    """Teacher means; cross-validated too, so that the other heads have something to beat."""
    head = ConstantHead(column_means(targets_NM, mask_NM))
    if not design.folds:
        return HeadFit(head, None, {})
    predicted_NM = np.empty_like(targets_NM)
    for fold in design.folds:
        predicted_NM[fold.held_out] = column_means(targets_NM[fold.train], mask_NM[fold.train])
    loss_N = _loss(criterion, predicted_NM, targets_NM, mask_NM)
    return HeadFit(
        head, predicted_NM, {f"cv_{criterion}": float(loss_N.mean()), f"cv_{criterion}_se": _spread(loss_N)}
    )


def _linear_fit(kind: str, solve: Solver, grid: tuple[float, ...]) -> Fit:
    """A fit that chooses its L2 from ``grid`` by cross-validation and then uses every prompt."""

    def fit(design: Design, targets_NM: FloatArray, mask_NM: BoolArray, criterion: Criterion) -> HeadFit:
        if not design.folds:
            only = LinearHead(kind, solve(design.spectrum, targets_NM, mask_NM, math.inf))
            return HeadFit(only, None, {"l2": None})
        predicted_GNM = np.empty((len(grid), *targets_NM.shape))
        for fold in design.folds:
            targets, mask = targets_NM[fold.train], mask_NM[fold.train]
            for index, l2 in enumerate(grid):
                fitted = solve(fold.spectrum, targets, mask, l2)
                predicted_GNM[index, fold.held_out] = fitted(design.features_ND[fold.held_out])
        losses = [_loss(criterion, predicted_NM, targets_NM, mask_NM) for predicted_NM in predicted_GNM]
        means = [float(loss_N.mean()) for loss_N in losses]
        best = int(np.argmin(means))
        head = LinearHead(kind, solve(design.spectrum, targets_NM, mask_NM, grid[best]))
        facts = {
            "l2": _json_l2(grid[best]),
            f"cv_{criterion}": means[best],
            f"cv_{criterion}_se": _spread(losses[best]),
            "cv_by_l2": [[_json_l2(l2), mean] for l2, mean in zip(grid, means, strict=True)],
        }
        return HeadFit(head, predicted_GNM[best], facts)

    return fit


def _json_l2(l2: float) -> float | None:
    """JSON has no infinity: null stands for zero weights."""
    return None if math.isinf(l2) else l2


def _restore_constant(tensors: Mapping[str, FloatArray]) -> Head:
    _require(tensors, {"mean": 1})
    return ConstantHead(tensors["mean"])


def _restore_linear(kind: str) -> Restore:
    def restore(tensors: Mapping[str, FloatArray]) -> Head:
        _require(tensors, {"weight": 2, "bias": 1})
        return LinearHead(kind, LinearMap(tensors["weight"], tensors["bias"]))

    return restore


def _require(tensors: Mapping[str, FloatArray], n_dimensions: Mapping[str, int]) -> None:
    """Refuse tensors that are not those of the head."""
    found = {name: tensor.ndim for name, tensor in tensors.items()}
    if found != dict(n_dimensions):
        raise CheckpointError(f"the head's tensors (dimensions) are {found}, expected {dict(n_dimensions)}")


HEADS: Mapping[str, HeadKind] = MappingProxyType(
    {
        "constant": HeadKind(_fit_constant, _restore_constant),
        "ridge": HeadKind(_linear_fit("ridge", solve_ridge, RIDGE_L2), _restore_linear("ridge")),
        "bt": HeadKind(_linear_fit("bt", solve_bradley_terry, BT_L2), _restore_linear("bt")),
    }
)


def fit_head(kind: str, design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """Fit the head that chooses teachers, by kind or ``auto``; L2 is chosen on held-out regret.

    Args:
        targets_NM: Rewards; each prompt needs at least one present cell.
    """
    if kind == "auto":
        return fit_auto(design, targets_NM, mask_NM)
    if kind not in HEADS:
        raise RouterError(f"unknown head {kind!r}: expected one of {['auto', *HEADS]}")
    return HEADS[kind].fit(design, targets_NM, mask_NM, "regret")


def fit_auto(design: Design, targets_NM: FloatArray, mask_NM: BoolArray) -> HeadFit:
    """The head with the least cross-validated regret, if it beats the best single teacher.

    A learned head must have less held-out regret than the best single teacher *in hindsight* on the same
    prompts, by more than one standard error of the paired difference. Hindsight, because the cross-validated
    constant looks worse than it is: where teachers are close, leaving out the prompts that favour one lets
    the other win the rest, and without any signal a learned head would then be taken every second time. With
    fewer than 10 prompts cross-validation says nothing and the constant is taken at once.
    """
    constant = HEADS["constant"].fit(design, targets_NM, mask_NM, "regret")
    n_prompts = len(targets_NM)
    if n_prompts < MIN_PROMPTS_FOR_AUTO:
        reason = f"{n_prompts} prompts are too few to compare heads; {MIN_PROMPTS_FOR_AUTO} are needed"
        return HeadFit(constant.head, constant.out_of_fold_NM, {**constant.facts, "auto_reason": reason})
    fits = {"constant": constant}
    for kind in HEADS:
        fits.setdefault(kind, HEADS[kind].fit(design, targets_NM, mask_NM, "regret"))
    regrets = {kind: _held_out_regret(fit, targets_NM, mask_NM) for kind, fit in fits.items()}
    # ``min`` takes the first of equals: the registry lists the simpler head first.
    best = min((kind for kind in HEADS if kind != "constant"), key=lambda kind: float(regrets[kind].mean()))
    hindsight_NM = constant.head.predict(design.features_ND)
    gain_N = regret(hindsight_NM, targets_NM, mask_NM) - regrets[best]
    gain, spread = float(gain_N.mean()), _spread(gain_N)
    chosen = best if gain > spread else "constant"
    reason = f"{best} has {gain:.4g} less regret than the best single teacher (standard error {spread:.2g})"
    candidates = {kind: dict(fit.facts) for kind, fit in fits.items()}
    facts = {**fits[chosen].facts, "auto_reason": reason, "auto_candidates": candidates}
    return HeadFit(fits[chosen].head, fits[chosen].out_of_fold_NM, facts)


def _held_out_regret(fit: HeadFit, targets_NM: FloatArray, mask_NM: BoolArray) -> FloatArray:
    """Regret of each training prompt under the predictions of a head that did not see it."""
    if fit.out_of_fold_NM is None:
        raise RouterError("a head without folds has no held-out regret: at least two prompts are needed")
    return regret(fit.out_of_fold_NM, targets_NM, mask_NM)

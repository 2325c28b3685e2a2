"""Heads trained on an objective over the strengths of one reward: the paper's loss and its rivals.

One head serves one alpha only. Its L2 and its temperature are those of least held-out regret.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from router_model.design import Design, Fold
from router_model.errors import RouterError
from router_model.fitting import HeadFit
from router_model.heads import ConstantHead, LinearHead
from router_model.linear_fit import LinearMap, Spectrum, solve_objective
from router_model.objectives import OBJECTIVES
from router_model.reward import regret

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Strongest first, so that among equals the one nearer to the constant is taken.
L2_GRID = (math.inf, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
TEMPERATURES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {"soft_bt": (1.0, 0.3, 0.1), "listwise": (1.0, 0.3, 0.1), "regret": (1.0, 0.3, 0.1)}
)
"""To choose from, for the objectives that have one."""
MAX_AXES = 256
"""Principal axes of the features that an objective is fitted on: its steps cost as much as there are axes."""


def fit_objective(
    name: str,
    design: Design,
    rewards_NM: FloatArray,
    mask_NM: BoolArray,
    *,
    grid: Sequence[float] = L2_GRID,
) -> HeadFit:
    """Fit strengths by an objective of ``OBJECTIVES``.

    Args:
        rewards_NM: Rewards; each prompt needs at least one present cell.
        grid: L2 strengths to choose from.

    Raises:
        RouterError: There is no such objective.
    """
    if name not in OBJECTIVES:
        raise RouterError(f"unknown objective {name!r}: expected one of {list(OBJECTIVES)}")
    temperatures = TEMPERATURES.get(name, (1.0,))
    spectra = {fold: design.spectrum(fold) for fold in design.partition}

    def solve(spectrum: Spectrum, rows: NDArray[np.int64], l2: float, temperature: float) -> LinearMap:
        return solve_objective(
            spectrum,
            rewards_NM[rows],
            mask_NM[rows],
            l2,
            OBJECTIVES[name],
            temperature=temperature,
            max_axes=MAX_AXES,
        )

    def held_out(l2: float, temperature: float) -> tuple[FloatArray, list[LinearHead]]:
        predicted_NM, members = np.empty_like(rewards_NM), []
        for fold, spectrum in spectra.items():
            fitted = solve(spectrum, fold.train, l2, temperature)
            predicted_NM[fold.held_out] = fitted(design.features_ND[fold.held_out])
            members.append(LinearHead(fitted))
        return predicted_NM, members

    if not spectra:
        return HeadFit(
            _constant(solve(design.spectrum(), design.rows(None), math.inf, 1.0)),
            None,
            None,
            (),
            {"l2": None},
        )
    choices = list(itertools.product(grid, temperatures))
    fits = [held_out(*choice) for choice in choices]
    loss_GN = np.stack([regret(predicted_NM, rewards_NM, mask_NM) for predicted_NM, _ in fits])
    best = int(loss_GN.mean(axis=1).argmin())
    l2, temperature = choices[best]
    out_of_fold_NM = _without_own_choice(loss_GN, [predicted for predicted, _ in fits], design.partition)
    head = LinearHead(solve(design.spectrum(), design.rows(None), l2, temperature))
    facts = {
        "objective": name,
        "l2": None if math.isinf(l2) else l2,
        **({"temperature": temperature} if name in TEMPERATURES else {}),
        "cv_regret": float(regret(out_of_fold_NM, rewards_NM, mask_NM).mean()),
    }
    return HeadFit(head, out_of_fold_NM, None, tuple(fits[best][1]), facts)


def _without_own_choice(
    loss_GN: FloatArray, predicted: Sequence[FloatArray], partition: Sequence[Fold]
) -> FloatArray:
    """Held-out predictions by the hyper-parameters that the other folds would choose."""
    chosen_NM = np.empty_like(predicted[0])
    for fold in partition:
        others_G = loss_GN.sum(axis=1) - loss_GN[:, fold.held_out].sum(axis=1)
        chosen_NM[fold.held_out] = predicted[int(others_G.argmin())][fold.held_out]
    return chosen_NM


def _constant(linear: LinearMap) -> ConstantHead:
    return ConstantHead(linear.bias_M)

"""The learning curve: held-out regret against the number of labelled prompts."""

import numpy as np
from numpy.typing import NDArray

from router_model.alpha_calibration import hindsight_regret, standard_error
from router_model.design import Design
from router_model.linear_fit import decompose, ridge_path
from router_model.outlook import Parts
from router_model.reward import regret

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

N_SIZES = 5
MIN_PROMPTS = 20
L2_GRID = (1e6, 100.0, 30.0, 10.0, 3.0, 1.0, 0.1, 0.01)


def label_curve(
    design: Design,
    quality_NM: FloatArray,
    learnability_NM: FloatArray | None,
    mask_NM: BoolArray,
    alpha: float,
) -> list[dict[str, float | int]]:
    """Regret of ridge heads trained on parts of the prompts, in cross-validation.

    The L2 is the best of a grid at each size, chosen on the same regrets: hopeful, at all sizes alike.

    Returns:
        For each size, fewest prompts first, its held-out regret with its standard error and the regret of the
        best single teacher in hindsight; empty where there are too few prompts for a curve.
    """
    reward_NM = Parts(quality_NM, learnability_NM).mixed(alpha)
    single = float(hindsight_regret(reward_NM, mask_NM).mean())
    points: list[dict[str, float | int]] = []
    for size in _sizes(design):
        held_GNM = np.zeros((len(L2_GRID), *reward_NM.shape))
        for fold in design.partition:
            # Folds are drawn by chance but kept in order: a subset is drawn once more.
            rows = np.random.default_rng(size).permutation(fold.train)[:size]
            spectrum = decompose(design.features_ND[rows], design.widths)
            weights_GKM, bias_GM = ridge_path(spectrum, reward_NM[rows], mask_NM[rows], L2_GRID)
            rotated_BK = spectrum.rotate(design.features_ND[fold.held_out])
            held_GNM[:, fold.held_out] = rotated_BK @ weights_GKM + bias_GM[:, None]
        regret_GN = np.stack([regret(held_NM, reward_NM, mask_NM) for held_NM in held_GNM])
        best_N = regret_GN[int(regret_GN.mean(axis=1).argmin())]
        points.append(
            {
                "n_prompts": size,
                "regret": float(best_N.mean()),
                "regret_se": standard_error(best_N),
                "best_single_regret": single,
            }
        )
    return points


def _sizes(design: Design) -> list[int]:
    """Powers of two down from what cross-validation trains on."""
    if not design.partition:
        return []
    largest = min(len(fold.train) for fold in design.partition)
    sizes = [largest >> step for step in range(N_SIZES)]
    return sorted(size for size in sizes if size >= MIN_PROMPTS)

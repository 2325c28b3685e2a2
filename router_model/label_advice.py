"""Which prompts to label next: those that cover what is not labelled yet, the uncertain ones first."""

import numpy as np
from numpy.typing import NDArray

from router_model.errors import RouterError

FloatArray = NDArray[np.float64]

_SAME = 1e-12
"""Squared distance, relative to the squared norms, below which two prompts are one: rounding is less."""


def choose_prompts(
    features_UD: NDArray[np.floating],
    uncertainty_U: NDArray[np.floating],
    n: int,
    *,
    labelled_LD: NDArray[np.floating] | None = None,
) -> NDArray[np.int64]:
    """Greedy weighted k-center: each next prompt maximises uncertainty times distance to those chosen.

    Farthest-first traversal is within a factor of 2 of the best cover (Gonzalez, 1985; weighted by Dyer and
    Frieze, 1985). The first prompt is the most uncertain one, or the furthest from the labelled prompts.
    Prompts without uncertainty come last. A prompt whose features equal those of a chosen or labelled one is
    never chosen: its label is known already. Ties go to the first prompt, so the choice is deterministic.

    Args:
        features_UD: One row per unlabelled prompt: its encoding, or the router's strengths.
        uncertainty_U: At least 0, any scale.
        n: How many prompts can be labelled.
        labelled_LD: Features of the prompts that have labels, if they are to be kept away from.

    Returns:
        Up to n distinct row numbers, best first; fewer if no others differ.

    Raises:
        RouterError: The shapes do not fit, a value is not finite, or n or an uncertainty is negative.
    """
    features, weights_U = np.asarray(features_UD, dtype=np.float64), np.asarray(uncertainty_U, np.float64)
    labelled = (
        np.empty((0, features.shape[-1])) if labelled_LD is None else np.asarray(labelled_LD, np.float64)
    )
    _require(features, weights_U, labelled, n)
    if not len(features):
        return np.empty(0, dtype=np.int64)
    # Distances stay, and less is lost to rounding where all features lie far from the origin.
    middle_D = features.mean(axis=0)
    features, labelled = features - middle_D, labelled - middle_D
    norms_U = (features**2).sum(axis=1)
    distance_U = np.full(len(features), np.inf)
    for center_D in labelled:
        distance_U = np.minimum(distance_U, _squared_distance(features, norms_U, center_D))
    chosen: list[int] = []
    while len(chosen) < min(n, len(features)):
        column = _next(distance_U, weights_U)
        if distance_U[column] == 0.0:
            break
        chosen.append(column)
        distance_U = np.minimum(distance_U, _squared_distance(features, norms_U, features[column]))
        distance_U[column] = 0.0
    return np.array(chosen, dtype=np.int64)


def _require(features: FloatArray, weights_U: FloatArray, labelled: FloatArray, n: int) -> None:
    if features.ndim != 2 or weights_U.shape != (len(features),):
        raise RouterError(
            f"uncertainty has shape {weights_U.shape}, expected one for each of {features.shape}"
        )
    if labelled.ndim != 2 or labelled.shape[1] != features.shape[1]:
        raise RouterError(
            f"labelled features have shape {labelled.shape}, expected width {features.shape[1]}"
        )
    if n < 0:
        raise RouterError(f"{n} prompts cannot be chosen: expected 0 or more")
    finite = all(np.isfinite(array).all() for array in (features, weights_U, labelled))
    if not finite or (weights_U < 0).any():
        raise RouterError("features must be finite, and uncertainties finite and at least 0")


def _next(distance_U: FloatArray, weights_U: FloatArray) -> int:
    if np.isinf(distance_U).all():
        return int(np.argmax(weights_U))
    # Squared distances, so squared weights. Without any weight left, distance alone decides.
    scores_U = distance_U * weights_U**2
    return int(np.argmax(scores_U if scores_U.max() > 0 else distance_U))


def _squared_distance(features: FloatArray, norms_U: FloatArray, center_D: FloatArray) -> FloatArray:
    """To one center, U; exactly 0 where only rounding differs."""
    scale_U = norms_U + float(center_D @ center_D)
    squared_U = scale_U - 2.0 * (features @ center_D)
    return np.where(squared_U <= _SAME * scale_U, 0.0, squared_U)

"""A new teacher's values on the scale that its prompt's known teachers span."""

import numpy as np
from numpy.typing import NDArray

from router_model.errors import RouterError
from router_model.reward import Normalization

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def normalize_beside(
    values_N: FloatArray, known_NM: FloatArray, mask_NM: BoolArray, method: Normalization
) -> FloatArray:
    """Bring values to the scale of ``reward.normalize`` over the known teachers of each prompt.

    Inside the known teachers' range the scale is theirs. Outside, the distance to the nearest of them counts
    in units of the range that includes the new value: that is the distance which the reward over all teachers
    will show. In the known unit one prompt on which the known teachers happen to agree would outweigh all
    others: on real scores such targets lost to every alternative (docs/experiments.md).

    Args:
        values_N: The new teacher's.
        known_NM: The known teachers'; what stands in masked cells does not matter.
        mask_NM: At least two known teachers on each prompt.
        method: ``minmax`` gives values in [-1, 2]; ``zscore`` the distance to the known mean in deviations of
            all; ``rank`` half a step beyond the ends at most; ``none`` the values as they are.

    Raises:
        RouterError: There is no such method.
    """
    if method == "none":
        return values_N
    n_N = mask_NM.sum(axis=1)
    if method == "minmax":
        low_N = np.where(mask_NM, known_NM, np.inf).min(axis=1)
        high_N = np.where(mask_NM, known_NM, -np.inf).max(axis=1)
        return _between(values_N, low_N, high_N)
    if method == "zscore":
        mean_N = np.where(mask_NM, known_NM, 0.0).sum(axis=1) / n_N
        off_N = values_N - mean_N
        squares_N = (np.where(mask_NM, known_NM - mean_N[:, None], 0.0) ** 2).sum(axis=1)
        # The deviation over the known teachers and the new one, whose mean lies off / (n + 1) away.
        deviation_N = np.sqrt((squares_N + off_N**2 * n_N / (n_N + 1)) / (n_N + 1))
        return np.asarray(np.divide(off_N, deviation_N, out=np.zeros_like(off_N), where=deviation_N > 0))
    if method == "rank":
        below_N = (mask_NM & (known_NM < values_N[:, None])).sum(axis=1)
        equal_N = (mask_NM & (known_NM == values_N[:, None])).sum(axis=1)
        return np.asarray((below_N + 0.5 * equal_N - 0.5) / np.maximum(n_N - 1, 1))
    raise RouterError(f"unknown normalization {method!r}")


def _between(values_N: FloatArray, low_N: FloatArray, high_N: FloatArray) -> FloatArray:
    """0 at the lowest known teacher, 1 at the highest; all of them at 0.5 where they are equal."""
    varies_N = high_N > low_N
    range_N = np.maximum(np.maximum(values_N, high_N) - np.minimum(values_N, low_N), 0.0)
    # Where nothing differs at all there is no distance either.
    range_N = np.where(range_N > 0, range_N, 1.0)
    over_N = np.maximum(values_N - high_N, 0.0) / range_N
    under_N = np.maximum(low_N - values_N, 0.0) / range_N
    inside_N = (np.clip(values_N, low_N, high_N) - low_N) / np.where(varies_N, high_N - low_N, 1.0)
    return np.asarray(np.where(varies_N, inside_N, 0.5) + over_N - under_N)

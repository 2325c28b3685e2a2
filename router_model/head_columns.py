"""One more column for a head that is trained already: an affine combination of the columns it has.

Every kind of head is linear in its targets, so a combination of its columns is again a head of that kind, and
the columns that were there keep every bit.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

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
from router_model.linear_fit import LinearMap

FloatArray = NDArray[np.float64]


def without_gaps(head: Head) -> Head:
    """The head whose columns are combined: a neighbour's missing cell stands at its teacher's mean."""
    if isinstance(head, NeighbourHead):
        return _filled(head)
    if isinstance(head, BlendHead):
        return BlendHead(head.linear, _filled(head.neighbours))
    return head


def with_column(head: Head, weight_M: FloatArray, bias: float) -> Head:
    """The head with a last column ``values_BM @ weight_M + bias``, values those of ``without_gaps(head)``.

    Args:
        weight_M: Of the first M columns; a head may have more, which do not count.

    Raises:
        RouterError: Heads of this kind are not known here.
    """
    if isinstance(head, ConstantHead):
        return ConstantHead(_appended(head.mean_M, weight_M, bias))
    if isinstance(head, LinearHead):
        return _linear(head, weight_M, bias)
    if isinstance(head, NeighbourHead):
        return _neighbours(head, weight_M, bias)
    if isinstance(head, ClusterHead):
        return replace(head, values_CM=_appended(head.values_CM, weight_M, bias))
    if isinstance(head, MLPHead):
        return replace(
            head,
            weight_HM=_appended(head.weight_HM, weight_M),
            bias_M=_appended(head.bias_M, weight_M, bias),
        )
    if isinstance(head, BlendHead):
        return BlendHead(_linear(head.linear, weight_M, bias), _neighbours(head.neighbours, weight_M, bias))
    raise RouterError(f"a head of kind {head.kind!r} takes no further column: train again with all teachers")


def with_block_columns(head: Head, weights_AM: FloatArray, biases_A: FloatArray) -> LinearHead:
    """The same for a linear head of A blocks of columns: each block gets its own last one.

    Raises:
        RouterError: The head is of another kind.
    """
    if not isinstance(head, LinearHead):
        raise RouterError(f"a head of kind {head.kind!r} has no blocks: train again with all teachers")
    width = len(head.linear.bias_M) // len(biases_A)
    blocks = [
        LinearHead(head.linear.columns(slice(at * width, (at + 1) * width))) for at in range(len(biases_A))
    ]
    extended = [
        _linear(block, weight_M, float(bias)).linear
        for block, weight_M, bias in zip(blocks, weights_AM, biases_A, strict=True)
    ]
    return LinearHead(LinearMap.side_by_side(extended))


def _linear(head: LinearHead, weight_M: FloatArray, bias: float) -> LinearHead:
    known = head.linear
    return LinearHead(
        LinearMap(_appended(known.weight_DM, weight_M), _appended(known.bias_M, weight_M, bias))
    )


def _neighbours(head: NeighbourHead, weight_M: FloatArray, bias: float) -> NeighbourHead:
    filled_NM = _appended(_filled(head).targets_NM, weight_M, bias)
    return replace(
        head,
        targets_NM=np.hstack([head.targets_NM, filled_NM[:, -1:]]),
        mean_M=_appended(head.mean_M, weight_M, bias),
    )


def _filled(head: NeighbourHead) -> NeighbourHead:
    missing_NM = np.isnan(head.targets_NM)
    return replace(head, targets_NM=np.where(missing_NM, head.mean_M, head.targets_NM))


def _appended(values: FloatArray, weight_M: FloatArray, bias: float = 0.0) -> FloatArray:
    """The columns, the last axis of ``values``, and a combination of the first of them after them."""
    new = np.asarray(values[..., : len(weight_M)] @ weight_M + bias)
    return np.concatenate([values, new[..., None]], axis=-1)

"""Heads: frozen features of a prompt → one value per teacher, behind one small protocol.

This is what a checkpoint holds and the service runs; how heads are fitted stands in ``fitting.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router_model.errors import CheckpointError
from router_model.linear_fit import LinearMap

FloatArray = NDArray[np.float64]
FeatureArray = NDArray[np.float32]


class Head(Protocol):
    """One value per teacher for each prompt."""

    @property
    def kind(self) -> str:
        """Name in the registry."""
        ...

    def predict(self, features_BD: FeatureArray) -> FloatArray:
        """Values, BM float64."""
        ...

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """What a checkpoint stores, by name."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ConstantHead:
    """The same values for every prompt: the teachers' means. Its choice is the best single teacher."""

    mean_M: FloatArray
    kind: str = "constant"

    def predict(self, features_BD: FeatureArray) -> FloatArray:
        """The means, once per prompt."""
        return np.tile(self.mean_M, (len(features_BD), 1))

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """The means."""
        return {"mean": self.mean_M}


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """A linear map of the features."""

    linear: LinearMap
    kind: str = "linear"

    def predict(self, features_BD: FeatureArray) -> FloatArray:
        """Features times weights plus bias."""
        return self.linear(features_BD)

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """Weights, D × M, and bias, M."""
        return {"weight": self.linear.weight_DM, "bias": self.linear.bias_M}


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Features on a few principal axes of the training prompts: where distances between prompts are taken."""

    weight_DK: FloatArray
    bias_K: FloatArray

    def __call__(self, features_BD: FeatureArray) -> FloatArray:
        """Coordinates, BK."""
        return np.asarray(features_BD.astype(np.float64) @ self.weight_DK + self.bias_K)

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """The map."""
        return {"projection": self.weight_DK, "offset": self.bias_K}


def squared_distances(first_BK: FloatArray, second_NK: FloatArray) -> FloatArray:
    """Squared Euclidean distances, BN."""
    squares = (first_BK**2).sum(axis=1)[:, None] + (second_NK**2).sum(axis=1) - 2 * first_BK @ second_NK.T
    return np.asarray(np.maximum(squares, 0.0))


def nearest(distances_BN: FloatArray, k: int) -> NDArray[np.int64]:
    """Indices of the k nearest of N, in no order, BK."""
    k = min(k, distances_BN.shape[1])
    return np.argpartition(distances_BN, k - 1, axis=1)[:, :k].astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class NeighbourHead:
    """k nearest training prompts, shrunk: ``(sum + shrinkage * mean) / (k + shrinkage)``.

    The same rule with clusters in place of neighbours is ``ClusterHead``. A missing cell does not count.
    """

    projection: Projection
    points_NK: FloatArray
    targets_NM: FloatArray
    """NaN where a teacher did not answer."""
    mean_M: FloatArray
    k: int
    shrinkage: float
    kind: str = "knn"

    def predict(self, features_BD: FeatureArray) -> FloatArray:
        """Shrunken means over the neighbours."""
        return self.at(self.projection(features_BD))

    def at(self, points_BK: FloatArray) -> FloatArray:
        """The same for prompts that are projected already."""
        index_BK = nearest(squared_distances(points_BK, self.points_NK), self.k)
        values_BKM = self.targets_NM[index_BK]
        known_BKM = ~np.isnan(values_BKM)
        total_BM = np.where(known_BKM, values_BKM, 0.0).sum(axis=1)
        return np.asarray(
            (total_BM + self.shrinkage * self.mean_M) / (known_BKM.sum(axis=1) + self.shrinkage)
        )

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """The projection, the training prompts and their targets."""
        return {
            **self.projection.tensors(),
            "points": self.points_NK.astype(np.float32),
            "targets": self.targets_NM,
            "mean": self.mean_M,
            "options": np.array([self.k, self.shrinkage], dtype=np.float64),
        }


@dataclass(frozen=True, slots=True, eq=False)
class ClusterHead:
    """The table of the nearest cluster (Avengers, arXiv 2505.19797): its shrunken means, C × M."""

    projection: Projection
    centres_CK: FloatArray
    values_CM: FloatArray
    kind: str = "cluster"

    def predict(self, features_BD: FeatureArray) -> FloatArray:
        """The row of the nearest centre."""
        return self.at(self.projection(features_BD))

    def at(self, points_BK: FloatArray) -> FloatArray:
        """The same for prompts that are projected already."""
        return np.asarray(self.values_CM[squared_distances(points_BK, self.centres_CK).argmin(axis=1)])

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """The projection, the centres and their tables."""
        return {**self.projection.tensors(), "centres": self.centres_CK, "values": self.values_CM}


@dataclass(frozen=True, slots=True, eq=False)
class MLPHead:
    """One hidden layer of rectified units on the projected features."""

    projection: Projection
    weight_KH: FloatArray
    bias_H: FloatArray
    weight_HM: FloatArray
    bias_M: FloatArray
    kind: str = "mlp"

    def predict(self, features_BD: FeatureArray) -> FloatArray:
        """The network's output."""
        hidden_BH = np.maximum(self.projection(features_BD) @ self.weight_KH + self.bias_H, 0.0)
        return np.asarray(hidden_BH @ self.weight_HM + self.bias_M)

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """The projection and the weights."""
        return {
            **self.projection.tensors(),
            "weight_in": self.weight_KH,
            "bias_in": self.bias_H,
            "weight_out": self.weight_HM,
            "bias_out": self.bias_M,
        }


@dataclass(frozen=True, slots=True, eq=False)
class BlendHead:
    """The mean of a linear head and a neighbour head."""

    linear: LinearHead
    neighbours: NeighbourHead
    kind: str = "blend"

    def predict(self, features_BD: FeatureArray) -> FloatArray:
        """The mean of both."""
        return (self.linear.predict(features_BD) + self.neighbours.predict(features_BD)) / 2

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """Those of both heads; their names do not meet."""
        return {**self.linear.tensors(), **self.neighbours.tensors()}


Tensors = Mapping[str, FloatArray]


def _projection(tensors: Tensors) -> Projection:
    return Projection(tensors["projection"], tensors["offset"])


def _linear(tensors: Tensors) -> LinearHead:
    return LinearHead(LinearMap(tensors["weight"], tensors["bias"]))


def _neighbours(tensors: Tensors) -> NeighbourHead:
    k, shrinkage = tensors["options"]
    points, targets, mean = (tensors[name] for name in ("points", "targets", "mean"))
    return NeighbourHead(_projection(tensors), points, targets, mean, int(k), float(shrinkage))


def _network(tensors: Tensors) -> MLPHead:
    first, bias, second, offset = (tensors[name] for name in _NETWORK)
    return MLPHead(_projection(tensors), first, bias, second, offset)


_PROJECTED = {"projection": 2, "offset": 1}
_LINEAR = {"weight": 2, "bias": 1}
_NEIGHBOURS = {**_PROJECTED, "points": 2, "targets": 2, "mean": 1, "options": 1}
_NETWORK = {"weight_in": 2, "bias_in": 1, "weight_out": 2, "bias_out": 1}

RESTORE: Mapping[str, tuple[Mapping[str, int], Callable[[Tensors], Head]]] = MappingProxyType(
    {
        "constant": ({"mean": 1}, lambda tensors: ConstantHead(tensors["mean"])),
        "linear": (_LINEAR, _linear),
        "knn": (_NEIGHBOURS, _neighbours),
        "cluster": (
            {**_PROJECTED, "centres": 2, "values": 2},
            lambda tensors: ClusterHead(_projection(tensors), tensors["centres"], tensors["values"]),
        ),
        "mlp": (
            {**_PROJECTED, **_NETWORK},
            _network,
        ),
        "blend": (
            {**_LINEAR, **_NEIGHBOURS},
            lambda tensors: BlendHead(_linear(tensors), _neighbours(tensors)),
        ),
    }
)
"""For each kind its tensors with their number of dimensions, and how to build the head from them."""


def restore_head(kind: str, tensors: Mapping[str, NDArray[np.floating]]) -> Head:
    """Build a head from what ``Head.tensors`` gave.

    Raises:
        CheckpointError: The kind is unknown, or the tensors are not those of such a head.
    """
    if kind not in RESTORE:
        raise CheckpointError(f"a head of kind {kind!r} is unknown: expected one of {list(RESTORE)}")
    expected, build = RESTORE[kind]
    found = {name: tensor.ndim for name, tensor in tensors.items()}
    if found != dict(expected):
        raise CheckpointError(
            f"the head's tensors (dimensions) are {found}, expected {dict(expected)} for {kind!r}"
        )
    return build({name: tensor.astype(np.float64) for name, tensor in tensors.items()})

"""A router as named tensors and back: what ``head.safetensors`` holds."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.errors import CheckpointError
from router_model.heads import Head, Projection, restore_head
from router_model.model import Novelty, PartHeads, RouterModel, TeacherSummary
from router_model.outlook import AlphaCalibration, Mode, Parts
from router_model.reward import Normalization

FloatArray = NDArray[np.float64]
Tensors = Mapping[str, NDArray[np.floating]]

_PARTS = ("quality", "learnability", "fixed", "top")


def head_kinds(model: RouterModel) -> dict[str, str]:
    """Kind of every head by its purpose, such as ``chosen.quality`` or ``member.0.quality``."""
    return {purpose: head.kind for purpose, head in _heads(model)}


def model_tensors(model: RouterModel) -> dict[str, NDArray[np.floating]]:
    """All tensors of a router by ``PURPOSE.NAME``."""
    tensors = {
        f"{purpose}.{name}": np.ascontiguousarray(tensor)
        for purpose, head in _heads(model)
        for name, tensor in head.tensors().items()
    }
    tensors["means.quality"] = model.member_means.quality
    if model.member_means.learnability is not None:
        tensors["means.learnability"] = model.member_means.learnability
    novelty = model.novelty
    tensors |= {f"novelty.{name}": tensor for name, tensor in novelty.projection.tensors().items()}
    tensors["novelty.points"] = novelty.points_NK.astype(np.float32)
    tensors["novelty.options"] = np.array([novelty.k, novelty.threshold])
    return tensors


def restore_model(
    tensors: Tensors,
    kinds: Mapping[str, str],
    *,
    teachers: tuple[TeacherSummary, ...],
    alpha: float,
    normalization: Normalization,
    mode: Mode,
    kind: str,
    calibration: tuple[AlphaCalibration, ...],
    coverage: float,
    width: int,
    top_alphas: tuple[float, ...],
    facts: Mapping[str, Any],
) -> RouterModel:
    """Build the router that ``model_tensors`` and ``head_kinds`` came from.

    Args:
        width: Features of a prompt.

    Raises:
        CheckpointError: A head is missing or does not fit the teachers or the features.
        KeyError: A tensor is missing.
    """
    heads = {}
    for purpose, name in kinds.items():
        n_columns = len(teachers) * (len(top_alphas) if purpose.endswith(".top") else 1)
        heads[purpose] = _checked(purpose, restore_head(name, _own(tensors, purpose)), width, n_columns)
    missing = [name for name in ("chosen.quality", "raw.quality") if name not in heads]
    if missing:
        raise CheckpointError(f"there is no head for {missing[0]!r}")
    n_members = sum(purpose.startswith("member.") and purpose.endswith(".quality") for purpose in heads)
    novelty = {name: tensor.astype(np.float64) for name, tensor in _own(tensors, "novelty").items()}
    means = {name: tensor.astype(np.float64) for name, tensor in _own(tensors, "means").items()}
    k, threshold = novelty["options"]
    baselines = {name.removeprefix("baseline."): head for name, head in heads.items() if "baseline." in name}
    return RouterModel(
        teachers=teachers,
        alpha=alpha,
        normalization=normalization,
        mode=mode,
        kind=kind,
        chosen=_part_heads(heads, "chosen"),
        members=tuple(_part_heads(heads, f"member.{index}") for index in range(n_members)),
        member_means=Parts(means["quality"], means.get("learnability")),
        quality=heads["raw.quality"],
        learnability=heads.get("raw.learnability"),
        calibration=calibration,
        coverage=coverage,
        novelty=Novelty(
            Projection(novelty["projection"], novelty["offset"]),
            novelty["points"],
            int(k),
            float(threshold),
        ),
        top_alphas=top_alphas,
        baselines=MappingProxyType(baselines),
        facts=MappingProxyType(dict(facts)),
    )


def _heads(model: RouterModel) -> Iterator[tuple[str, Head]]:
    for group, parts in (
        ("chosen", model.chosen),
        *((f"member.{index}", member) for index, member in enumerate(model.members)),
    ):
        for name in _PARTS:
            head = getattr(parts, name)
            if head is not None:
                yield f"{group}.{name}", head
    yield "raw.quality", model.quality
    if model.learnability is not None:
        yield "raw.learnability", model.learnability
    for name, baseline in model.baselines.items():
        yield f"baseline.{name}", baseline


def _part_heads(heads: Mapping[str, Head], group: str) -> PartHeads:
    others = {name: heads.get(f"{group}.{name}") for name in _PARTS if name != "quality"}
    return PartHeads(heads[f"{group}.quality"], **others)


def _own(tensors: Tensors, purpose: str) -> dict[str, NDArray[np.floating]]:
    """Tensors of one purpose, by their own names."""
    start = f"{purpose}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start) and "." not in name.removeprefix(start)
    }


def _checked(purpose: str, head: Head, width: int, n_columns: int) -> Head:
    """The head, after a look at whether it answers for the teachers."""
    try:
        values_BM = head.predict(np.zeros((1, width), dtype=np.float32))
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"head {purpose!r} does not take {width} features: {error}") from error
    if values_BM.shape != (1, n_columns):
        raise CheckpointError(f"head {purpose!r} has {values_BM.shape[-1]} columns where {n_columns} belong")
    if not np.isfinite(values_BM).all():
        raise CheckpointError(f"head {purpose!r} holds NaN or infinity")
    return head

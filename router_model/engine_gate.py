"""The gate of faster arithmetic: a router may use it if it decides as it does in float32.

Measured when a router is trained, on its own prompts, and kept among the facts of the checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from router_model.backbone import Backbone, Encoded
from router_model.model import RouterModel
from router_model.network import Precision
from router_model.outlook import RouterOutput

Engine = Literal["auto", "fp32", "bf16"]
"""What is asked for. ``auto``: bfloat16 if the hardware computes in it and the router passed the gate."""

ENGINES_FACT = "engines"
MIN_AGREEMENT = 0.99
"""Share of the prompts that must go to the same teacher."""
MAX_STRENGTH_DIFFERENCE = 0.1
"""Logits. A win probability moves by a fortieth at most."""
_MAX_PROMPTS = 2000


@dataclass(frozen=True, slots=True)
class EngineAgreement:
    """How a router decides in other arithmetic, against float32, at the checkpoint's alpha."""

    n_prompts: int
    agreement: float
    """Share of the prompts with the same strongest teacher."""
    max_strength_difference: float
    """Over all prompts and teachers, logits."""

    @property
    def passes(self) -> bool:
        """Whether the arithmetic may be used unasked."""
        close = self.max_strength_difference <= MAX_STRENGTH_DIFFERENCE
        return self.n_prompts > 0 and close and self.agreement >= MIN_AGREEMENT


def compare(reference: RouterOutput, other: RouterOutput) -> EngineAgreement:
    """How far two outputs for the same prompts agree."""
    one_BM, other_BM = reference.at().strengths_BM, other.at().strengths_BM
    if not len(one_BM):
        return EngineAgreement(0, 0.0, 0.0)
    return EngineAgreement(
        n_prompts=len(one_BM),
        agreement=float((one_BM.argmax(axis=1) == other_BM.argmax(axis=1)).mean()),
        max_strength_difference=float(np.abs(one_BM - other_BM).max()),
    )


def with_agreement(
    model: RouterModel,
    encoded: Encoded,
    texts: Sequence[str],
    load: Callable[[Precision], Backbone],
    progress: Callable[[int], Any],
) -> RouterModel:
    """The model with what its gate measured among its facts; nothing where there is no faster arithmetic.

    Args:
        encoded: The texts in float32; at most 2,000, evenly spaced, are encoded anew.
        load: Loads the same backbone for another arithmetic.
        progress: Called with the number of prompts done since the last call.
    """
    facts = {name: value for name, value in model.facts.items() if name != ENGINES_FACT}
    if has_bf16("cpu") and texts:
        rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), _MAX_PROMPTS)).astype(np.int64))
        features_BD = load("bf16").encode([texts[row] for row in rows]).features_BD
        measured = compare(model.predict(encoded.features_BD[rows]), model.predict(features_BD))
        facts[ENGINES_FACT] = {"bf16": asdict(measured)}
        progress(len(rows))
    return replace(model, facts=facts)


def choose_precision(engine: Engine, facts: Mapping[str, Any], device: str) -> Precision:
    """The arithmetic for a checkpoint, by its facts and the hardware."""
    if engine != "auto":
        return engine
    measured = facts.get(ENGINES_FACT, {}).get("bf16")
    return "bf16" if measured and EngineAgreement(**measured).passes and has_bf16(device) else "fp32"


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself: elsewhere they are slower than float32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(hasattr(torch.cpu, flag) and bool(getattr(torch.cpu, flag)()) for flag in flags)

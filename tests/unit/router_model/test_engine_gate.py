"""Faster arithmetic is taken if the hardware has it and the router decides as in float32, and only then."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from router_model import engine_gate
from router_model.engine_gate import EngineAgreement, choose_precision, compare, has_bf16
from router_model.inference import Router
from router_model.network import TOLERANCE
from tests.integration.serving import train_checkpoint
from tests.unit.router_model.doubles import fake_output

GOOD = EngineAgreement(2000, 0.995, 0.02)
TEXTS = [
    *[f"What is {number} plus {number * number}, and why?" * (1 + number % 7) for number in range(120)],
    *[
        f"Write {number} lines of verse on the sea, the wind and the gulls. " * (number % 11)
        for number in range(120)
    ],
]


def test_agreement_counts_choices_and_measures_strengths() -> None:
    """One changed choice of four, and the largest difference over all cells."""
    one = np.array([[1.0, 0.0], [0.2, 0.1], [0.0, 1.0], [3.0, 2.0]])
    other = one + np.array([[0.01, 0.0], [0.0, 0.15], [0.0, 0.0], [-0.02, 0.0]])
    found = compare(fake_output(one), fake_output(other))
    assert (found.n_prompts, found.agreement) == (4, 0.75)
    assert found.max_strength_difference == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("measured", "passes"),
    [
        (GOOD, True),
        (EngineAgreement(2000, 0.989, 0.02), False),
        (EngineAgreement(2000, 1.0, 0.11), False),
        (EngineAgreement(0, 1.0, 0.0), False),
    ],
)
def test_the_gate(measured: EngineAgreement, passes: bool) -> None:
    """Both bounds hold, and nothing passes unmeasured."""
    assert measured.passes is passes


def test_precision_is_chosen_by_request_gate_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is taken; auto wants a passed gate and hardware for it."""
    monkeypatch.setattr(engine_gate, "has_bf16", lambda device: device == "able")
    passed = {"engines": {"bf16": asdict(GOOD)}}
    failed = {"engines": {"bf16": asdict(EngineAgreement(2000, 0.9, 0.5))}}
    assert choose_precision("auto", passed, "able") == "bf16"
    assert choose_precision("auto", passed, "unable") == "fp32"
    assert choose_precision("auto", failed, "able") == "fp32"
    assert choose_precision("auto", {}, "able") == "fp32"
    assert choose_precision("bf16", failed, "unable") == "bf16"
    assert choose_precision("fp32", passed, "able") == "fp32"


def test_a_trained_router_knows_its_agreement(tmp_path: Path, minilm_path: Path) -> None:
    """Training records it where the hardware has bfloat16; loaded so, the router decides and scores alike."""
    checkpoint = train_checkpoint(tmp_path, minilm_path)
    exact = Router.load(checkpoint)
    if not has_bf16("cpu"):
        assert "engines" not in exact.manifest.facts
        pytest.skip("this processor does not compute in bfloat16: its arithmetic is not tested here")
    measured = EngineAgreement(**exact.manifest.facts["engines"]["bf16"])
    assert measured.passes
    assert measured.n_prompts == exact.manifest.training.n_prompts
    fast = Router.load(checkpoint, precision="bf16")
    assert (fast.backbone.precision, fast.backbone.network.kind) == ("bf16", "packed")
    assert next(iter(fast.backbone.network._model.parameters())).dtype == torch.bfloat16
    found = compare(exact.score(TEXTS), fast.score(TEXTS))
    assert found.agreement >= engine_gate.MIN_AGREEMENT
    one, other = (router.backbone.encode(TEXTS).features_BD for router in (exact, fast))
    assert np.linalg.norm(one - other, axis=1).max() < TOLERANCE["bf16"] * len(exact.backbone.views)

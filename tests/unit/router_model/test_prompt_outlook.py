"""What a router says of a prompt, as bytes and back."""

import math
import zlib

import numpy as np
import pytest

from router_model.model import RouterModel
from router_model.outlook import RouterOutput
from router_model.prompt_outlook import OutlookForm
from router_model.training import fit_router
from tests.unit.router_model.worlds import linear_world, make_table

FEATURES, QUALITY = linear_world(120, noise=0.3)
LEARNABILITY = -2.0 + 0.5 * QUALITY[:, ::-1]


def trained(kind: str) -> RouterModel:
    """A router of each mode, and one that knows no learnability."""
    if kind == "blind":
        return fit_router(FEATURES, make_table(QUALITY), alpha=0.0)
    return fit_router(FEATURES, make_table(QUALITY, LEARNABILITY), alpha=0.4, head_kind=kind)


def predicted(model: RouterModel, n_prompts: int = 5) -> RouterOutput:
    """What it says of the first prompts; one of them was cut, one is far from all others."""
    features = FEATURES[:n_prompts].copy()
    features[1] *= 1000
    truncated = np.arange(n_prompts) == 2
    return model.predict(features, np.arange(7, 7 + n_prompts), truncated)


def form_of(output: RouterOutput, checkpoint_id: str = "c" * 64, engine: str = "fp32") -> OutlookForm:
    """The form of a router's rows."""
    return OutlookForm(output, checkpoint_id=checkpoint_id, engine=engine)


@pytest.mark.parametrize("kind", ["auto", "ridge", "bt", "blind"])
def test_a_row_holds_all_that_the_router_says(kind: str) -> None:
    """At every alpha that it serves; in float32."""
    output = predicted(trained(kind))
    form = form_of(output)
    for row in range(5):
        key = form.key(f"prompt {row}")
        packed = form.pack(output, row, key)
        assert form.accepts(key, packed)
        back = form.unpack(packed)
        for alpha in (0.0, 0.25, 0.4, 1.0) if output.any_alpha else (None,):
            ours, theirs = back.at(alpha), output.at(alpha)
            np.testing.assert_allclose(ours.strengths_BM[0], theirs.strengths_BM[row], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                ours.members_EBM[:, 0], theirs.members_EBM[:, row], rtol=1e-4, atol=1e-4
            )
            assert (ours.helps, ours.conformal_width, ours.coverage) == (
                theirs.helps,
                theirs.conformal_width,
                theirs.coverage,
            )
        np.testing.assert_allclose(back.quality_BM[0], output.quality_BM[row], rtol=1e-6)
        np.testing.assert_allclose(back.learnability_BM[0], output.learnability_BM[row], rtol=1e-6)
        for name in ("input_tokens_B", "truncated_B", "out_of_distribution_B"):
            assert getattr(back, name)[0] == getattr(output, name)[row]
    assert output.truncated_B.sum() == 1
    assert output.out_of_distribution_B.sum() >= 1
    assert math.isnan(back.learnability_BM[0, 0]) == (kind == "blind")


def test_a_key_depends_on_all_that_a_row_depends_on() -> None:
    """Prompt, checkpoint and arithmetic, and nothing that two of them could be confused by."""
    output = predicted(trained("ridge"))
    keys = [
        form_of(output, checkpoint, engine).key(text)
        for checkpoint in ("a", "b")
        for engine in ("fp32", "bf16")
        for text in ("", "x", "x\n", "\nx", "x ", "X", "é", "e\u0301", "\ud800")
    ]
    assert len(set(keys)) == len(keys)
    assert form_of(output).key("x") == form_of(predicted(trained("ridge"))).key("x")


def test_what_is_not_whole_is_not_accepted() -> None:
    """No length, no flipped bit, no row of another prompt or of a router with other heads."""
    output = predicted(trained("auto"))
    form = form_of(output)
    key = form.key("x")
    row = form.pack(output, 0, key)
    assert not form.accepts(key, b"")
    assert not form.accepts(key, row[:-1])
    assert not form.accepts(key, row + b"\0")
    assert not form.accepts(form.key("y"), row)
    for place in range(len(row)):
        assert not form.accepts(key, row[:place] + bytes([row[place] ^ 4]) + row[place + 1 :])
    newer = row[:2] + bytes([row[2] + 1]) + row[3:-4]
    assert not form.accepts(key, newer + zlib.crc32(newer).to_bytes(4, "little"))
    blind = predicted(trained("blind"))
    assert not form.accepts(key, form_of(blind).pack(blind, 0, key))

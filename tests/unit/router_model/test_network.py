"""However a network is run, its features are those of plain transformers in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from router_model import prepacked_linear
from router_model.network import TOLERANCE, PaddedNetwork, Precision, open_network
from router_model.packed_network import PackedNetwork
from router_model.views import View

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 600}
GEMMA = {**DECODER, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

PACKED: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**SIZES, intermediate_size=48),
    "roberta": lambda: RobertaConfig(**SIZES, intermediate_size=48, pad_token_id=1),
    "modernbert": lambda: ModernBertConfig(
        **SIZES, intermediate_size=48, local_attention=16, pad_token_id=0, layer_types=TYPES
    ),
    "llama": lambda: LlamaConfig(**DECODER),
    "mistral": lambda: MistralConfig(**DECODER, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**DECODER),
    "qwen3": lambda: Qwen3Config(**DECODER, head_dim=8),
    "gemma2": lambda: Gemma2Config(**GEMMA, layer_types=TYPES, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA, layer_types=TYPES),
}
LENGTHS = (5, 300, 1, 41, 17, 130)
"""Shorter and longer than the windows, and for each way of computing attention."""


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A model with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return model.requires_grad_(requires_grad=False)


def random_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Ids without the special ones."""
    generator = np.random.default_rng(0)
    return [generator.integers(3, 97, size=length).tolist() for length in lengths]


def all_views(model: Any) -> list[View]:
    """Every layer, pooled both ways."""
    layers = range(model.config.get_text_config().num_hidden_layers + 1)
    return [View(pooling, layer) for layer in layers for pooling in ("mean", "last")]


def plain_features(model: Any, ids: list[int], views: list[View]) -> np.ndarray:
    """The same by transformers' own attention, one prompt, nothing around it."""
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    features = []
    for view in views:
        hidden = states[view.layer][0].double()
        mean = hidden.mean(dim=0)
        features.append(hidden[-1] if view.pooling == "last" else mean / mean.norm())
    return torch.cat(features).numpy()


def drift(found: np.ndarray, expected: np.ndarray, n_views: int) -> float:
    """Largest distance of a view's features, as a share of their length."""
    pairs = zip(np.split(found, n_views), np.split(expected, n_views), strict=True)
    return max(float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in pairs)


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_give_what_transformers_gives(name: str) -> None:
    """For each architecture every layer of every prompt in a mixed row equals its own plain float32 pass."""
    model = random_model(PACKED[name]())
    views, prompts = all_views(model), random_prompts()
    expected = [plain_features(model, ids, views) for ids in prompts]
    network = open_network(model, 97)
    assert network.kind == "packed"
    for found, wanted in zip(network.features(prompts, views), expected, strict=True):
        assert drift(found, wanted, len(views)) < TOLERANCE["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2", "gemma3"])
def test_order_and_company_change_nothing(name: str, precision: Precision) -> None:
    """Features alone, in a row with others, and in the reverse order agree within the stated tolerance."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = random_model(PACKED[name](), dtype)
    network = PackedNetwork(model)
    views, prompts = [View("mean", 3), View("last", 2)], random_prompts()
    together = network.features(prompts, views)
    backwards = network.features(prompts[::-1], views)[::-1]
    for row, ids in enumerate(prompts):
        alone = network.features([ids], views)[0]
        assert drift(together[row], alone, 2) < TOLERANCE[precision]
        assert drift(backwards[row], alone, 2) < TOLERANCE[precision]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: DebertaV2Config(**SIZES, intermediate_size=48), id="deberta"),
        pytest.param(lambda: DistilBertConfig(vocab_size=97, dim=32, n_layers=3, n_heads=4), id="distilbert"),
        pytest.param(lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4), id="gpt2"),
    ],
)
def test_any_other_architecture_is_served_as_well(config: Callable[[], PreTrainedConfig]) -> None:
    """A model whose code does not take packed rows is run padded, unharmed by the attempt, and right."""
    model = random_model(config())
    views, prompts = all_views(model), random_prompts()
    expected = [plain_features(model, ids, views) for ids in prompts]
    network = open_network(model, 97)
    for found, wanted in zip(network.features(prompts, views), expected, strict=True):
        assert drift(found, wanted, len(views)) < TOLERANCE["fp32"]


def test_a_model_that_mixes_prompts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """If packed rows let prompts see each other, the trial at the start says so and rows are padded."""
    monkeypatch.setattr(
        "router_model.packed_network.packed_arguments",
        lambda _ends, n_tokens: {"cu_seq_lens_q": torch.tensor([0, n_tokens])},
    )
    model = random_model(PACKED["bert"]())
    before = [type(module) for module in model.modules()]
    assert open_network(model, 97).kind == "padded"
    assert [type(module) for module in model.modules()] == before


def test_nothing_runs_beyond_the_deepest_view() -> None:
    """Layers that no view asks for cost nothing."""
    model = random_model(PACKED["llama"]())
    network = PackedNetwork(model)
    ran: list[int] = []
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    network.features([[5, 6, 7]], [View("last", 2), View("mean", 1)])
    assert ran == [0, 1]


def test_long_calls_are_split() -> None:
    """More tokens than a row holds go into several rows, in order."""
    model = random_model(PACKED["bert"]())
    prompts = random_prompts(tuple([400] * 12))
    views = [View("mean", 3)]
    packed = PackedNetwork(model)
    found = packed.features(prompts, views)
    packed.unpack()
    np.testing.assert_allclose(found, PaddedNetwork(model).features(prompts, views), atol=1e-4)


def test_prepacked_layers_compute_the_same_and_can_be_taken_back() -> None:
    """oneDNN's layout gives the products of ``nn.Linear``, with and without bias, in both precisions."""
    if not prepacked_linear.is_available():
        pytest.fail("this build of PyTorch lacks oneDNN: the fast path of the engine is untested here")
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        layers = torch.nn.Sequential(
            torch.nn.Linear(64, 48, dtype=dtype), torch.nn.Linear(48, 32, bias=False, dtype=dtype)
        )
        originals = list(layers)
        inputs = torch.randn(1, 7, 64, dtype=dtype)
        with torch.inference_mode():
            expected = layers(inputs)
            replaced = prepacked_linear.prepack(layers)
            assert [type(layer) for layer in layers] == [prepacked_linear.PrepackedLinear] * 2
            torch.testing.assert_close(layers(inputs), expected, atol=tolerance, rtol=tolerance)
        prepacked_linear.restore(replaced)
        assert list(layers) == originals

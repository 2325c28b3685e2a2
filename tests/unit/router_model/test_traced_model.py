"""A model as one operation: the same states, for any shape; or none where Python chooses by what it reads."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_model.memory import keep_freed_memory
from router_model.network import open_network
from router_model.packed_network import PackedNetwork
from router_model.traced_model import trace_model
from router_model.views import View
from tests.unit.router_model.test_network import PACKED, random_model, random_prompts


class Chooser(nn.Module):
    """Its Python depends on the length of what it reads."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids * 2.0 if ids.shape[0] > 3 else ids * 3.0


def states_of(model: nn.Module) -> Any:
    """A function that calls it."""
    return lambda ids: (model(ids),)


def test_what_python_chooses_is_not_traced() -> None:
    """The trace would go one way for all: the other inputs show it."""
    model = Chooser()
    rows = [(torch.arange(1.0, length),) for length in (8, 3, 5)]
    assert trace_model(model, states_of(model), rows[0], rows[1:]) is None
    assert trace_model(model, states_of(model), rows[0], [rows[2]]) is not None


def test_what_cannot_be_traced_is_not() -> None:
    """Whatever goes wrong, the model runs as it did."""

    def broken(_ids: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no")

    model = nn.Identity()
    assert trace_model(model, broken, (torch.ones(2),), [(torch.ones(3),)]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
def test_every_packed_architecture_is_traced(name: str, dtype: torch.dtype) -> None:
    """With the features of the untraced one, for prompts unlike all examples and for new sets of layers."""
    model = random_model(PACKED[name](), dtype)
    network = open_network(model, 97)
    assert isinstance(network, PackedNetwork)
    prompts = random_prompts((33, 1, 500, 64, 97, 16))
    for views in ([View("mean", 3)], [View("last", 1), View("mean", 2)]):
        traced = network.features(prompts, views)
        program = network._programs[tuple(view.layer for view in views)]
        assert program is not None
        network._is_traced = False
        expected = network.features(prompts, views)
        network._is_traced = True
        torch.testing.assert_close(torch.tensor(traced), torch.tensor(expected), rtol=1e-3, atol=1e-5)


def test_a_few_sets_of_layers_are_traced() -> None:
    """A trace takes memory and time; beyond a few the model runs as it is."""
    model = random_model(PACKED["bert"]())
    network = open_network(model, 97)
    assert isinstance(network, PackedNetwork)
    prompts = random_prompts((5, 9))
    every = [[View("mean", layer) for layer in range(4) if number >> layer & 1] for number in range(1, 16)]
    expected = network.features(prompts, [View("mean", layer) for layer in range(4)])
    for views in every:
        found = network.features(prompts, views)
        width = 32
        for place, view in enumerate(views):
            wanted = expected[:, view.layer * width : (view.layer + 1) * width]
            assert abs(found[:, place * width : (place + 1) * width] - wanted).max() < 1e-4
    assert len(network._programs) == 8


def test_freed_memory_can_be_kept() -> None:
    """On the C library of nearly every Linux; and asking twice does no harm."""
    assert keep_freed_memory() == keep_freed_memory()

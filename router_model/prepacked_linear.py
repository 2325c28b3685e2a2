"""Linear layers whose weights oneDNN has laid out for its own matrix products, on the CPU.

PyTorch multiplies float32 matrices by MKL, which leaves half of an AMD processor unused; and bfloat16 ones by
oneDNN, which lays out the weights anew in each call. The operators used here are those that PyTorch's own
compiler emits; where a build of PyTorch lacks them, layers stay as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from router_model.traced_model import is_tracing

_MIN_FEATURES = 16
"""Below, laying out pays nothing."""


def is_available() -> bool:
    """Whether this build of PyTorch has the operators."""
    return bool(torch._C._has_mkldnn) and all(  # noqa: SLF001
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


class PrepackedLinear(nn.Module):
    """``nn.Linear`` for inference; the layer's own weight can be let go."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)  # noqa: SLF001
        self._weight: Tensor
        self._bias: Tensor | None
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("_bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states times the weight, plus the bias."""
        multiply = _scripted() if is_tracing() else _multiply
        return multiply(hidden, self._weight, self._bias)


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")  # noqa: SLF001
    return product


@functools.cache
def _scripted() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The same as one operation of a trace, which cannot hold the operator's empty list."""
    return torch.jit.script(_multiply)


def prepack(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Replace the plain linear layers of a model, and say which: what ``restore`` takes back."""
    replaced: list[tuple[nn.Module, str, nn.Linear]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # A subclass computes something else, or is quantised.
            if type(child) is nn.Linear and min(child.in_features, child.out_features) >= _MIN_FEATURES:
                setattr(parent, name, PrepackedLinear(child))
                replaced.append((parent, name, child))
    return replaced


def restore(replaced: list[tuple[nn.Module, str, Any]]) -> None:
    """Put the layers back."""
    for parent, name, child in replaced:
        setattr(parent, name, child)

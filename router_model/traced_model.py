"""A model as one operation, which runs without Python: several threads run it side by side.

PyTorch's operators let go of the interpreter's lock while they work, but need it between each other, a
thousand times for a batch. Two threads that run models, and an event loop beside them, spend a quarter of
their time waiting for it. A trace also saves what transformers' own Python takes: half of the time that a
short prompt needs.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

Inputs = tuple[Tensor, ...]
States = Callable[..., tuple[Tensor, ...]]
"""From tensors to the hidden states of some layers."""

_TOLERANCE = 1e-3
"""Of a state's length. A trace runs the same kernels in the same order; more means that it fixed a choice."""


class _Forward(nn.Module):
    """What is traced. Holding the model as a part lets the trace share its weights."""

    def __init__(self, model: nn.Module, states: States) -> None:
        super().__init__()
        self._model = model
        self._states = states

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._states(*inputs)


def is_tracing() -> bool:
    """Whether what this thread computes is being traced."""
    return torch._C._get_tracing_state() is not None  # noqa: SLF001


def trace_model(model: nn.Module, states: States, example: Inputs, others: Sequence[Inputs]) -> States | None:
    """The same function as a trace, or ``None`` where a trace cannot be made or says something else.

    Args:
        states: Calls ``model``.
        example: What it is traced with.
        others: Inputs of other shapes, on which both must agree.
    """
    try:
        with _silent(), torch.inference_mode():
            # Graphs specialised by shapes seen first would be compiled anew for each new shape.
            torch._C._jit_set_profiling_mode(False)  # noqa: SLF001
            trace = cast("Any", torch.jit.trace)
            traced: States = trace(_Forward(model, states).eval(), example, check_trace=False)
            drift = max(_drift(traced(*inputs), states(*inputs)) for inputs in others)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        if drift <= _TOLERANCE:
            return traced
        reason = f"states differ by {drift:.2g}"
    logger.info("model_not_traced", extra={"model": type(model).__name__, "reason": reason})
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """Without what is said of TorchScript's end, and of whatever a trace touches in the model."""
    log: Any = transformers_logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)


def _drift(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(
        float(torch.linalg.norm((one - other).float()) / torch.linalg.norm(other.float()))
        for one, other in zip(found, expected, strict=True)
    )

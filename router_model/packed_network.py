"""A network on packed rows: prompts one behind the other, and nothing computed for padding."""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from router_model.batches import token_batches
from router_model.errors import BackboneError
from router_model.packed_attention import PACKED, packed_arguments, row_ends
from router_model.pooling import Features, pool
from router_model.pretrained import is_encoder, position_offset
from router_model.traced_model import States, trace_model
from router_model.views import View

_PACKED_TOKENS = 2048
"""Tokens of a packed row: matrix products are full long before, and other work waits for a whole row."""
_MOST_PROGRAMS = 8
"""Sets of layers for which a model is traced."""
_SHORTEST_STEP, _STEPS_PER_ROW = 16, 32
"""A row is filled up to a multiple of 16 tokens, or of a 32nd of the next power of two if that is more."""


class PackedNetwork:
    """Prompts one behind the other in one row, up to the deepest layer that a view asks for.

    Raises:
        BackboneError: The model's layers cannot be told apart.
    """

    def __init__(self, model: Any) -> None:
        self.kind = "packed"
        self.concurrent = not _changes_as_it_runs(model)
        self._is_traced = False
        self._programs: dict[tuple[int, ...], States | None] = {}
        self._tracing = threading.Lock()
        self._examples: Sequence[Sequence[Sequence[int]]] = ()
        self._model = model
        self._device = next(model.parameters()).device
        layers = _layers(model)
        self._n_layers = len(layers)
        self._recorder = _Recorder(layers)
        self._offset = position_offset(model)
        self._options = {} if is_encoder(model.config) else {"use_cache": False}
        self._implementation = model.config._attn_implementation  # noqa: SLF001
        model.set_attn_implementation(PACKED)

    def allow_traces(self, examples: Sequence[Sequence[Sequence[int]]]) -> None:
        """From now on run without Python where that gives the same.

        Args:
            examples: Rows of prompts of different shapes, two or more: one to trace, the others to try it on.
        """
        self._examples = examples
        self._is_traced = self.concurrent

    def unpack(self) -> None:
        """Give the model back its own attention."""
        self._recorder.remove()
        self._model.set_attn_implementation(self._implementation)

    def features(self, prompts: Sequence[Sequence[int]], views: Sequence[View]) -> Features:
        """See ``Network.features``."""
        parts = [
            self._forward([prompts[index] for index in batch], views)
            for batch in token_batches([len(ids) for ids in prompts], token_budget=_PACKED_TOKENS)
        ]
        return cast("Features", np.concatenate(parts))

    def _forward(self, prompts: Sequence[Sequence[int]], views: Sequence[View]) -> Any:
        layers = tuple(sorted({view.layer for view in views}))
        with torch.inference_mode():
            inputs, lengths = self._row(prompts)
            program = self._program(layers)
            hidden = self._states(layers, *inputs) if program is None else program(*inputs)
            states = {
                layer: torch.split(found[0], lengths)[: len(prompts)]
                for layer, found in zip(layers, hidden, strict=True)
            }
            return torch.cat([pool(states[view.layer], view) for view in views], dim=1).numpy()

    def _row(self, prompts: Sequence[Sequence[int]]) -> tuple[tuple[Tensor, ...], list[int]]:
        """Ids (1, T), positions (1, T), ends, and the length of each prompt, a filler among them."""
        filler = _filler(sum(len(ids) for ids in prompts))
        row = [*prompts, filler] if filler else prompts
        lengths = [len(ids) for ids in row]
        ids = torch.tensor([list(chain.from_iterable(row))], device=self._device)
        positions = torch.cat([torch.arange(length) for length in lengths])[None] + self._offset
        return (ids, positions.to(self._device), row_ends(lengths)), lengths

    def _program(self, layers: tuple[int, ...]) -> States | None:
        """How these layers' states are computed without Python; ``None`` where that is not possible."""
        if not self._is_traced:
            return None
        with self._tracing:
            if layers not in self._programs and len(self._programs) < _MOST_PROGRAMS:
                example, *others = (self._row(prompts)[0] for prompts in self._examples)
                self._programs[layers] = trace_model(
                    self._model, functools.partial(self._states, layers), example, others
                )
            return self._programs.get(layers)

    def _states(
        self, layers: Sequence[int], ids: Tensor, positions: Tensor, ends: Tensor
    ) -> tuple[Tensor, ...]:
        """Hidden states (1, T, D) after each layer. The last one's are normed by the model."""
        with self._recorder.recording(set(layers)) as hidden:
            try:
                outputs = self._model(
                    input_ids=ids,
                    position_ids=positions,
                    **packed_arguments(ends, ids.shape[1]),
                    **self._options,
                )
                hidden[self._n_layers] = outputs.last_hidden_state
            except _DeepEnoughError:
                pass
        return tuple(hidden[layer] for layer in layers)


def _filler(n_tokens: int) -> list[int]:
    """Ids of one more prompt, which fills a row up to one of few lengths.

    oneDNN compiles its matrix products for each length of a row. That takes as long as a row of 500 tokens,
    and the compiled products of a thousand lengths more than a gigabyte.
    """
    step = max(_SHORTEST_STEP, (1 << (n_tokens - 1).bit_length()) // _STEPS_PER_ROW)
    return [0] * (-n_tokens % step)


def _layers(model: Any) -> Sequence[nn.Module]:
    """The model's layers, in order.

    Raises:
        BackboneError: There is no list of as many as the config says.
    """
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    raise BackboneError(f"{type(model).__name__} has no list of {n_layers} layers")


def _changes_as_it_runs(model: Any) -> bool:
    """Whether rotary embeddings adapt to the length of what was read last."""
    kinds: list[Any] = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds += kind.values() if isinstance(kind, dict) else [kind]
    return any(kind == "longrope" or "dynamic" in (kind or "") for kind in kinds)


class _DeepEnoughError(Exception):
    """Ends a forward pass when all wanted hidden states are known. It never leaves this file."""


class _Recorder:
    """Records what goes into the layers, which left the ones before; each thread its own forward pass.

    Stops before the first layer that is not needed.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._own = threading.local()
        self._handles = [
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]

    def remove(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def recording(self, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
        """The states before the wanted layers, of the forward pass that this thread does in the block."""
        hidden: dict[int, Tensor] = {}
        self._own.wanted, self._own.hidden = wanted, hidden
        try:
            yield hidden
        finally:
            self._own.wanted = set()

    def _hook(self, number: int) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            wanted = getattr(self._own, "wanted", ())
            if number not in wanted:
                return
            self._own.hidden[number] = args[0] if args else kwargs["hidden_states"]
            if number == max(wanted):
                raise _DeepEnoughError

        return record

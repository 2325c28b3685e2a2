"""The network under a backbone: ids of prompts in, hidden states pooled by views out.

Two ways of running it give the same features. Packed rows hold the prompts one behind the other: nothing is
computed for padding, which in batches of mixed lengths is most of the work. Padded batches work for every
model that transformers has, and on every device.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from router_model import prepacked_linear
from router_model.batches import length_batches
from router_model.errors import BackboneError
from router_model.packed_network import PackedNetwork
from router_model.pooling import Features, pool
from router_model.pretrained import is_encoder, max_positions
from router_model.views import View

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
"""Arithmetic of the network. Pooling and heads are computed in float32 and above."""

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 3e-2}
"""By how much the length of a prompt's features, set to 1, may move with the company it is encoded in."""

_PADDED_TOKENS = 4096

_PROBES = ((3, 5, 4, 11, 7), (9, 2, 13), (6, 8, 5, 3, 12, 10, 4, 2, 7, 9, 11, 3))
"""Ids of three prompts, small enough for any vocabulary."""

_MISFITS = (
    AttributeError,
    BackboneError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model raises that does not take packed rows."""


class Network(Protocol):
    """A model that can be run."""

    @property
    def kind(self) -> str:
        """How it is run, for logs."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether several threads may run it at once."""
        ...

    def features(self, prompts: Sequence[Sequence[int]], views: Sequence[View]) -> Features:
        """Pooled hidden states of each prompt, one view after the other, in input order."""
        ...


class PaddedNetwork:
    """Batches of similar length, padded on the right."""

    def __init__(self, model: Any) -> None:
        self.kind = "padded"
        # Unknown models are run one batch at a time; on a GPU nothing else would be faster.
        self.concurrent = False
        self._model = model
        self._device = next(model.parameters()).device
        # A decoder's cache of keys and values is for generation: here it would only take memory.
        self._options = {} if is_encoder(model.config) else {"use_cache": False}

    def features(self, prompts: Sequence[Sequence[int]], views: Sequence[View]) -> Features:
        """See ``Network.features``."""
        width = int(self._model.config.get_text_config().hidden_size)
        features_BD = np.zeros((len(prompts), width * len(views)), dtype=np.float32)
        for rows in length_batches([len(ids) for ids in prompts], token_budget=_PADDED_TOKENS):
            features_BD[rows] = self._forward([prompts[row] for row in rows], views)
        return features_BD

    def _forward(self, prompts: Sequence[Sequence[int]], views: Sequence[View]) -> Any:
        lengths = [len(ids) for ids in prompts]
        rows = [torch.tensor(ids) for ids in prompts]
        # What stands in the padding is masked, so any id that every vocabulary has will do.
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        mask_BT = (torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]).long()
        with torch.inference_mode():
            outputs = self._model(
                input_ids=ids_BT.to(self._device),
                attention_mask=mask_BT.to(self._device),
                output_hidden_states=True,
                **self._options,
            )
            return torch.cat([pool(_unpadded(outputs, view, lengths), view) for view in views], dim=1).numpy()


def open_network(model: Any, vocabulary_size: int) -> Network:
    """The fastest way of running a model that gives what transformers gives for it.

    That a packed row gives the same is not taken for granted of any architecture: it is tried on three short
    prompts.
    """
    probes = [[token % vocabulary_size for token in probe] for probe in _PROBES]
    padded = PaddedNetwork(model)
    if next(model.parameters()).device.type != "cpu":
        return padded
    views = [View("mean", layer) for layer in range(model.config.get_text_config().num_hidden_layers + 1)]
    expected = padded.features(probes, views)
    replaced = prepacked_linear.prepack(model) if prepacked_linear.is_available() else []
    packed = None
    try:
        packed = PackedNetwork(model)
        drift = _drift(packed.features(probes, views), expected, len(views))
        reason = f"features differ by {drift:.2g}"
    except _MISFITS as error:
        drift, reason = np.inf, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    tolerance = TOLERANCE["fp32" if model.dtype == torch.float32 else "bf16"]
    if packed is not None and drift <= tolerance:
        packed.allow_traces(_examples(probes, max_positions(model)))
        return packed
    if packed is not None:
        packed.unpack()
    prepacked_linear.restore(replaced)
    logger.warning("backbone_not_packed", extra={"model": type(model).__name__, "reason": reason})
    return padded


def _examples(probes: Sequence[Sequence[int]], longest: int | None) -> list[list[list[int]]]:
    """Rows in which attention is computed in all its ways, in other orders and lengths than the first one."""
    long = [token for _ in range(12) for probe in probes for token in probe][:longest]
    return [
        [[*probes[0]], [*long[:130]]],
        [[*long], [*probes[2]], [*probes[1]], [*long[:16]]],
        [[*probes[1]]],
    ]


def _drift(found: Features, expected: Features, n_views: int) -> float:
    """Largest distance between features of one prompt and view, as a share of their length."""
    pairs = zip(np.split(found, n_views, axis=1), np.split(expected, n_views, axis=1), strict=True)
    drifts = [np.linalg.norm(one - other, axis=1) / np.linalg.norm(other, axis=1) for one, other in pairs]
    return float(np.max(drifts))


def _unpadded(outputs: Any, view: View, lengths: Sequence[int]) -> list[Tensor]:
    hidden_BTD = outputs.hidden_states[view.layer]
    return [hidden_BTD[row, :length] for row, length in enumerate(lengths)]

"""The backbone: a pretrained language model that turns prompts into feature vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel

from router_model.errors import BackboneError
from router_model.memory import keep_freed_memory
from router_model.network import DTYPES, Network, Precision, open_network
from router_model.pooling import Features
from router_model.pretrained import (
    fingerprint,
    is_encoder,
    load_pretrained,
    load_tokenizer,
    locate_model,
    max_positions,
)
from router_model.prompt_tokenizer import Frame, PromptTokenizer
from router_model.tokenization import PromptEncoding
from router_model.views import Pooling, View, candidate_views, parse_views


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Features of B prompts, in input order.

    Attributes:
        features_BD: float32.
        input_tokens_B: int64, length of each prompt before truncation, control tokens included. A lower
            bound where a very long prompt was cut before it was tokenised.
        truncated_B: bool, whether the backbone saw less than the whole prompt.
    """

    features_BD: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    input_tokens_B: np.ndarray[tuple[int], np.dtype[np.int64]]
    truncated_B: np.ndarray[tuple[int], np.dtype[np.bool_]]

    @classmethod
    def of(cls, prompts: Sequence[PromptEncoding], features_BD: Features) -> Self:
        """Features with the lengths of their prompts."""
        return cls(
            features_BD=features_BD,
            input_tokens_B=np.array([prompt.n_tokens for prompt in prompts], dtype=np.int64),
            truncated_B=np.array([prompt.truncated for prompt in prompts], dtype=np.bool_),
        )


class Backbone:
    """A frozen model with its tokenizer. Made by ``load_backbone``; used from one owned thread.

    The features of a prompt are those of its views, one after the other, each ``hidden`` wide. An encoder
    reads the bare text, and keeps the beginning of one that is too long. A decoder with a chat template reads
    the prompt as a user's turn, up to where its own answer would begin: there it has made up its mind of what
    is asked, and the last token says much more than after a bare text (docs/experiments.md). It keeps the end
    of a text that is too long.
    """

    def __init__(
        self,
        *,
        name: str,
        network: Network,
        tokenizer: PromptTokenizer,
        views: Sequence[View],
        hidden: int,
        n_layers: int,
        fingerprint: str,
        precision: Precision,
    ) -> None:
        self.name = name
        self.network = network
        self.tokenizer = tokenizer
        self.views = tuple(views)
        self.hidden = hidden
        self.n_layers = n_layers
        self.fingerprint = fingerprint
        self.precision: Precision = precision

    @property
    def width(self) -> int:
        """Length of a prompt's features."""
        return self.hidden * len(self.views)

    @property
    def frame(self) -> Frame:
        """What stands around a prompt."""
        return self.tokenizer.frame

    @property
    def max_tokens(self) -> int:
        """Limit per prompt, with what stands around it."""
        return self.tokenizer.max_tokens

    def with_views(self, views: Sequence[View]) -> "Backbone":
        """The same model in memory, seen through other views; itself if they are its own."""
        if tuple(views) == self.views:
            return self
        return Backbone(
            name=self.name,
            network=self.network,
            tokenizer=self.tokenizer,
            views=views,
            hidden=self.hidden,
            n_layers=self.n_layers,
            fingerprint=self.fingerprint,
            precision=self.precision,
        )

    def last_view(self, pooling: Pooling) -> View:
        """The view of the last layer."""
        return View(pooling, self.n_layers)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode prompts; the order and the company of a prompt do not change its features.

        How far they do is ``network.TOLERANCE``.
        """
        prompts = self.tokenizer.encode(texts)
        return Encoded.of(prompts, self.features(prompts))

    def features(self, prompts: Sequence[PromptEncoding]) -> Features:
        """Features of prompts that are tokenised already, in input order."""
        if not prompts:
            return np.zeros((0, self.width), dtype=np.float32)
        # A tokenizer that adds no control tokens turns an empty prompt into nothing; a model needs one token.
        ids = [prompt.ids or [self.tokenizer.pad_id] for prompt in prompts]
        return self.network.features(ids, self.views)


def load_backbone(
    name: str,
    *,
    max_tokens: int,
    views: Sequence[str] | None = None,
    frame: Frame | None = None,
    weights: Path | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    threads: int | None = None,
    precision: Precision = "fp32",
    device: str = "cpu",
) -> Backbone:
    """Load a backbone.

    Args:
        name: Hub id, local folder, or ``.gguf`` file. A local path never touches the network, and code
            that comes with a model is never run.
        max_tokens: Limit per prompt, with what stands around it; lowered to what the model has positions for.
        views: Names such as ``last@22``; by default several layers of the model.
        frame: By default ``chat`` for a decoder with a chat template, else ``plain``.
        weights: Fine-tuned weights, a ``.safetensors`` file, to be put in place of the model's own.
        state: The same in memory.
        threads: Torch threads of this process, unchanged if ``None``.
        precision: Arithmetic of the network.
        device: A torch device.

    Raises:
        BackboneError: The model cannot be loaded or cannot be used as a backbone.
    """
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    source = locate_model(name)
    model = load_pretrained(AutoModel, source, dtype=DTYPES[precision], device=device)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name!r} is an encoder-decoder, expected an encoder or a decoder")
    if weights is not None:
        state = _read_weights(weights)
    if state is not None:
        _put_weights(model, state, name)
    text_config = model.config.get_text_config()
    n_layers = int(text_config.num_hidden_layers)
    encoder = is_encoder(model.config)
    chosen = (
        candidate_views(n_layers, is_encoder=encoder)
        if views is None
        else parse_views(views, n_layers=n_layers)
    )
    tokenizer = load_tokenizer(source)
    if frame is None:
        frame = "chat" if tokenizer.chat_template and not encoder else "plain"
    prompt_tokenizer = PromptTokenizer(
        tokenizer,
        frame=frame,
        max_tokens=min(max_tokens, max_positions(model) or max_tokens),
        keep="start" if encoder else "end",
    )
    return Backbone(
        name=name,
        network=open_network(model, int(text_config.vocab_size)),
        tokenizer=prompt_tokenizer,
        views=chosen,
        hidden=int(text_config.hidden_size),
        n_layers=n_layers,
        fingerprint=fingerprint(source),
        precision=precision,
    )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path} cannot be read: {error}") from error


def _put_weights(model: Any, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Replace the weights of a model by those of a fine-tuned one.

    Raises:
        BackboneError: They are not of this model.
    """
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"the fine-tuned weights are not those of {name!r}: {reason}") from error

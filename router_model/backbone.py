"""The backbone: a pretrained language model that turns prompts into feature vectors."""

import contextlib
import hashlib
import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from router_model.errors import BackboneError
from router_model.tokenization import PromptEncoding, chat_frame, control_frame, encode_prompts
from router_model.views import Pooling, View, candidate_views, parse_views

Frame = Literal["plain", "chat"]
"""What stands around a prompt: the tokenizer's control tokens, or its chat template up to the answer."""

_TOKEN_BUDGET = 4096
"""Padded tokens per forward pass: large enough for full matrix products, small enough for any memory."""

_LOADING_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    struct.error,
)
"""What transformers raises for a folder or a file that holds no such model, or a damaged one."""

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a pretrained model comes from, in the words of ``from_pretrained``.

    ``folder`` is a local folder or a hub id; ``gguf_file`` is a file inside the folder.
    """

    name: str
    folder: str
    gguf_file: str | None
    is_local: bool


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


class Backbone:
    """A frozen model with its tokenizer. Made by ``load_backbone``; used from one owned thread.

    Fast tokenizers keep per-call state (truncation, handling of control tokens), so two threads must not
    call ``encode`` at once.

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
        model: Any,
        tokenizer: Any,
        views: Sequence[View],
        frame: Frame,
        max_tokens: int,
        fingerprint: str,
    ) -> None:
        self.name = name
        self.views = tuple(views)
        self.frame: Frame = frame
        self.max_tokens = max_tokens
        self.fingerprint = fingerprint
        self.hidden = int(model.config.get_text_config().hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._keeps_start = is_encoder(model.config)
        self._frame_ids = _frame_ids(tokenizer, frame)

    @property
    def width(self) -> int:
        """Length of a prompt's features."""
        return self.hidden * len(self.views)

    def with_views(self, views: Sequence[View]) -> "Backbone":
        """The same model in memory, seen through other views; itself if they are its own."""
        if tuple(views) == self.views:
            return self
        return Backbone(
            name=self.name,
            model=self._model,
            tokenizer=self._tokenizer,
            views=views,
            frame=self.frame,
            max_tokens=self.max_tokens,
            fingerprint=self.fingerprint,
        )

    def last_view(self, pooling: Pooling) -> View:
        """The view of the last layer."""
        return View(pooling, int(self._model.config.get_text_config().num_hidden_layers))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode prompts; the order and the company of a prompt do not change its features (1e-4)."""
        prompts = encode_prompts(
            self._tokenizer,
            texts,
            max_tokens=self.max_tokens,
            keep="start" if self._keeps_start else "end",
            frame=self._frame_ids,
        )
        features_BD = np.zeros((len(prompts), self.width), dtype=np.float32)
        for rows in length_batches([len(prompt.ids) for prompt in prompts], token_budget=_TOKEN_BUDGET):
            features_BD[rows] = self._forward([prompts[row] for row in rows])
        return Encoded(
            features_BD=features_BD,
            input_tokens_B=np.array([prompt.n_tokens for prompt in prompts], dtype=np.int64),
            truncated_B=np.array([prompt.truncated for prompt in prompts], dtype=np.bool_),
        )

    def _forward(self, prompts: Sequence[PromptEncoding]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Features of one batch, padded on the right."""
        # A tokenizer that adds no control tokens turns an empty prompt into nothing; a model needs one token.
        pad_id = self._tokenizer.pad_token_id or 0
        ids = [torch.tensor(prompt.ids or [pad_id]) for prompt in prompts]
        lengths_B = torch.tensor([len(row) for row in ids])
        ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        with torch.inference_mode():
            outputs = self._model(
                input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, **self._extra()
            )
            views = [
                _pool(outputs.hidden_states[view.layer], mask_BT, lengths_B, view) for view in self.views
            ]
        return cast("np.ndarray[Any, np.dtype[np.float32]]", torch.cat(views, dim=1).float().numpy())

    def _extra(self) -> dict[str, Any]:
        """A decoder's cache of keys and values is for generation: here it would only take memory."""
        return {} if self._keeps_start else {"use_cache": False}


def _pool(
    hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, lengths_B: torch.Tensor, view: View
) -> torch.Tensor:
    if view.pooling == "last":
        return hidden_BTD[torch.arange(len(lengths_B)), lengths_B - 1]
    sums_BD = (hidden_BTD * mask_BT[..., None]).sum(dim=1)
    return torch.nn.functional.normalize(sums_BD / lengths_B[:, None], dim=1)


def _frame_ids(tokenizer: Any, frame: Frame) -> tuple[list[int], list[int]]:
    return control_frame(tokenizer) if frame == "plain" else chat_frame(tokenizer)


def load_backbone(
    name: str,
    *,
    max_tokens: int,
    views: Sequence[str] | None = None,
    frame: Frame | None = None,
    weights: Path | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    threads: int | None = None,
) -> Backbone:
    """Load a backbone in float32 on the CPU.

    Args:
        name: Hub id, local folder, or ``.gguf`` file. A local path never touches the network, and code
            that comes with a model is never run.
        max_tokens: Limit per prompt, with what stands around it; lowered to what the model has positions for.
        views: Names such as ``last@22``; by default several layers of the model.
        frame: By default ``chat`` for a decoder with a chat template, else ``plain``.
        weights: Fine-tuned weights, a ``.safetensors`` file, to be put in place of the model's own.
        state: The same in memory.
        threads: Torch threads of this process, unchanged if ``None``.

    Raises:
        BackboneError: The model cannot be loaded or cannot be used as a backbone.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    source = locate_model(name)
    model = load_pretrained(AutoModel, source)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name!r} is an encoder-decoder, expected an encoder or a decoder")
    if weights is not None:
        state = _read_weights(weights)
    if state is not None:
        _put_weights(model, state, name)
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    encoder = is_encoder(model.config)
    chosen = (
        candidate_views(n_layers, is_encoder=encoder)
        if views is None
        else parse_views(views, n_layers=n_layers)
    )
    tokenizer = load_tokenizer(source)
    if frame is None:
        frame = "chat" if tokenizer.chat_template and not encoder else "plain"
    limit = min(max_tokens, max_positions(model) or max_tokens)
    n_frame = sum(len(part) for part in _frame_ids(tokenizer, frame))
    if limit <= n_frame:
        raise BackboneError(f"max_tokens is {limit}, expected more than {n_frame} for {name!r}")
    return Backbone(
        name=name,
        model=model,
        tokenizer=tokenizer,
        views=chosen,
        frame=frame,
        max_tokens=limit,
        fingerprint=fingerprint(source),
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


def length_batches(lengths: Sequence[int], *, token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest batch last, each within the budget of padded tokens.

    One item that is longer than the budget is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def locate_model(name: str) -> ModelSource:
    """Tell a hub id from a local folder and a ``.gguf`` file.

    Raises:
        BackboneError: The name looks like a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise BackboneError(f"{name!r} is a file, expected a .gguf file, a model folder or a hub id")
        return ModelSource(name, str(path.parent), path.name, is_local=True)
    if path.is_dir():
        return ModelSource(name, str(path), None, is_local=True)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix.lower() == ".gguf":
        raise BackboneError(f"there is no model at {name!r}: expected a model folder or a .gguf file")
    return ModelSource(name, name, None, is_local=False)


def load_pretrained(auto_class: Any, source: ModelSource) -> Any:
    """Load a model through one of the ``AutoModel`` classes: float32, evaluation mode, no remote code.

    Raises:
        BackboneError: It cannot be loaded; the message says why.
    """
    with _loading(source):
        model = auto_class.from_pretrained(
            source.folder, dtype=torch.float32, trust_remote_code=False, **_where(source)
        )
    model.eval()
    return model.requires_grad_(requires_grad=False)


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises:
        BackboneError: It cannot be loaded; the message says why.
    """
    with _loading(source):
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, **_where(source))


def max_positions(model: Any) -> int | None:
    """Tokens that the model has positions for, ``None`` if it has no such limit.

    RoBERTa and its kin number positions from ``padding_idx + 1``, so that many of them are never used.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions:
        return None
    for module_name, module in model.named_modules():
        if module_name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(positions) - int(module.padding_idx) - 1
    return int(positions)


def fingerprint(source: ModelSource) -> str:
    """SHA-256 over the names and bytes of a model's weight, tokenizer and config files.

    Raises:
        BackboneError: The files of a hub model are not in the local cache.
    """
    digest = hashlib.sha256()
    for path in _model_files(source):
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _model_files(source: ModelSource) -> list[Path]:
    if source.gguf_file is not None:
        # The file's own name says nothing about the model: a renamed copy is the same backbone.
        return [Path(source.folder, source.gguf_file)]
    folder = Path(source.folder)
    if not source.is_local:
        config = try_to_load_from_cache(source.folder, "config.json")
        if not isinstance(config, str):
            raise BackboneError(f"the files of {source.name!r} are not in the local hub cache")
        folder = Path(config).parent
    # Transformers prefers safetensors: other weights beside them are not what was loaded.
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    others = [folder / name for name in ("config.json", *_TOKENIZER_FILES)]
    return weights + [path for path in others if path.is_file()]


def _where(source: ModelSource) -> dict[str, Any]:
    where: dict[str, Any] = {"local_files_only": True} if source.is_local else {}
    if source.gguf_file is not None:
        where["gguf_file"] = source.gguf_file
    return where


@contextlib.contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    """No progress bars for local files, and every failure as a ``BackboneError``."""
    progress: Any = transformers_logging
    had_bars = progress.is_progress_bar_enabled()
    if source.is_local:
        progress.disable_progress_bar()
    # The bar of the GGUF reader has no switch, so it writes to a buffer.
    bars = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext()
    try:
        with bars:
            yield
    except _LOADING_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"cannot load {source.name!r}: {type(error).__name__}: {reason}") from error
    finally:
        if had_bars:
            progress.enable_progress_bar()


def is_encoder(config: Any) -> bool:
    """Whether a model attends in both directions: what is trained by masked language modelling does."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)

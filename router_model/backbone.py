"""The backbone: a pretrained language model that turns prompts into feature vectors."""

import contextlib
import hashlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from router_model.errors import BackboneError
from router_model.tokenization import PromptEncoding, control_frame, encode_prompts

Pooling = Literal["mean", "last"]

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

    ``mean`` pooling averages the final hidden states over a prompt's tokens and scales the result to
    length 1, as sentence-transformers does for its encoders; a too long prompt keeps its beginning.
    ``last`` takes the final hidden state of the last token; a too long prompt keeps its end.
    """

    def __init__(
        self, *, name: str, model: Any, tokenizer: Any, pooling: Pooling, max_tokens: int, fingerprint: str
    ) -> None:
        self.name = name
        self.pooling: Pooling = pooling
        self.max_tokens = max_tokens
        self.fingerprint = fingerprint
        self.width = int(model.config.get_text_config().hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._keeps_start = _is_encoder(model.config)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode prompts; the order and the company of a prompt do not change its features (1e-4)."""
        prompts = encode_prompts(
            self._tokenizer,
            texts,
            max_tokens=self.max_tokens,
            keep="start" if self._keeps_start else "end",
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
        """Pooled features of one batch, padded on the right."""
        # A tokenizer that adds no control tokens turns an empty prompt into nothing; a model needs one token.
        pad_id = self._tokenizer.pad_token_id or 0
        ids = [torch.tensor(prompt.ids or [pad_id]) for prompt in prompts]
        lengths_B = torch.tensor([len(row) for row in ids])
        ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        with torch.inference_mode():
            outputs = self._model(input_ids=ids_BT, attention_mask=mask_BT)
            hidden_BTD = outputs.last_hidden_state
            if self.pooling == "last":
                pooled_BD = hidden_BTD[torch.arange(len(ids)), lengths_B - 1]
            else:
                sums_BD = (hidden_BTD * mask_BT[..., None]).sum(dim=1)
                pooled_BD = torch.nn.functional.normalize(sums_BD / lengths_B[:, None], dim=1)
        return cast("np.ndarray[Any, np.dtype[np.float32]]", pooled_BD.float().numpy())


def load_backbone(
    name: str, *, max_tokens: int, pooling: str | None = None, threads: int | None = None
) -> Backbone:
    """Load a backbone in float32 on the CPU.

    Args:
        name: Hub id, local folder, or ``.gguf`` file. A local path never touches the network, and code
            that comes with a model is never run.
        max_tokens: Limit per prompt; lowered to what the model has positions for.
        pooling: ``mean`` or ``last``; by default ``mean`` for encoders and ``last`` for decoders.
        threads: Torch threads of this process, unchanged if ``None``.

    Raises:
        BackboneError: The model cannot be loaded or cannot be used as a backbone.
    """
    if pooling not in (None, "mean", "last"):
        raise BackboneError(f"unknown pooling {pooling!r}, expected 'mean' or 'last'")
    if threads is not None:
        torch.set_num_threads(threads)
    source = locate_model(name)
    model = load_pretrained(AutoModel, source)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name!r} is an encoder-decoder, expected an encoder or a decoder")
    tokenizer = load_tokenizer(source)
    limit = min(max_tokens, max_positions(model) or max_tokens)
    n_frame = sum(len(part) for part in control_frame(tokenizer))
    if limit <= n_frame:
        raise BackboneError(f"max_tokens is {limit}, expected more than {n_frame} for {name!r}")
    default: Pooling = "mean" if _is_encoder(model.config) else "last"
    return Backbone(
        name=name,
        model=model,
        tokenizer=tokenizer,
        pooling=cast("Pooling", pooling) if pooling else default,
        max_tokens=limit,
        fingerprint=fingerprint(source),
    )


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


def _is_encoder(config: Any) -> bool:
    """Whether a model attends in both directions: what is trained by masked language modelling does."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)

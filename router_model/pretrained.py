"""Pretrained models by name: a hub id, a local folder or a ``.gguf`` file; found, loaded, fingerprinted."""

import contextlib
import hashlib
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from router_model.errors import BackboneError

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


def load_pretrained(
    auto_class: Any, source: ModelSource, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """Load a model through one of the ``AutoModel`` classes: evaluation mode, no gradients, no remote code.

    Raises:
        BackboneError: It cannot be loaded; the message says why.
    """
    with _loading(source):
        model = auto_class.from_pretrained(
            source.folder, dtype=dtype, trust_remote_code=False, **_where(source)
        )
        model.to(device)
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
    """Tokens that the model has positions for, ``None`` if it has no such limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(positions) - position_offset(model) if positions else None


def position_offset(model: Any) -> int:
    """Number of a prompt's first position. RoBERTa and its kin count from ``padding_idx + 1``."""
    for module_name, module in model.named_modules():
        if module_name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


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

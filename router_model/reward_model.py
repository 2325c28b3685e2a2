"""A sequence-classification reward model: (messages, response) pairs to one logit each."""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from clients.types import ChatMessage
from router_model.errors import BackboneError
from router_model.tokenization import control_texts, message_text, plain_ids, prompt_text, sanitize

Pair = tuple[Sequence[ChatMessage], str]

_MARK = "\ue000{}\ue001"
"""Stands in for a special token's text while the chat template is rendered: private-use, in no template."""
_MARKED = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Tokens of one pair; ``type_ids`` where the tokenizer has them (BERT)."""

    ids: list[int]
    type_ids: list[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RewardModel:
    """A loaded reward model. Made by ``load_reward_model``.

    The pair is rendered by the chat template, the response as the assistant's turn, or, where the tokenizer
    has no template, given as a text pair (prompt, response). What reads like a special token in a message or
    a response is tokenized as ordinary text. Batches are padded on the right: encoders need it, and a causal
    model reads its reward at the last token that is no padding.

    A pair longer than ``max_tokens`` loses its oldest tokens where there is a chat template, so that the end
    of the response, where the reward is read, stays; of a text pair the longer part loses its end.
    """

    name: str
    model: Any
    tokenizer: Any
    max_tokens: int
    pad_token_id: int | None
    """``None`` if there is no safe padding token: each pair then goes alone."""

    def rewards(self, pairs: Sequence[Pair], *, token_budget: int) -> list[float]:
        """One logit per pair, in input order.

        Args:
            pairs: Messages of the prompt, and the response.
            token_budget: Most tokens, padding included, in one forward pass.

        Raises:
            BackboneError: The chat template refuses the messages, a pair has no tokens, or a logit is not
                finite.
        """
        encoded = [self._encode(messages, response) for messages, response in pairs]
        if not all(pair.ids for pair in encoded):
            raise BackboneError(f"reward model {self.name!r}: a prompt and its response are both empty")
        values = [0.0] * len(pairs)
        budget = 0 if self.pad_token_id is None else token_budget
        for rows in _batches([len(pair.ids) for pair in encoded], budget):
            for row, value in zip(rows, self._forward([encoded[row] for row in rows]), strict=True):
                values[row] = value
        return values

    def _encode(self, messages: Sequence[ChatMessage], response: str) -> _Encoded:
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{**message, "content": _unmarked(message_text(message))} for message in messages]
            return self._encode_chat([*turns, {"role": "assistant", "content": _unmarked(response)}])
        encoding = self.tokenizer(
            sanitize(prompt_text(messages)),
            sanitize(response),
            truncation="longest_first",
            max_length=self.max_tokens,
            split_special_tokens=True,
        )
        return _Encoded(list(encoding["input_ids"]), encoding.get("token_type_ids"))

    def _encode_chat(self, turns: Sequence[ChatMessage]) -> _Encoded:
        specials = sorted(control_texts(self.tokenizer), key=len, reverse=True)
        pattern = re.compile("|".join(re.escape(text) for text in specials) or r"(?!)")
        found: list[str] = []

        def mark(match: re.Match[str]) -> str:
            found.append(match[0])
            return _MARK.format(len(found) - 1)

        marked = [{**turn, "content": pattern.sub(mark, turn["content"])} for turn in turns]
        rendered = self._render(marked)
        ids: list[int] = []
        # Odd pieces are the numbers of marks. Without marks there is one piece: the rendered text as it is.
        for i, piece in enumerate(_MARKED.split(rendered)):
            if i % 2:
                ids += plain_ids(self.tokenizer, [found[int(piece)]])[0]
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        return _Encoded(ids[-self.max_tokens :])

    def _render(self, turns: Sequence[ChatMessage]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise BackboneError(
                f"the chat template of reward model {self.name!r} refuses these messages: {error}"
            ) from error

    def _forward(self, batch: Sequence[_Encoded]) -> list[float]:
        width = max(len(pair.ids) for pair in batch)
        inputs = {
            "input_ids": _padded([pair.ids for pair in batch], width, self.pad_token_id or 0),
            "attention_mask": _padded([[1] * len(pair.ids) for pair in batch], width, 0),
        }
        if all(pair.type_ids is not None for pair in batch):
            inputs["token_type_ids"] = _padded([pair.type_ids or [] for pair in batch], width, 0)
        with torch.inference_mode():
            logits_B1 = self.model(
                **{key: ids_BT.to(self.model.device) for key, ids_BT in inputs.items()}
            ).logits
        values: list[float] = logits_B1.float().reshape(len(batch)).tolist()
        if not torch.isfinite(logits_B1).all():
            raise BackboneError(f"reward model {self.name!r} gave a reward that is not finite")
        return values


def load_reward_model(name: str, *, max_tokens: int) -> RewardModel:
    """Load a reward model in float32, on a GPU if there is one.

    Args:
        name: Hub id or local folder. Code that a repository brings along is never run.
        max_tokens: Bound on the length of a pair; the model's own limit bounds it too.

    Raises:
        BackboneError: It cannot be loaded, has another number of labels than one, or has no trained head.
    """
    local = Path(name).is_dir()
    options = {"trust_remote_code": False, "local_files_only": local}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, LookupError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        where = "local folder" if local else "hub id (no local folder of that name)"
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"cannot load reward model {name!r}, {where}: {reason}") from error
    _check_head(name, model, loading)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = min(max_tokens, int(min(tokenizer.model_max_length, _position_limit(model))))
    return RewardModel(name, model.to(device).eval(), tokenizer, limit, _agree_on_padding(model, tokenizer))


def _check_head(name: str, model: Any, loading: dict[str, Any]) -> None:
    if model.config.num_labels != 1:
        raise BackboneError(
            f"{name!r} has {model.config.num_labels} labels; a reward model has exactly 1 label, "
            "whose logit is the reward; other heads are not supported"
        )
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise BackboneError(
            f"{name!r} is no trained reward model: its files lack {', '.join(missing[:3])}, "
            "which would be random numbers"
        )


def _position_limit(model: Any) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else sys.maxsize


def _agree_on_padding(model: Any, tokenizer: Any) -> int | None:
    """Give model and tokenizer the same padding token, if a safe one exists.

    A causal model reads its reward at the last token that is no padding. If padding were the end token, the
    end of the response would look like padding; so that is done only where the model's author says so.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        config.pad_token_id = tokenizer.pad_token_id
    pad_token_id = config.pad_token_id
    return pad_token_id if isinstance(pad_token_id, int) else None


def _unmarked(text: str) -> str:
    """``text`` as a tokenizer takes it, without what could pass for a mark."""
    return sanitize(text).replace("\ue000", "\ufffd").replace("\ue001", "\ufffd")


def _batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Rows in batches whose padded size stays within the budget; rows of like length go together."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[row] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(rows: Sequence[list[int]], width: int, fill: int) -> torch.Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)

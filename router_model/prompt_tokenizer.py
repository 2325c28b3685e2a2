"""PromptTokenizer: prompt texts to ids, in the frame and within the limit of one backbone."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

from router_model.errors import BackboneError
from router_model.tokenization import PromptEncoding, chat_frame, control_frame, encode_prompts

Frame = Literal["plain", "chat"]
"""What stands around a prompt: the tokenizer's control tokens, or its chat template up to the answer."""


class PromptTokenizer:
    """A backbone's tokenizer with all that turns a prompt into ids.

    Fast tokenizers keep per-call state (truncation, handling of control tokens), so two threads must not call
    one at once: each takes a ``clone``.

    Args:
        tokenizer: Of the backbone.
        frame: What stands around a prompt.
        max_tokens: Limit per prompt, with what stands around it.
        keep: Which end of a too long text stays.

    Raises:
        BackboneError: The limit leaves no room for a prompt.
    """

    def __init__(
        self, tokenizer: Any, *, frame: Frame, max_tokens: int, keep: Literal["start", "end"]
    ) -> None:
        self.frame: Frame = frame
        self.max_tokens = max_tokens
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self._tokenizer = tokenizer
        self._keep: Literal["start", "end"] = keep
        self._frame_ids = control_frame(tokenizer) if frame == "plain" else chat_frame(tokenizer)
        n_frame = sum(len(part) for part in self._frame_ids)
        if max_tokens <= n_frame:
            raise BackboneError(f"max_tokens is {max_tokens}, expected more than {n_frame} for this backbone")

    def encode(self, texts: Sequence[str]) -> list[PromptEncoding]:
        """Ids of prompts as ``tokenization.prompt_text`` renders them."""
        return encode_prompts(
            self._tokenizer,
            texts,
            max_tokens=self.max_tokens,
            keep=self._keep,
            frame=self._frame_ids,
        )

    def clone(self) -> "PromptTokenizer":
        """A copy that shares no state, for another thread."""
        return copy.deepcopy(self)

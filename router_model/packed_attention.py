"""Attention over prompts that stand one behind the other in one row, without padding.

Registered with transformers under a name of its own, so that the code of every model that takes its attention
from there works on packed rows: what acts on one token at a time (projections, norms, activations) does not
mind the company, and here each prompt attends to itself alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from router_model.errors import BackboneError

PACKED = "persyn_packed"
"""Name of this attention in ``config._attn_implementation``."""

_UNSUPPORTED = ("s_aux", "position_bias", "relative_position_bias")
"""Arguments of attention variants that are not computed here."""

# Measured on CPU, see docs/experiments.md: products and a softmax written out are faster than the fused
# kernel up to these lengths. Beyond, the scores of all heads would also take much memory.
_WRITTEN_OUT_TOKENS = {torch.float32: 192, torch.bfloat16: 1024}
_FUSED_TOKENS = {torch.bfloat16: 32}
"""And below these the fused kernel is faster again: there the number of operations counts."""


def packed_arguments(lengths: Sequence[int]) -> dict[str, Any]:
    """What a model's ``forward`` is to hand to the attention: where each prompt of the row ends.

    The names are those by which transformers passes packed rows to its flash attention.
    """
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001, part of the interface; a packed row has none
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of each prompt to itself.

    Args:
        module: The model's attention module.
        query: (1, heads, T, width of a head); ``key`` and ``value`` may have fewer heads.
        cu_seq_lens_q: Where the prompts end in the row, from 0.
        sliding_window: A token sees those nearer than this.
        softcap: Bound of the scores, by a tangens hyperbolicus.

    Returns:
        (1, T, heads, width of a head), and no weights.

    Raises:
        BackboneError: The model asks for an attention that is not computed here.
    """
    asked = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if asked:
        raise BackboneError(f"packed rows do not work with attention that takes {', '.join(asked)}")
    causal = bool(module.is_causal if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = torch.diff(cu_seq_lens_q).tolist()
    attended = [
        _attend(own[0], seen[0], told[0], scale, causal=causal, window=sliding_window, softcap=softcap)
        for own, seen, told in zip(
            *(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True
        )
    ]
    joined = torch.cat(attended, dim=1) if len(attended) > 1 else attended[0]
    return joined.transpose(0, 1)[None], None


AttentionInterface.register(PACKED, packed_attention)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One prompt, (heads, T, width); the way of computing is chosen by its length."""
    n_tokens = query.shape[1]
    groups = query.shape[0] // key.shape[0]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    # A window that holds the whole prompt cuts nothing off.
    masked = causal or (window is not None and window < n_tokens)
    if softcap is None and not _is_written_out(query):
        if window is None or window >= n_tokens:
            return scaled_dot_product_attention(
                query[None], key[None], value[None], scale=scale, is_causal=causal
            )[0]
        allowed = _visible(n_tokens, causal=causal, window=window, device=query.device)
        return scaled_dot_product_attention(
            query[None], key[None], value[None], scale=scale, attn_mask=allowed
        )[0]
    scores = torch.bmm(query * scale, key.transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if masked:
        allowed = _visible(n_tokens, causal=causal, window=window, device=query.device)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.bmm(scores.softmax(dim=-1), value)


def _is_written_out(query: Tensor) -> bool:
    n_tokens = query.shape[1]
    if query.device.type != "cpu":
        return False
    return _FUSED_TOKENS.get(query.dtype, 0) < n_tokens <= _WRITTEN_OUT_TOKENS.get(query.dtype, 0)


def _visible(n_tokens: int, *, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which tokens (columns) each token (row) sees."""
    place = torch.arange(n_tokens, device=device)
    ahead = place[None, :] - place[:, None]
    visible = ahead.abs() < (n_tokens if window is None else window)
    return visible & (ahead <= 0) if causal else visible

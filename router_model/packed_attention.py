"""Attention over prompts that stand one behind the other in one row, without padding.

Registered with transformers under a name of its own, so that the code of every model that takes its attention
from there works on packed rows: what acts on one token at a time (projections, norms, activations) does not
mind the company, and here each prompt attends to itself alone.

The functions on tensors are written in the part of Python that TorchScript understands, for ``traced_model``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from router_model.errors import BackboneError
from router_model.traced_model import is_tracing

PACKED = "persyn_packed"
"""Name of this attention in ``config._attn_implementation``."""

_UNSUPPORTED = ("s_aux", "position_bias", "relative_position_bias")
"""Arguments of attention variants that are not computed here."""

_HAS_AMX = bool(torch.cpu._is_amx_tile_supported())  # noqa: SLF001
_WRITTEN_OUT = {torch.float32: (0, 96), torch.bfloat16: (0, 0) if _HAS_AMX else (32, 1024)}
"""Measured on CPUs, see docs/experiments.md: products and a softmax written out are faster than the fused
kernel above the first and up to the second number of tokens, where the scores begin to take much memory."""
_FULL_VECTOR = 16
"""Numbers in one register. The fused kernel takes the exponentials of what is left over one by one, which
takes as long as all the rest; and it compiles itself anew for each length. So prompts are filled up with
masked tokens."""


def row_ends(lengths: Sequence[int]) -> Tensor:
    """Where the prompts of a row end, from 0, int64."""
    return torch.tensor([0, *lengths]).cumsum(0)


def packed_arguments(ends: Tensor, n_tokens: int) -> dict[str, Any]:
    """What a model's ``forward`` is to hand to the attention: where each prompt of the row ends.

    The names are those by which transformers passes packed rows to its flash attention.
    """
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": n_tokens,
        "max_length_k": n_tokens,
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
    on_cpu = query.device.type == "cpu"
    attend = _scripted() if is_tracing() else _attend_row
    attended = attend(
        query,
        key,
        value,
        cu_seq_lens_q,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        bool(module.is_causal if is_causal is None else is_causal),
        sliding_window or 0,
        softcap or 0.0,
        *(_WRITTEN_OUT.get(query.dtype, (0, 0)) if on_cpu else (0, 0)),
        _FULL_VECTOR if on_cpu else 1,
    )
    return attended, None


AttentionInterface.register(PACKED, packed_attention)


@functools.cache
def _scripted() -> Callable[..., Tensor]:
    """The same as one operation of a trace, whose loop over the prompts is not unrolled."""
    return torch.jit.script(_attend_row)


def _attend_row(  # noqa: PLR0917, TorchScript
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    fused_up_to: int,
    written_out_up_to: int,
    vector: int,
) -> Tensor:
    """All prompts of a row. A window or softcap of 0 is none."""
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    places: list[int] = ends.tolist()
    attended: list[Tensor] = []
    for start, end in zip(places[:-1], places[1:]):  # noqa: B905, RUF007, TorchScript
        n_tokens = end - start
        filler = [0, 0, 0, (vector - n_tokens % vector) % vector]
        own, seen = pad(query[:, :, start:end], filler), pad(key[:, :, start:end], filler)
        told = pad(value[:, :, start:end], filler)
        # A window that holds the whole prompt cuts nothing off.
        own_window = window if window < n_tokens else 0
        if softcap > 0.0 or (fused_up_to < n_tokens <= written_out_up_to):
            mask = _mask(own, n_tokens, causal, own_window)
            states = _written_out(own, seen, told, mask, scale, softcap)
        else:
            # A causal kernel needs no mask: what follows the last token is never seen.
            by_kernel = causal and own_window == 0
            mask = None if by_kernel else _mask(own, n_tokens, causal, own_window)
            states = scaled_dot_product_attention(
                own, seen, told, attn_mask=mask, is_causal=by_kernel, scale=scale
            )
        attended.append(states[:, :, :n_tokens])
    return torch.cat(attended, dim=2).transpose(1, 2)


def _written_out(  # noqa: PLR0917, TorchScript
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """One prompt, (1, heads, T, width), by products and a softmax."""
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(dim=-1), value)


def _mask(
    query: Tensor,
    n_tokens: int,
    causal: bool,
    window: int,
) -> Tensor | None:
    """What is added to the scores of a prompt that is filled up to the length of ``query``."""
    n_all = query.size(2)
    if causal or window > 0:
        place = torch.arange(n_all, device=query.device)
        ahead = place[None, :] - place[:, None]
        visible = ahead.abs() < (window if window > 0 else n_all)
        if causal:
            visible = visible & (ahead <= 0)
        # Fillers see each other: a row of nothing but minus infinity would be NaN.
        visible[:n_tokens, n_tokens:] = False
        hidden = torch.zeros([n_all, n_all], dtype=query.dtype, device=query.device)
        return hidden.masked_fill(~visible, float("-inf"))
    if n_all > n_tokens:
        mask = torch.zeros([1, 1, 1, n_all], dtype=query.dtype, device=query.device)
        mask[:, :, :, n_tokens:] = float("-inf")
        return mask
    return None

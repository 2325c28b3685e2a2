"""Views: which hidden states of a backbone are its features of a prompt.

A view is a layer and a pooling, written ``last@22`` or ``mean@6``. Middle layers of a language model often
say more of a prompt than the last one, which is bent towards the next token, so training looks at several.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

from router_model.errors import BackboneError

Pooling = Literal["mean", "last"]

# Shares of the depth. Encoders are read up to their last layer; decoders around two thirds, where the probes
# in docs/experiments.md found most.
_ENCODER_DEPTHS = (1.0, 0.83, 0.67, 0.5)
_DECODER_DEPTHS = (0.53, 0.6, 0.67, 0.73, 0.8, 0.87)

_FORM = re.compile(r"(mean|last)@(\d{1,4})")


@dataclass(frozen=True, slots=True)
class View:
    """Hidden states after ``layer`` layers (0 is the embedding), pooled over the tokens of a prompt.

    ``mean`` averages over the tokens and scales the result to length 1, as sentence-transformers does.
    ``last`` takes the last token, which in a decoder has seen all the others.
    """

    pooling: Pooling
    layer: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``POOLING@LAYER``.

        Raises:
            BackboneError: It is not of that form.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise BackboneError(f"unknown view {text!r}: expected mean@LAYER or last@LAYER, such as last@22")
        return cls(cast("Pooling", match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.pooling}@{self.layer}"


def candidate_views(n_layers: int, *, is_encoder: bool) -> tuple[View, ...]:
    """The views that training uses where none are named, deepest first for encoders."""
    depths = _ENCODER_DEPTHS if is_encoder else _DECODER_DEPTHS
    layers = dict.fromkeys(max(1, round(depth * n_layers)) for depth in depths)
    return tuple(View("mean" if is_encoder else "last", layer) for layer in layers)


def parse_views(texts: Sequence[str], *, n_layers: int) -> tuple[View, ...]:
    """Views by their names, each once, in the order given.

    Raises:
        BackboneError: A view is malformed, or the backbone has fewer layers.
    """
    views = tuple(dict.fromkeys(View.parse(text) for text in texts))
    if not views:
        raise BackboneError("no view is named: expected at least one, such as last@22")
    deep = [view for view in views if view.layer > n_layers]
    if deep:
        raise BackboneError(f"view {str(deep[0])!r}: the backbone has {n_layers} layers only")
    return views

"""Features of prompts from their hidden states."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from router_model.views import View

Features = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""(B, D), one view after the other."""


def pool(hidden: Sequence[Tensor], view: View) -> Tensor:
    """Features of each prompt, float32 (B, D), from its hidden states (T, D)."""
    if view.pooling == "last":
        return torch.stack([states[-1] for states in hidden]).float().cpu()
    # Sums of many bfloat16 numbers are taken in float32.
    means = torch.stack([states.mean(dim=0, dtype=torch.float32) for states in hidden])
    return normalize(means, dim=1).cpu()

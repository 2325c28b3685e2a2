"""A small multilayer perceptron, trained on the squared error of present cells."""

import numpy as np
import torch
from numpy.typing import NDArray

from router_model.heads import MLPHead, Projection
from router_model.linear_fit import column_means

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

N_HIDDEN = 64
N_STEPS = 200
LEARNING_RATE = 1e-2


def train_mlp(
    projection: Projection,
    points_NK: FloatArray,
    targets_NM: FloatArray,
    mask_NM: BoolArray,
    *,
    weight_decay: float,
    seed: int = 0,
) -> MLPHead:
    """Train on all prompts at once: AdamW with a cosine schedule. The same seed gives the same network.

    The output starts at the teachers' means and the weights decay towards them.
    """
    generator = torch.Generator().manual_seed(seed)
    n_axes, n_teachers = points_NK.shape[1], targets_NM.shape[1]
    points, mask = torch.from_numpy(points_NK).float(), torch.from_numpy(mask_NM)
    targets = torch.from_numpy(np.where(mask_NM, targets_NM, 0.0)).float()
    weight_in = (
        torch.randn(n_axes, N_HIDDEN, generator=generator)
        / max(float(np.sqrt((points_NK**2).mean())), 1e-6)
        / n_axes**0.5
    )
    bias_in, weight_out = torch.zeros(N_HIDDEN), torch.zeros(N_HIDDEN, n_teachers)
    bias_out = torch.from_numpy(column_means(targets_NM, mask_NM)).float()
    decaying, free = [weight_in, weight_out], [bias_in, bias_out]
    for parameter in (*decaying, *free):
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, N_STEPS)
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        predicted = torch.relu(points @ weight_in + bias_in) @ weight_out + bias_out
        loss = torch.where(mask, predicted - targets, 0.0).square().sum() / mask.sum()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return MLPHead(projection, _array(weight_in), _array(bias_in), _array(weight_out), _array(bias_out))


def _array(tensor: torch.Tensor) -> FloatArray:
    return np.asarray(tensor.detach().double().numpy())

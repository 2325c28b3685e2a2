"""Fine-tuning: a backbone and a linear head on top of it, trained end to end on the rewards of all teachers.

A prompt is encoded once for all its teachers, and the loss is one of ``objectives.OBJECTIVES``. An epoch is
as good as the regret of its choices on prompts held out: a unit that all objectives share.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel

from router_model.batches import length_batches
from router_model.errors import BackboneError, RouterError
from router_model.linear_fit import column_means
from router_model.objectives import objective
from router_model.pretrained import is_encoder, load_pretrained, load_tokenizer, locate_model, max_positions
from router_model.recipe import FineTuneRecipe
from router_model.reward import all_equal, regret
from router_model.tokenization import encode_prompts
from router_model.views import Pooling

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Progress = Callable[[int, int], None]
"""Called after each step with the prompts trained on, and how many they can become; early stopping ends
before that."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training prompts."""

    number: int
    """From 1."""
    train_loss: float
    """Mean of the objective over the training prompts, each as it was when its batch was trained on."""
    held_out_regret: float
    """Mean reward that the choices on the held-out prompts lose against the best teachers."""


@dataclass(frozen=True, slots=True, eq=False)
class FineTuned:
    """The best epoch of a fine-tuning run."""

    state: dict[str, Tensor]
    """Weights of the backbone by name, float32 on the CPU: what ``AutoModel`` reads from a
    ``model.safetensors`` beside the config and the tokenizer of the backbone it started from."""
    weight_DM: FloatArray
    """Of the linear head, on the pooled features of ``Backbone``; centred over the teachers."""
    bias_M: FloatArray
    pooling: Pooling
    max_tokens: int
    """Limit per prompt that it was trained with: the recipe's, or what the model has positions for."""
    history: tuple[Epoch, ...]
    best_epoch: int
    """Number of the epoch with the lowest held-out regret; the first of equals."""
    best_single_regret: float
    """Held-out regret of always choosing the teacher with the highest mean reward in training."""
    held_out: NDArray[np.int64]
    """Which of the texts were held out, ascending."""


def fine_tune(
    backbone_name: str,
    texts: Sequence[str],
    rewards_NM: FloatArray,
    mask_NM: BoolArray,
    recipe: FineTuneRecipe,
    *,
    seed: int,
    progress: Progress | None = None,
    device: str = "auto",
) -> FineTuned:
    """Train a backbone with a linear head, and keep the epoch with the lowest held-out regret.

    Prompts with fewer than two present teachers have nothing to compare, and are neither trained on nor held
    out. On one machine the same seed gives the same weights; on a GPU up to what its kernels sum in no fixed
    order.

    Args:
        backbone_name: Hub id, local folder, or ``.gguf`` file.
        texts: Prompts, as ``prompt_text`` renders them.
        rewards_NM: Reward of each teacher's response; masked cells may hold anything.
        mask_NM: Which cells are present.
        recipe: How to train.
        seed: Decides what is held out, the head's first weights, the order of the prompts and dropout.
        progress: See ``Progress``.
        device: A torch device, or ``auto`` for the GPU if there is one.

    Raises:
        RouterError: The table is malformed or has too few prompts, or training diverged; the message says at
            which step.
        BackboneError: The backbone cannot be loaded or trained.
    """
    rows = _comparable_rows(texts, rewards_NM, mask_NM)
    train, held_out = _split(rows, recipe.held_out_share, seed)
    target = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device == "auto"
        else (torch.device(device))
    )
    with _seeded(seed, target):
        network, tokenizer = _load(backbone_name, rewards_NM.shape[1], recipe)
        max_tokens = min(recipe.max_tokens, max_positions(network.body) or recipe.max_tokens)
        keep: Literal["start", "end"] = "start" if is_encoder(network.body.config) else "end"
        prompts = encode_prompts(tokenizer, texts, max_tokens=max_tokens, keep=keep)
        data = _Data([prompt.ids for prompt in prompts], rewards_NM, mask_NM, tokenizer.pad_token_id or 0)
        run = _Run(network.to(target), data, recipe, target)
        history, state = run.fit(train, held_out, seed=seed, progress=progress)
    best = min(history, key=lambda epoch: epoch.held_out_regret)
    weight_DM = state.pop("head.weight").T.double().numpy()
    bias_M = state.pop("head.bias").double().numpy()
    means_M = column_means(rewards_NM[train], mask_NM[train])
    single_N = regret(np.tile(means_M, (len(held_out), 1)), rewards_NM[held_out], mask_NM[held_out])
    return FineTuned(
        state={name.removeprefix("body."): tensor for name, tensor in state.items()},
        # Only differences of strengths matter, to every objective.
        weight_DM=weight_DM - weight_DM.mean(axis=1, keepdims=True),
        bias_M=bias_M - bias_M.mean(),
        pooling=network.pooling,
        max_tokens=max_tokens,
        history=history,
        best_epoch=best.number,
        best_single_regret=float(single_N.mean()),
        held_out=held_out,
    )


class _Network(nn.Module):
    """Token ids to strengths: the body, pooled as ``Backbone`` pools it, and a linear head in float32."""

    def __init__(self, body: Any, pooling: Pooling, n_teachers: int) -> None:
        super().__init__()
        self.body = body
        self.pooling: Pooling = pooling
        # Torch's own first weights, uniform within 1/sqrt(width), and no bias: as P2L begins.
        self.head = nn.Linear(int(body.config.get_text_config().hidden_size), n_teachers)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor, precision: Any) -> Tensor:
        """Strengths of a batch padded on the right, BM."""
        mask_BT = (torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]).long()
        with precision:
            hidden_BTD = self.body(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        hidden_BTD = hidden_BTD.float()
        if self.pooling == "last":
            pooled_BD = hidden_BTD[torch.arange(len(ids_BT), device=ids_BT.device), lengths_B - 1]
        else:
            sums_BD = (hidden_BTD * mask_BT[..., None]).sum(dim=1)
            pooled_BD = nn.functional.normalize(sums_BD / lengths_B[:, None], dim=1)
        return cast("Tensor", self.head(pooled_BD))


@dataclass(frozen=True, slots=True, eq=False)
class _Data:
    """Token ids, rewards and mask of all prompts."""

    ids_N: list[list[int]]
    rewards_NM: FloatArray
    mask_NM: BoolArray
    pad_id: int

    def passes(self, rows: NDArray[np.int64], token_budget: int) -> Iterator[NDArray[np.int64]]:
        """The rows in groups of similar length, each within the budget of padded tokens."""
        for group in length_batches([len(self.ids_N[row]) for row in rows], token_budget=token_budget):
            yield rows[group]

    def padded(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Ids of the rows, padded on the right, and their lengths."""
        # As in Backbone: an empty prompt of a tokenizer without control tokens is one token of padding.
        ids = [torch.tensor(self.ids_N[row] or [self.pad_id]) for row in rows]
        ids_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        return ids_BT, torch.tensor([len(row) for row in ids])


class _Run:
    """One fine-tuning run: the network, its optimizer, and how far it has come."""

    def __init__(self, network: _Network, data: _Data, recipe: FineTuneRecipe, device: torch.device) -> None:
        self._network = network
        self._data = data
        self._recipe = recipe
        self._device = device
        self._objective = objective(recipe.objective)
        self._optimizer = _optimizer(network, recipe)
        self._step = 0

    def fit(
        self,
        train: NDArray[np.int64],
        held_out: NDArray[np.int64],
        *,
        seed: int,
        progress: Progress | None,
    ) -> tuple[tuple[Epoch, ...], dict[str, Tensor]]:
        """All epochs until the patience is at its end, and the weights of the best one, on the CPU."""
        recipe, rng = self._recipe, np.random.default_rng(seed)
        batches_per_epoch = -(-len(train) // recipe.batch_prompts)
        history: list[Epoch] = []
        best, state = 0, dict[str, Tensor]()
        for number in range(1, recipe.epochs + 1):
            order, total = rng.permutation(train), 0.0
            for start in range(0, len(order), recipe.batch_prompts):
                batch = order[start : start + recipe.batch_prompts]
                self._set_rate(recipe.epochs * batches_per_epoch)
                total += self._train_step(batch, number) * len(batch)
                if progress is not None:
                    progress((number - 1) * len(train) + start + len(batch), recipe.epochs * len(train))
            history.append(Epoch(number, total / len(train), self._held_out_regret(held_out)))
            _logger.info("epoch_trained %s", history[-1])
            if not state or history[-1].held_out_regret < history[best].held_out_regret:
                best = number - 1
                state = {name: _kept(tensor) for name, tensor in self._network.state_dict().items()}
            elif number - 1 - best >= recipe.patience:
                break
        return tuple(history), state

    def _set_rate(self, n_steps: int) -> None:
        factor = self._recipe.rate_factor(self._step, n_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_rate"] * factor

    def _train_step(self, batch: NDArray[np.int64], epoch: int) -> float:
        """One step of the optimizer; the batch's mean loss before it."""
        self._step += 1
        self._network.train()
        self._optimizer.zero_grad()
        total = 0.0
        for rows in self._data.passes(batch, self._recipe.tokens_per_pass):
            rewards_BM = torch.from_numpy(self._data.rewards_NM[rows]).to(self._device, torch.float32)
            mask_BM = torch.from_numpy(self._data.mask_NM[rows]).to(self._device)
            loss = self._objective(self._strengths(rows), rewards_BM, mask_BM, self._recipe.temperature)
            # Weighted by its prompts, so that how a batch is cut into passes does not change its gradient.
            loss = loss * (len(rows) / len(batch))
            torch.autograd.backward(loss)
            total += float(loss.detach())
        self._require_finite(total, "loss", epoch)
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), self._recipe.clip_norm)
        self._require_finite(float(norm), "norm of its gradient", epoch)
        cast("Callable[[], object]", self._optimizer.step)()
        return total

    def _require_finite(self, value: float, name: str, epoch: int) -> None:
        if not np.isfinite(value):
            raise RouterError(
                f"training diverged: the {name} is {value} at step {self._step}, in epoch {epoch}, with "
                f"objective {self._recipe.objective!r}; lower learning_rate, or set bf16 to false"
            )

    def _held_out_regret(self, held_out: NDArray[np.int64]) -> float:
        self._network.eval()
        total = 0.0
        for rows in self._data.passes(held_out, self._recipe.tokens_per_pass):
            with torch.inference_mode():
                strengths_BM = self._strengths(rows).double().cpu().numpy()
            if not np.isfinite(strengths_BM).all():
                raise RouterError(
                    f"training diverged: the strengths after step {self._step} hold NaN or infinity; lower "
                    "learning_rate, or set bf16 to false"
                )
            total += float(regret(strengths_BM, self._data.rewards_NM[rows], self._data.mask_NM[rows]).sum())
        return total / len(held_out)

    def _strengths(self, rows: NDArray[np.int64]) -> Tensor:
        ids_BT, lengths_B = self._data.padded(rows)
        on = self._recipe.bf16 and self._device.type == "cuda"
        precision = torch.autocast(self._device.type, torch.bfloat16) if on else contextlib.nullcontext()
        return cast("Tensor", self._network(ids_BT.to(self._device), lengths_B.to(self._device), precision))


def _comparable_rows(texts: Sequence[str], rewards_NM: FloatArray, mask_NM: BoolArray) -> NDArray[np.int64]:
    """Prompts with at least two present teachers."""
    if rewards_NM.ndim != 2 or rewards_NM.shape != mask_NM.shape or len(rewards_NM) != len(texts):
        raise RouterError(
            f"{len(texts)} texts with rewards of shape {rewards_NM.shape} and a mask of {mask_NM.shape}: "
            "expected a row per text and the same columns"
        )
    if not np.isfinite(rewards_NM[mask_NM]).all():
        raise RouterError("a present cell of the rewards holds NaN or infinity: mask it, or score it again")
    rows: NDArray[np.int64] = np.flatnonzero(mask_NM.sum(axis=1) >= 2).astype(np.int64)
    if len(rows) < 2:
        raise RouterError(
            f"{len(rows)} of {len(texts)} prompts have two teachers to compare: expected at least 2, one to "
            "train on and one to hold out"
        )
    if all_equal(np.where(mask_NM, rewards_NM, np.nan)):
        raise RouterError(
            "no prompt has two teachers of different reward: there is nothing to learn. Score quality on a "
            "finer scale, or train without a recipe, which falls back to the best single teacher"
        )
    return rows


def _split(rows: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and held-out prompts, at least one each."""
    order = np.random.default_rng(seed).permutation(rows)
    n_held_out = min(max(round(share * len(rows)), 1), len(rows) - 1)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators start from the seed, and are afterwards what they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _load(backbone_name: str, n_teachers: int, recipe: FineTuneRecipe) -> tuple[_Network, Any]:
    """The network with gradients on, and the tokenizer."""
    source = locate_model(backbone_name)
    body = load_pretrained(AutoModel, source)
    if getattr(body.config, "is_encoder_decoder", False):
        raise BackboneError(f"{backbone_name!r} is an encoder-decoder, expected an encoder or a decoder")
    body.requires_grad_(requires_grad=True)
    # Keys and values of a prompt are never read again.
    body.config.get_text_config().use_cache = False
    if recipe.gradient_checkpointing:
        if not body.supports_gradient_checkpointing:
            raise BackboneError(f"{backbone_name!r} has no gradient checkpointing: set it to false")
        # Its name before transformers 5.23 was the second one.
        enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    pooling: Pooling = recipe.pooling or ("mean" if is_encoder(body.config) else "last")
    return _Network(body, pooling, n_teachers), load_tokenizer(source)


def _optimizer(network: _Network, recipe: FineTuneRecipe) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices alone, which biases and norms are not."""
    body = list(network.body.parameters())
    head_rate = recipe.head_learning_rate or recipe.learning_rate
    groups = [
        ([weight for weight in body if weight.ndim >= 2], recipe.learning_rate, recipe.weight_decay),
        ([weight for weight in body if weight.ndim < 2], recipe.learning_rate, 0.0),
        ([network.head.weight], head_rate, recipe.weight_decay),
        ([network.head.bias], head_rate, 0.0),
    ]
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": rate, "full_rate": rate, "weight_decay": decay}
            for weights, rate, decay in groups
            if weights
        ],
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
    )


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later steps do not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()

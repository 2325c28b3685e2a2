"""Fine-tuning learns what frozen features do not hold, keeps its best epoch, and says where it diverged."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model

from router_model import fine_tuning
from router_model.backbone import Backbone, Encoded, load_backbone
from router_model.errors import BackboneError, RouterError
from router_model.fine_tuning import Epoch, FineTuned, fine_tune
from router_model.linear_fit import decompose, solve_ridge
from router_model.objectives import OBJECTIVES
from router_model.recipe import FineTuneRecipe
from router_model.reward import regret
from router_model.tokenization import encode_prompts

FILLER = ("please", "tell", "me", "about", "history", "of", "music", "and", "art", "now")

N_LAYERS = 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much where the cores are shared."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def save_with_tokenizer(model: Any, folder: Path, tokenizer_from: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from, local_files_only=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """A random two-layer encoder with MiniLM's tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return save_with_tokenizer(BertModel(config), tmp_path_factory.mktemp("bert"), minilm_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """A random two-layer decoder with MiniLM's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return save_with_tokenizer(LlamaModel(config), tmp_path_factory.mktemp("llama"), minilm_path)


def recipe(**changes: Any) -> FineTuneRecipe:
    settings = {"backbone": "tiny", "learning_rate": 2e-3, "epochs": 2, "batch_prompts": 16, "max_tokens": 32}
    return FineTuneRecipe.model_validate({**settings, **changes})


def two_words(n_prompts: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Two words among filler: the first teacher is best if they belong together, the second if not.

    No sum of what the words say tells which: a linear head on frozen features is left with chance.
    """
    rng = np.random.default_rng(seed)
    texts, rewards = [], []
    for _ in range(n_prompts):
        left, right = rng.integers(2), rng.integers(2)
        filler = rng.choice(FILLER, size=4).tolist()
        texts.append(" ".join([("cat", "dog")[left], *filler, ("sun", "moon")[right]]))
        rewards.append([1.0, 0.0, 0.4] if left == right else [0.0, 1.0, 0.4])
    return texts, np.array(rewards), np.ones((n_prompts, 3), dtype=np.bool_)


def one_word(n_prompts: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """One word says which of two teachers is best; the table has gaps, and NaN in them."""
    rng = np.random.default_rng(3)
    is_cat = rng.random(n_prompts) < 0.5
    texts = [f"{'cat' if cat else 'dog'} {' '.join(rng.choice(FILLER, size=3))}" for cat in is_cat]
    mask = np.ones((n_prompts, 3), dtype=np.bool_)
    mask[np.arange(n_prompts), rng.integers(0, 4, n_prompts) % 3] = rng.random(n_prompts) < 0.5
    rewards = np.where(is_cat[:, None], [1.0, 0.0, 0.4], [0.0, 1.0, 0.4])
    return texts, np.where(mask, rewards, np.nan), mask


def save_tuned(tuned: FineTuned, backbone: Path, folder: Path) -> Path:
    shutil.copytree(backbone, folder)
    save_file(tuned.state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_trained(folder: Path, max_tokens: int, pooling: str) -> Backbone:
    """The backbone as fine-tuning sees it: its last layer, around the bare text."""
    return load_backbone(str(folder), max_tokens=max_tokens, views=[f"{pooling}@{N_LAYERS}"], frame="plain")


def strengths(tuned: FineTuned, encoded: Encoded) -> np.ndarray:
    return np.asarray(encoded.features_BD @ tuned.weight_DM + tuned.bias_M)


def test_it_learns_what_frozen_features_do_not_hold(bert: Path, tmp_path: Path) -> None:
    """Near-zero regret on new prompts, after a reload by AutoModel, where ridge stays at chance."""
    texts, rewards, mask = two_words(400)
    new_texts, new_rewards, new_mask = two_words(100, seed=1)
    tuned = fine_tune(
        str(bert), texts, rewards, mask, recipe(epochs=12, patience=12, objective="soft_bt"), seed=0
    )
    assert tuned.history[0].train_loss > tuned.history[-1].train_loss + 0.05
    assert tuned.history[tuned.best_epoch - 1].held_out_regret < 0.02
    assert tuned.best_single_regret > 0.3

    reloaded = as_trained(save_tuned(tuned, bert, tmp_path / "tuned"), tuned.max_tokens, tuned.pooling)
    learnt = strengths(tuned, reloaded.encode(new_texts))
    assert regret(learnt, new_rewards, new_mask).mean() < 0.05
    np.testing.assert_allclose(learnt.sum(axis=1), 0, atol=1e-5)

    frozen = load_backbone(str(bert), max_tokens=32)
    features = frozen.encode(texts).features_BD
    ridge = solve_ridge(decompose(features), rewards, mask, 1.0)(frozen.encode(new_texts).features_BD)
    assert regret(ridge, new_rewards, new_mask).mean() > 0.2


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_objective_trains_either_family_on_a_table_with_gaps(
    name: str, family: str, request: pytest.FixtureRequest
) -> None:
    """The loss falls, and the held-out choices end better than the best single teacher."""
    texts, rewards, mask = one_word(160)
    tuned = fine_tune(
        str(request.getfixturevalue(family)),
        texts,
        rewards,
        mask,
        recipe(objective=name, temperature=0.5, epochs=4, patience=4),
        seed=1,
    )
    assert tuned.pooling == {"bert": "mean", "llama": "last"}[family]
    assert tuned.history[-1].train_loss < tuned.history[0].train_loss
    assert tuned.history[tuned.best_epoch - 1].held_out_regret < tuned.best_single_regret / 2


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_network_trains_on_the_features_of_the_backbone(
    family: str, pooling: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Strengths in training are the head on ``Backbone``'s features; a reloaded run chooses as it did."""
    folder = request.getfixturevalue(family)
    texts, rewards, mask = one_word(60)
    texts = [f"{text} {'more ' * (index % 40)}" for index, text in enumerate(texts)]
    settings = recipe(pooling=pooling, held_out_share=0.5, epochs=3)
    assert_trains_on_features(folder, texts, settings)
    tuned = fine_tune(str(folder), texts, rewards, mask, settings, seed=5)
    backbone = as_trained(save_tuned(tuned, folder, tmp_path / "tuned"), tuned.max_tokens, pooling)
    rows = tuned.held_out
    found = strengths(tuned, backbone.encode([texts[row] for row in rows]))
    expected = tuned.history[tuned.best_epoch - 1].held_out_regret
    assert regret(found, rewards[rows], mask[rows]).mean() == pytest.approx(expected, abs=1e-12)


def assert_trains_on_features(folder: Path, texts: list[str], settings: FineTuneRecipe) -> None:
    """The untrained network, in one padded batch, against the features of the frozen backbone."""
    network, tokenizer = fine_tuning._load(str(folder), 3, settings)
    keep = "start" if network.body.config.model_type == "bert" else "end"
    prompts = encode_prompts(tokenizer, texts, max_tokens=settings.max_tokens, keep=keep)
    empty = np.zeros((len(texts), 3))
    data = fine_tuning._Data([prompt.ids for prompt in prompts], empty, empty > 0, tokenizer.pad_token_id)
    run = fine_tuning._Run(network.eval(), data, settings, torch.device("cpu"))
    found = run._strengths(np.arange(len(texts))).detach().numpy()
    frozen = as_trained(folder, settings.max_tokens, network.pooling)
    features = torch.from_numpy(frozen.encode(texts).features_BD)
    np.testing.assert_allclose(found, network.head(features).detach().numpy(), atol=1e-5)


def test_weight_decay_is_for_matrices_and_the_head_has_its_own_rate(bert: Path) -> None:
    """Biases and norms are not decayed, and every weight is in one group."""
    network, _ = fine_tuning._load(str(bert), 3, recipe())
    settings = recipe(weight_decay=0.1, head_learning_rate=0.5)
    groups = fine_tuning._optimizer(network, settings).param_groups
    for group in groups:
        assert {weight.ndim >= 2 for weight in group["params"]} == {group["weight_decay"] > 0}
    rates = {id(weight): group["full_rate"] for group in groups for weight in group["params"]}
    head = {id(weight) for weight in network.head.parameters()}
    assert {rates[key] for key in head} == {0.5}
    assert {rate for key, rate in rates.items() if key not in head} == {2e-3}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_the_same_seed_gives_the_same_weights(bert: Path) -> None:
    """Whatever torch drew before; another seed gives others, and torch's own generator is left alone."""
    texts, rewards, mask = one_word(60)
    runs = []
    for torch_seed, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(torch_seed)
        expected = torch.Generator().manual_seed(torch_seed)
        runs.append(fine_tune(str(bert), texts, rewards, mask, recipe(), seed=seed))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    same, other = runs[1], runs[2]
    for name, tensor in runs[0].state.items():
        assert torch.equal(tensor, same.state[name])
    np.testing.assert_array_equal(runs[0].weight_DM, same.weight_DM)
    np.testing.assert_array_equal(runs[0].held_out, same.held_out)
    assert runs[0].history == same.history
    assert not np.array_equal(same.held_out, other.held_out)
    assert not np.array_equal(same.weight_DM, other.weight_DM)


def test_training_stops_early_and_returns_the_best_epoch(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of the epoch with the lowest held-out regret, not those of the last."""
    texts, rewards, mask = one_word(60)
    regrets = iter([0.5, 0.2, 0.3, 0.2, 0.0])
    monkeypatch.setattr(fine_tuning._Run, "_held_out_regret", lambda *_: next(regrets))
    settings = {"schedule": "constant", "warmup_share": 0.0}
    stopped = fine_tune(str(bert), texts, rewards, mask, recipe(epochs=9, patience=2, **settings), seed=0)
    assert (stopped.best_epoch, [epoch.number for epoch in stopped.history]) == (2, [1, 2, 3, 4])
    regrets = iter([0.5, 0.2])
    two = fine_tune(str(bert), texts, rewards, mask, recipe(epochs=2, **settings), seed=0)
    for name, tensor in two.state.items():
        assert torch.equal(tensor, stopped.state[name])
    np.testing.assert_array_equal(two.weight_DM, stopped.weight_DM)


def test_how_a_batch_is_cut_into_passes_changes_nothing(llama: Path) -> None:
    """Gradient accumulation gives the whole batch's step; so does gradient checkpointing."""
    texts, rewards, mask = one_word(60)
    texts = [f"{text} {'more ' * (index % 7)}" for index, text in enumerate(texts)]
    whole, cut, checkpointed = (
        fine_tune(str(llama), texts, rewards, mask, recipe(epochs=1, **changes), seed=0)
        for changes in ({}, {"tokens_per_pass": 40}, {"gradient_checkpointing": True})
    )
    for run in (cut, checkpointed):
        assert run.history[0].train_loss == pytest.approx(whole.history[0].train_loss, rel=1e-4)
        np.testing.assert_allclose(run.weight_DM, whole.weight_DM, atol=1e-3)


def test_prompts_with_nothing_to_compare_are_left_out(bert: Path) -> None:
    """They change no weight, and none of them is held out."""
    texts, rewards, mask = one_word(60)
    mask[:20] = False
    mask[:10, 1] = True
    rewards = np.where(mask, np.nan_to_num(rewards), np.nan)
    tuned = fine_tune(str(bert), texts, rewards, mask, recipe(epochs=1), seed=0)
    n_usable = int((mask.sum(axis=1) >= 2).sum())
    assert (mask[tuned.held_out].sum(axis=1) >= 2).all()
    assert len(tuned.held_out) == round(0.1 * n_usable)


def test_progress_counts_prompts(bert: Path) -> None:
    """After each step, up to all epochs of all prompts that are trained on."""
    texts, rewards, mask = two_words(40)
    calls: list[tuple[int, int]] = []
    fine_tune(
        str(bert), texts, rewards, mask, recipe(), seed=0, progress=lambda *counts: calls.append(counts)
    )
    assert calls[-1] == (72, 72)
    assert all(before < after for (before, _), (after, _) in pairwise(calls))
    assert len(calls) == 2 * 3


def test_each_step_has_its_rate_and_a_clipped_gradient(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule spans all epochs, the head keeps its share, no gradient is longer than allowed."""
    texts, rewards, mask = two_words(40)
    settings = recipe(
        schedule="cosine", warmup_share=0.4, head_learning_rate=0.01, clip_norm=1e-3, objective="bt"
    )
    optimizers: list[torch.optim.Optimizer] = []
    make = fine_tuning._optimizer

    def kept(*arguments: Any) -> torch.optim.Optimizer:
        optimizers.append(make(*arguments))
        return optimizers[0]

    rates: list[tuple[float, float]] = []
    norms: list[float] = []

    def look(*_: int) -> None:
        groups = optimizers[0].param_groups
        rates.append((groups[0]["lr"], groups[-1]["lr"]))
        gradients = [weight.grad for group in groups for weight in group["params"] if weight.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(fine_tuning, "_optimizer", kept)
    fine_tune(str(bert), texts, rewards, mask, settings, seed=0, progress=look)
    factors = [settings.rate_factor(step, 6) for step in range(6)]
    assert factors[0] < 1 > factors[-1]
    np.testing.assert_allclose(rates, [(2e-3 * factor, 0.01 * factor) for factor in factors])
    np.testing.assert_allclose(norms, 1e-3, rtol=1e-3)


def test_a_diverged_run_says_at_which_step(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not a number ends the run with a sentence, before it reaches the weights."""
    texts, rewards, mask = two_words(80)
    losses = iter([1.0] * 6 + [np.nan])

    def poisoned(strengths_BM: torch.Tensor, *_: Any) -> torch.Tensor:
        return strengths_BM.sum() * next(losses)

    monkeypatch.setattr(fine_tuning, "objective", lambda _: poisoned)
    with pytest.raises(RouterError, match=r"loss is nan at step 7, in epoch 2.*learning_rate"):
        fine_tune(str(bert), texts, rewards, mask, recipe(), seed=0)


def test_a_gradient_that_is_not_finite_is_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would turn all weights into NaN under a loss that still is a number."""
    texts, rewards, mask = two_words(40)
    monkeypatch.setattr(fine_tuning, "objective", lambda _: lambda s, *_: ((s * 0) ** 0.5).sum())
    with pytest.raises(RouterError, match=r"gradient is nan at step 1, in epoch 1"):
        fine_tune(str(bert), texts, rewards, mask, recipe(), seed=0)


def test_strengths_that_are_not_finite_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held-out regret of NaN strengths would look like a choice."""
    texts, rewards, mask = two_words(40)
    monkeypatch.setattr(
        fine_tuning._Network,
        "forward",
        lambda self, ids, *_: self.head.bias.expand(len(ids), 3) * (1.0 if self.training else np.nan),
    )
    with pytest.raises(RouterError, match=r"strengths after step 3 hold NaN"):
        fine_tune(str(bert), texts, rewards, mask, recipe(), seed=0)


def test_a_malformed_table_is_refused(bert: Path) -> None:
    """Shapes that do not fit, NaN in a present cell, too few prompts to compare, and nothing but ties."""
    texts, rewards, mask = two_words(4)
    with pytest.raises(RouterError, match="3 texts with rewards of shape"):
        fine_tune(str(bert), texts[:3], rewards, mask, recipe(), seed=0)
    with pytest.raises(RouterError, match="present cell"):
        fine_tune(str(bert), texts, np.where(rewards > 0.5, np.nan, rewards), mask, recipe(), seed=0)
    with pytest.raises(RouterError, match="1 of 4 prompts"):
        fine_tune(str(bert), texts, rewards, mask & (np.arange(4) == 2)[:, None], recipe(), seed=0)
    ties = np.where(np.arange(3) > 0, 0.5, rewards)
    with pytest.raises(RouterError, match="two teachers of different reward"):
        fine_tune(str(bert), texts, ties, mask & (np.arange(3) > 0), recipe(), seed=0)


def test_a_backbone_that_cannot_be_trained_is_refused(tmp_path: Path, minilm_path: Path) -> None:
    """None there, and an encoder-decoder."""
    texts, rewards, mask = two_words(4)
    with pytest.raises(BackboneError, match="no model at"):
        fine_tune(str(tmp_path / "absent"), texts, rewards, mask, recipe(), seed=0)
    config = T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = save_with_tokenizer(T5Model(config), tmp_path / "t5", minilm_path)
    with pytest.raises(BackboneError, match="encoder-decoder"):
        fine_tune(str(folder), texts, rewards, mask, recipe(), seed=0)


def test_history_is_plain_numbers(bert: Path) -> None:
    """It goes into a manifest as JSON."""
    texts, rewards, mask = two_words(20)
    epoch = fine_tune(str(bert), texts, rewards, mask, recipe(epochs=1), seed=0).history[0]
    assert isinstance(epoch, Epoch)
    assert (type(epoch.train_loss), type(epoch.held_out_regret)) == (float, float)

"""Stage ``train`` by a recipe: score table → router whose backbone is trained end to end."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from safetensors.torch import save

from router_model.backbone import Backbone, load_backbone
from router_model.embedding_cache import encode_all
from router_model.fine_tuning import FineTuned, fine_tune
from router_model.heads import LinearHead
from router_model.linear_fit import LinearMap
from router_model.network import Precision
from router_model.pipeline.progress import Progress
from router_model.pipeline.train import (
    TrainResult,
    TrainSettings,
    backbone_facts,
    gated,
    save_router,
    training_facts,
    training_table,
)
from router_model.recipe import FineTuneRecipe
from router_model.table import ScoreTable
from router_model.training import TunedHead, fit_router, require_trainable


def fine_tune_router(
    scores: Path, folder: Path, settings: TrainSettings, recipe: FineTuneRecipe, *, progress: Progress
) -> TrainResult:
    """Train a backbone and its head by a recipe, and keep its weights in the checkpoint.

    Args:
        settings: Whom the router serves, the seed, the backbone and the measure of learnability; alpha,
            normalisation and limits are the recipe's.

    Raises:
        TableError: The table is malformed, lacks the measure of learnability, or holds nothing to train on.
        RouterError: The recipe and the table do not fit, or training diverged.
        BackboneError: The backbone cannot be loaded.
    """
    training = training_table(scores, settings.learnability)
    require_trainable(training, alpha=recipe.alpha)
    tuned = _fine_tuned(training, settings, recipe, progress)
    backbone = _tuned_backbone(settings.backbone, tuned)
    encoded = encode_all(backbone, training.prompts)
    model = fit_router(
        encoded.features_BD,
        training,
        alpha=recipe.alpha,
        normalization=recipe.normalization,
        head_kind=recipe.objective,
        seed=settings.seed,
        tuned=_tuned_head(tuned, recipe),
    )

    def load(precision: Precision) -> Backbone:
        return _tuned_backbone(settings.backbone, tuned, precision)

    model = gated(model, encoded, training.prompts, load, progress)
    weights = save({name: tensor.contiguous() for name, tensor in tuned.state.items()}, {"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    return save_router(
        folder,
        model,
        settings,
        training,
        backbone=backbone_facts(settings.backbone, backbone, weights_sha256=digest),
        seen=training_facts(training),
        backbone_weights=weights,
    )


def _fine_tuned(
    training: ScoreTable, settings: TrainSettings, recipe: FineTuneRecipe, progress: Progress
) -> FineTuned:
    """The best epoch, with each step told to ``progress``."""
    progress.start("fine-tune", total=training.n_prompts * recipe.epochs)
    done = 0

    def advance(n_prompts: int, _n_most: int) -> None:
        nonlocal done
        progress.advance(n_prompts - done)
        done = n_prompts

    tuned = fine_tune(
        settings.backbone,
        training.prompts,
        training.rewards(recipe.alpha, recipe.normalization),
        training.mask_NM,
        recipe,
        seed=settings.seed,
        progress=advance,
    )
    progress.finish()
    return tuned


def _tuned_backbone(name: str, tuned: FineTuned, precision: Precision = "fp32") -> Backbone:
    """The backbone with its new weights, seen as it was trained: its last layer, around the bare text."""
    whole = load_backbone(
        name, max_tokens=tuned.max_tokens, frame="plain", state=tuned.state, precision=precision
    )
    return whole.with_views([whole.last_view(tuned.pooling)])


def _tuned_head(tuned: FineTuned, recipe: FineTuneRecipe) -> TunedHead:
    history = [dataclasses.asdict(epoch) for epoch in tuned.history]
    facts = {"recipe": recipe.model_dump(), "history": history, "best_epoch": tuned.best_epoch}
    head = LinearHead(LinearMap(tuned.weight_DM, tuned.bias_M))
    return TunedHead(head, np.asarray(tuned.held_out), facts)

"""Stage ``train`` refuses a table before it loads a backbone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from router_model.errors import TableError
from router_model.pipeline.fine_tune import fine_tune_router
from router_model.pipeline.train import TrainSettings, train_router
from router_model.recipe import FineTuneRecipe
from tests.unit.pipeline.test_evaluate import SilentProgress


def by_recipe(scores: Path, folder: Path, settings: TrainSettings) -> object:
    """Train a backbone too."""
    recipe = FineTuneRecipe(backbone=settings.backbone, alpha=settings.alpha)
    return fine_tune_router(scores, folder, settings, recipe, progress=SilentProgress())


def on_frozen_features(scores: Path, folder: Path, settings: TrainSettings) -> object:
    """Train heads alone."""
    return train_router(scores, folder, settings, progress=SilentProgress())


@pytest.mark.parametrize("train", [by_recipe, on_frozen_features])
@pytest.mark.parametrize(
    ("facts", "alpha", "reason"),
    [
        ([{"teacher": "alpaca"}], 0.0, "at least two teachers: add"),
        ([{"teacher": name, "split": "test"} for name in ("alpaca", "bison")], 0.0, "nothing is left"),
        ([{"teacher": name} for name in ("alpaca", "bison")], 0.4, "or train with alpha 0"),
    ],
)
def test_a_table_is_refused_before_the_backbone_is_loaded(
    *,
    tmp_path: Path,
    train: Callable[[Path, Path, TrainSettings], object],
    facts: list[dict[str, str]],
    alpha: float,
    reason: str,
) -> None:
    """There is no such backbone, but it is the table that is named, with what to do."""
    rows = [
        {"prompt_id": f"{n}", "prompt": f"Say {n}.", "quality": 1.0, **fact}
        for n in range(3)
        for fact in facts
    ]
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = TrainSettings("student", None, str(tmp_path / "nowhere"), alpha=alpha)
    with pytest.raises(TableError, match=reason) as refused:
        train(scores, tmp_path / "checkpoint", settings)
    assert str(scores) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "checkpoint").exists()

"""Stage ``evaluate`` with a router that needs no backbone: batches stay in order, files are whole."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from router_model.alpha_curve import ALPHAS
from router_model.backbone import Encoded
from router_model.pipeline import evaluate as stage
from tests.unit.router_model.doubles import FakeOutlook, FakeOutput, planned_manifest
from tests.unit.router_model.worlds import FakeBackbone, summary

N_PROMPTS = 600
"""More than two batches."""


class OracleRouter:
    """Reads the best teacher in the prompt; its kNN reads the worst."""

    def __init__(self) -> None:
        self.manifest = planned_manifest([summary("alpaca", 0.5, reward=0.6), summary("bison", 0.5)])

        self.backbone = ReadingBackbone()

    def answer(self, encoded: Encoded) -> FakeOutput:
        """Strengths of the best teacher at every alpha; the first prompt is unusual."""
        strengths = encoded.features_BD.astype(float)
        outlook = FakeOutlook(strengths, conformal_width=0.0, coverage=0.9)
        return FakeOutput(outlook, dict.fromkeys(ALPHAS, outlook), np.arange(len(strengths)) == 0)

    def baselines(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """One baseline."""
        return {"knn": -encoded.features_BD.astype(float)}


@dataclass
class ReadingBackbone(FakeBackbone):
    """The feature of a prompt is the teacher that it names."""

    width: int = 2

    def encode(self, texts: Sequence[str]) -> Encoded:
        """One-hot."""
        n_tokens = np.ones(len(texts), dtype=np.int64)
        features = np.eye(2, dtype=np.float32)[[int(text.split()[-1]) for text in texts]]
        return Encoded(features, n_tokens, n_tokens > 1)


class SilentProgress:
    """Counts."""

    def __init__(self) -> None:
        self.n_done = 0

    def start(self, stage: str, *, total: int, done: int = 0) -> None:
        """Nothing."""

    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None:
        """Count."""
        self.n_done += n_items

    def finish(self) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""


def test_batches_are_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that knows each prompt's best teacher closes the whole gap over three batches."""
    best = np.random.default_rng(0).integers(2, size=N_PROMPTS)
    rows = [
        {
            "prompt_id": f"p{n}",
            "prompt": f"number {n} is for {best[n]}",
            "teacher": name,
            "quality": float(column == best[n]),
            "learnability": -1.0 - float(column != best[n]),
        }
        for n in range(N_PROMPTS)
        for column, name in enumerate(("alpaca", "bison"))
    ]
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(stage.Router, "load", lambda folder: OracleRouter())
    progress = SilentProgress()
    folder = tmp_path / "report"
    folder.mkdir()
    report = stage.evaluate_router(tmp_path, scores, folder, progress=progress)
    assert progress.n_done == report["n_prompts"] == N_PROMPTS
    assert report["methods"]["persyn"]["mean_reward"] == 1.0
    assert report["methods"]["knn"]["mean_reward"] == 0.0
    assert [point["gap_closed"]["value"] for point in report["curves"]["alpha"]] == [1.0] * 11
    assert report["out_of_distribution"] == 1 / N_PROMPTS
    assert report["conformal"]["mean_set_size"] == 1.0
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.md").read_text().count("![") == 5  # no label curve
    assert (folder / "alpha.png").exists()

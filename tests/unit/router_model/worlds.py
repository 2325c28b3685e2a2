"""Small planted worlds for the router's tests: tables, models, manifests, a backbone without weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_model.backbone import Encoded
from router_model.checkpoint import BackboneFacts, Manifest, StudentFacts, TrainingFacts
from router_model.model import TeacherSummary
from router_model.table import ScoreTable
from router_model.views import View

FloatArray = NDArray[np.float64]
FAKE_FACTS = BackboneFacts("fake", "f" * 64, ("mean@1",), "plain", 32, 8)
TEACHERS = ("alpaca", "bison", "camel", "dingo", "eland")


def make_table(
    quality_NM: FloatArray,
    learnability_NM: FloatArray | None = None,
    *,
    split_N: Sequence[str | None] | None = None,
    first_id: int = 0,
    families: dict[str, str | None] | None = None,
) -> ScoreTable:
    """A table with teachers in the order of ``TEACHERS``; NaN quality is a missing cell."""
    n_prompts, n_teachers = quality_NM.shape
    teachers = TEACHERS[:n_teachers]
    mask_NM = ~np.isnan(quality_NM)
    return ScoreTable(
        prompt_ids=tuple(f"p{first_id + n}" for n in range(n_prompts)),
        prompts=tuple(f"prompt {first_id + n}" for n in range(n_prompts)),
        teachers=teachers,
        quality_NM=quality_NM,
        learnability_NM=None if learnability_NM is None else np.where(mask_NM, learnability_NM, np.nan),
        mask_NM=mask_NM,
        split_N=tuple(split_N) if split_N else (None,) * n_prompts,
        n_tokens_NM=None,
        cost_usd_NM=None,
        families=families or dict.fromkeys(teachers),
        sizes_b=dict.fromkeys(teachers),
        content_sha256="0" * 64,
    )


def linear_world(
    n_prompts: int, *, width: int = 8, n_teachers: int = 5, noise: float = 0.0, seed: int = 0
) -> tuple[NDArray[np.float32], FloatArray]:
    """Features, and qualities that are linear in them plus noise."""
    rng = np.random.default_rng(seed)
    weight_DM = np.random.default_rng(1234).normal(size=(width, n_teachers))
    features_ND = rng.normal(size=(n_prompts, width)).astype(np.float32)
    return features_ND, features_ND @ weight_DM + noise * rng.normal(size=(n_prompts, n_teachers))


def make_manifest(
    teachers: Sequence[TeacherSummary], *, family: str | None = None, alpha: float = 0.4
) -> Manifest:
    """A manifest of a router that was trained on no prompt of these tests."""
    return Manifest(
        checkpoint_id="c" * 64,
        student=StudentFacts("student", family),
        teachers=tuple(teachers),
        alpha=alpha,
        normalization="minmax",
        backbone=FAKE_FACTS,
        training=TrainingFacts("d" * 64, 1, ("e" * 64,)),
        mode="parts",
        head="ridge",
        heads={"chosen.quality": "linear", "raw.quality": "linear"},
        calibration=(),
        coverage=0.9,
        head_sha256="a" * 64,
    )


def summary(
    name: str,
    quality: float,
    *,
    learnability: float | None = -1.0,
    reward: float = 0.5,
    family: str | None = None,
) -> TeacherSummary:
    """One teacher's means."""
    return TeacherSummary(name, family, None, quality, learnability, reward, reward, reward)


@dataclass
class FakeBackbone:
    """Features are a fixed function of the text's length: enough to follow them through the router."""

    name: str = "fake"
    width: int = 8
    hidden: int = 8
    views: tuple[View, ...] = (View("mean", 1),)
    frame: str = "plain"
    max_tokens: int = 32
    fingerprint: str = "f" * 64
    poisoned: bool = False

    def with_views(self, views: Sequence[View]) -> "FakeBackbone":
        """The same."""
        return self

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Cosines of the length."""
        features_BD = np.cos(np.outer([len(text) for text in texts], np.arange(1, self.width + 1))).astype(
            np.float32
        )
        if self.poisoned:
            features_BD[:] = np.nan
        lengths_B = np.array([len(text) for text in texts], dtype=np.int64)
        return Encoded(features_BD, lengths_B, lengths_B > self.max_tokens)

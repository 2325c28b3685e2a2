"""Router: a checkpoint with its backbone, warm, from prompt texts to strengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from router_model.backbone import Backbone, load_backbone
from router_model.checkpoint import Manifest, read_checkpoint
from router_model.errors import CheckpointError, RouterError
from router_model.model import RouterModel

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RouterOutput:
    """What the router says of B prompts and M teachers, in the order of the manifest."""

    strengths_BM: FloatArray
    """Bradley-Terry logits, centred over the teachers."""
    quality_BM: FloatArray
    learnability_BM: FloatArray
    """Nats per token; NaN if the router was trained without learnability."""
    expected_reward_BM: FloatArray
    input_tokens_B: NDArray[np.int64]
    truncated_B: NDArray[np.bool_]


def backbone_location(name: str, moved_to: str | None) -> str:
    """Where to look for a checkpoint's backbone: where it was, or ``moved_to`` if that local path is gone."""
    is_gone = Path(name).is_absolute() and not Path(name).exists()
    return moved_to if moved_to is not None and is_gone else name


class Router:
    """A trained router, ready to score prompts. Used from one owned thread, as its backbone."""

    def __init__(self, model: RouterModel, manifest: Manifest, backbone: Backbone) -> None:
        self._model = model
        self.manifest = manifest
        self.backbone = backbone

    @classmethod
    def load(
        cls,
        folder: Path,
        backbone: Backbone | None = None,
        *,
        moved_to: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Load a checkpoint, and the backbone that it names unless a loaded one is given.

        Args:
            moved_to: Where to look for a local backbone that is not where it was in training, such as in a
                container.

        Raises:
            CheckpointError: The checkpoint is damaged, or the backbone is not the one it was trained with.
            BackboneError: The backbone cannot be loaded.
        """
        model, manifest = read_checkpoint(folder)
        facts = manifest.backbone
        if backbone is None:
            backbone = load_backbone(
                backbone_location(facts.name, moved_to),
                max_tokens=facts.max_tokens,
                pooling=facts.pooling,
                threads=threads,
            )
        if (backbone.fingerprint, backbone.width) != (facts.fingerprint, facts.width):
            raise CheckpointError(
                f"{folder}: was trained with backbone {facts.name!r} of hash {facts.fingerprint[:16]}…, but "
                f"the one loaded has {backbone.fingerprint[:16]}…; train again or restore the model"
            )
        return cls(model, manifest, backbone)

    def score(self, texts: Sequence[str]) -> RouterOutput:
        """Strengths and expectations for prompts rendered by ``tokenization.prompt_text``."""
        encoded = self.backbone.encode(texts)
        predictions = self._model.predict(encoded.features_BD)
        if not np.isfinite(predictions.strengths_BM).all():
            raise RouterError(
                "the backbone's features hold NaN or infinity: no teacher can be chosen by them"
            )
        return RouterOutput(
            strengths_BM=predictions.strengths_BM,
            quality_BM=predictions.quality_BM,
            learnability_BM=predictions.learnability_BM,
            expected_reward_BM=predictions.expected_reward_BM,
            input_tokens_B=encoded.input_tokens_B,
            truncated_B=encoded.truncated_B,
        )

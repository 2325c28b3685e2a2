"""Router: a checkpoint with its backbone, warm, from prompt texts to strengths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from router_model.backbone import Backbone, Encoded, load_backbone
from router_model.checkpoint import BackboneFacts, Manifest, fine_tuned_weights, read_checkpoint
from router_model.errors import BackboneError, CheckpointError, RouterError
from router_model.model import RouterModel
from router_model.network import Precision
from router_model.outlook import RouterOutput
from router_model.pretrained import fingerprint, locate_model
from router_model.views import View

FloatArray = NDArray[np.float64]


def backbone_location(name: str, moved_to: str | None) -> str:
    """Where to look for a checkpoint's backbone: where it was, or ``moved_to`` if that local path is gone."""
    is_gone = Path(name).is_absolute() and not Path(name).exists()
    return moved_to if moved_to is not None and is_gone else name


class Router:
    """A trained router, ready to score prompts. Used from one owned thread, as its backbone."""

    def __init__(self, model: RouterModel, manifest: Manifest, backbone: Backbone) -> None:
        self.model = model
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
        precision: Precision = "fp32",
        device: str = "cpu",
    ) -> Self:
        """Load a checkpoint, and the backbone that it names unless a loaded one is given.

        Args:
            moved_to: Where to look for a local backbone that is not where it was in training, such as in a
                container.
            threads: Torch threads of this process, unchanged if ``None``.
            precision: Arithmetic of a backbone that is loaded here.
            device: A torch device for it.

        Raises:
            CheckpointError: The checkpoint is damaged, or the backbone is not the one it was trained with.
            BackboneError: The backbone cannot be loaded.
        """
        model, manifest = read_checkpoint(folder)
        facts = manifest.backbone
        if backbone is None:
            backbone = _named_backbone(
                folder, manifest, moved_to=moved_to, threads=threads, precision=precision, device=device
            )
        else:
            backbone = backbone.with_views([View.parse(view) for view in facts.views])
        if (backbone.fingerprint, backbone.width) != (facts.fingerprint, facts.width):
            raise _another_backbone(folder, facts, backbone.fingerprint)
        return cls(model, manifest, backbone)

    def score(self, texts: Sequence[str]) -> RouterOutput:
        """What the router says of prompts rendered by ``tokenization.prompt_text``."""
        return self.answer(self.backbone.encode(texts))

    def answer(self, encoded: Encoded) -> RouterOutput:
        """The same of prompts that are encoded already.

        Raises:
            RouterError: The backbone gave NaN or infinity.
        """
        output = self.model.predict(encoded.features_BD, encoded.input_tokens_B, encoded.truncated_B)
        if not np.isfinite(output.at().strengths_BM).all():
            raise RouterError(
                "the backbone's features hold NaN or infinity: no teacher can be chosen by them"
            )
        return output

    def baselines(self, encoded: Encoded) -> dict[str, FloatArray]:
        """Strengths, BM, by the rivals that were trained on the same features, at the checkpoint's alpha."""
        return {name: head.predict(encoded.features_BD) for name, head in self.model.baselines.items()}


def _named_backbone(
    folder: Path,
    manifest: Manifest,
    *,
    moved_to: str | None,
    threads: int | None,
    precision: Precision,
    device: str,
) -> Backbone:
    """The backbone that a checkpoint names, with the weights of the checkpoint if it has some."""
    facts = manifest.backbone
    name = backbone_location(facts.name, moved_to)
    weights = fine_tuned_weights(folder, manifest)
    try:
        return load_backbone(
            name,
            max_tokens=facts.max_tokens,
            views=facts.views,
            frame=facts.frame,
            weights=weights,
            threads=threads,
            precision=precision,
            device=device,
        )
    except BackboneError as error:
        # Another model in its place may lack a layer or a tensor; that is a symptom, told as its cause.
        found = fingerprint(locate_model(name))
        if found != facts.fingerprint:
            raise _another_backbone(folder, facts, found) from error
        raise


def _another_backbone(folder: Path, facts: BackboneFacts, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: was trained with backbone {facts.name!r} of hash {facts.fingerprint[:16]}…, but "
        f"the one loaded has {found[:16]}…; train again or restore the model"
    )

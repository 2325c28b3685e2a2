"""A router that lends its quality heads to that of another student, as quality is the same for all."""

from dataclasses import dataclass, replace

import numpy as np

from router_model.checkpoint import BackboneFacts, Manifest, TrainingFacts
from router_model.errors import CheckpointError, TableError
from router_model.fitting import HeadFit
from router_model.heads import ConstantHead, FeatureArray
from router_model.model import RouterModel, TeacherSummary
from router_model.objectives import OBJECTIVES
from router_model.outlook import Parts
from router_model.reward import Normalization
from router_model.table import ScoreTable
from router_model.training import LentQuality
from router_model.unseen import FOLDS_FACT, NO_MEMBER, QUALITY_FOLDS_FACT, predict_unseen, unseen_by

DONOR_FACT = "quality_from"
"""Among a model's facts: the checkpoint that its quality heads are of."""


@dataclass(frozen=True, slots=True, eq=False)
class QualityDonor:
    """A trained router whose quality heads are taken over as they are."""

    model: RouterModel
    manifest: Manifest

    def ordered(self, table: ScoreTable) -> ScoreTable:
        """The table with its teachers in the donor's order.

        Raises:
            CheckpointError: The teachers are not the same.
        """
        own = [teacher.id for teacher in self.manifest.teachers]
        if sorted(own) != sorted(table.teachers):
            raise CheckpointError(
                f"the quality heads are of the teachers {sorted(own)}, but {table.source} has "
                f"{sorted(table.teachers)}: give a table of the same teachers (persyn extend adds some), or "
                "train without --quality-from"
            )
        return table.with_teachers(own)

    def require_head(self, head_kind: str) -> None:
        """Refuse routers of one head on the mixed reward, here and there.

        Raises:
            CheckpointError: There is no quality head to lend, or none to take its place.
        """
        if self.model.mode == "paper":
            raise CheckpointError(
                f"the checkpoint has one head of kind {self.model.kind!r} on the mixed reward and no quality "
                "head to lend: give one that was trained with --head auto or ridge"
            )
        if head_kind in OBJECTIVES:
            raise CheckpointError(
                f"a head of kind {head_kind!r} is one on the mixed reward, which takes no quality head: "
                "train with --head auto, ridge, knn, cluster, mlp or constant"
            )

    def require_fit(self, backbone: BackboneFacts, normalization: Normalization) -> None:
        """Refuse another backbone or another scale than the donor's.

        Raises:
            CheckpointError: With what differs.
        """
        own = self.manifest.backbone
        differing = {
            "backbone's weights": (own.fingerprint[:16], backbone.fingerprint[:16]),
            "--views": (own.views, backbone.views),
            "frame": (own.frame, backbone.frame),
            "--max-tokens": (own.max_tokens, backbone.max_tokens),
            "normalization": (self.manifest.normalization, normalization),
        }
        for name, (lent, wanted) in differing.items():
            if lent != wanted:
                raise CheckpointError(
                    f"the quality heads were trained with {name} {lent!r}, not {wanted!r}: train with the "
                    "same, or without --quality-from"
                )

    def lent(self, features_ND: FeatureArray, table: ScoreTable) -> LentQuality:
        """The donor's heads with honest predictions for these prompts.

        Calibration needs predictions by heads that did not see a prompt. The donor remembers which member of
        its ensemble left out which of its training prompts, so that member predicts it; a prompt that the
        donor was not trained on is predicted by the head itself. Nothing is fitted. Probes of a teacher that
        was added later are the exception where they were new to the donor: its column has seen them.

        Raises:
            TableError: The table has no learnability, so nothing would be left to fit.
            CheckpointError: The donor was trained on one of the prompts and does not remember its folds.
        """
        if table.learnability_NM is None:
            raise TableError(
                table.source,
                "has no learnability, the one thing that is fitted with --quality-from: score the responses "
                "under the new student first",
            )
        model, trained = self.model, self.manifest.training.prompt_sha256
        hashes = table.prompt_hashes()
        if model.members and FOLDS_FACT not in model.facts and set(hashes) & set(trained):
            raise CheckpointError(
                "the checkpoint was written by an earlier release and does not say which member of its "
                "ensemble left out which prompt: train it again, or train without --quality-from"
            )
        members = [member.quality for member in model.members]
        unseen = unseen_by(model.facts, trained, hashes)
        held_NM = predict_unseen(model.chosen.quality, members, features_ND, unseen.quality_N)
        # What a constant would have said instead: the means over the prompts that the same heads saw.
        means = [ConstantHead(mean_M) for mean_M in model.member_means.quality]
        own = ConstantHead(np.array([teacher.mean_quality_part for teacher in model.teachers]))
        means_NM = predict_unseen(own, means, features_ND, unseen.quality_N)
        facts = {DONOR_FACT: self.manifest.checkpoint_id}
        fit = HeadFit(model.chosen.quality, held_NM, means_NM, tuple(members), facts)
        return LentQuality(fit, model.quality)

    def completed(self, model: RouterModel, training: TrainingFacts) -> tuple[RouterModel, TrainingFacts]:
        """The router with the donor's means of quality as well, and what it was trained on with the donor's.

        The donor's prompts count as seen: no report is made on them, and which member left them out is kept.
        """
        n_members = len(model.members)
        means = self.model.member_means.quality[:n_members], model.member_means.learnability
        donated = self.manifest.training.prompt_sha256
        more = tuple(dict.fromkeys(digest for digest in donated if digest not in set(training.prompt_sha256)))
        seen = (*training.prompt_sha256, *more)
        folds = unseen_by(self.model.facts, donated, seen).quality_N
        completed = replace(
            model,
            teachers=tuple(
                _with_quality(own, lent, model.alpha)
                for own, lent in zip(model.teachers, self.model.teachers, strict=True)
            ),
            member_means=Parts(means[0], None if means[1] is None else means[1][:n_members]),
            facts={
                **model.facts,
                DONOR_FACT: self.manifest.checkpoint_id,
                # A member that the new router has no room for left nothing out of it.
                QUALITY_FOLDS_FACT: [int(number) if number < n_members else NO_MEMBER for number in folds],
            },
        )
        return completed, replace(training, prompt_sha256=seen)


def _with_quality(own: TeacherSummary, lent: TeacherSummary, alpha: float) -> TeacherSummary:
    """The donor's means of quality beside the new student's of learnability."""
    learnability = 0.0 if own.mean_learnability_part is None else own.mean_learnability_part
    return replace(
        own,
        mean_quality=lent.mean_quality,
        mean_quality_part=lent.mean_quality_part,
        mean_reward=(1.0 - alpha) * lent.mean_quality_part + alpha * learnability,
    )

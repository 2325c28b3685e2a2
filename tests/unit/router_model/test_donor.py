"""A new student's router on the quality heads of another one: what is the same, what moves, what fails."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from router_model.checkpoint import TrainingFacts
from router_model.donor import QualityDonor
from router_model.errors import CheckpointError, TableError
from router_model.model import RouterModel
from router_model.model_tensors import model_tensors
from router_model.table import ScoreTable
from router_model.training import fit_router
from router_model.unseen import FOLDS_FACT, unseen_by
from tests.unit.router_model.worlds import (
    FAKE_FACTS,
    TEACHERS,
    linear_world,
    make_manifest,
    make_table,
    summary,
)

FloatArray = NDArray[np.float64]


def world(n_prompts: int, *, first_id: int = 0, seed: int = 0) -> tuple[NDArray[np.float32], ScoreTable]:
    features, quality = linear_world(n_prompts, noise=0.5, seed=seed)
    return features, make_table(quality, 0.3 * quality[:, ::-1] - 3.0, first_id=first_id)


def make_donor(kind: str = "ridge") -> QualityDonor:
    features, table = world(80)
    model = fit_router(features, table, alpha=0.4, head_kind=kind)
    training = TrainingFacts("d" * 64, table.n_prompts, table.prompt_hashes())
    manifest = dataclasses.replace(make_manifest(model.teachers), training=training, facts=model.facts)
    return QualityDonor(model, manifest)


def for_student(
    donor: QualityDonor, features: NDArray[np.float32], table: ScoreTable, kind: str = "ridge"
) -> tuple[RouterModel, TrainingFacts]:
    model = fit_router(features, table, alpha=0.4, head_kind=kind, seed=3, lent=donor.lent(features, table))
    return donor.completed(model, TrainingFacts("e" * 64, table.n_prompts, table.prompt_hashes()))


def is_of_quality(name: str) -> bool:
    return ".quality." in f".{name}." and not name.startswith("baseline.")


@pytest.mark.parametrize("kind", ["ridge", "auto", "knn", "constant"])
def test_quality_is_the_donors_bit_for_bit(kind: str) -> None:
    """Heads, members, raw values and means of quality are the donor's; learnability is fitted anew."""
    donor = make_donor()
    features, table = world(80)
    other = dataclasses.replace(table, learnability_NM=-np.abs(table.quality_NM))
    model, _ = for_student(donor, features, other, kind)
    before, after = model_tensors(donor.model), model_tensors(model)
    names = [name for name in before if is_of_quality(name)]
    assert len(names) == 2 * 7 + 1
    assert names == [name for name in after if is_of_quality(name)]
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])
    assert any(
        name not in after or not np.array_equal(after[name], before[name])
        for name in before
        if name.startswith("chosen.learnability")
    )
    for own, lent in zip(model.teachers, donor.model.teachers, strict=True):
        assert (own.mean_quality, own.mean_quality_part) == (lent.mean_quality, lent.mean_quality_part)


def test_another_learnability_moves_the_decisions() -> None:
    """At alpha 0 two students are served alike, above they are not."""
    donor = make_donor()
    features, table = world(80)
    assert table.learnability_NM is not None
    turned = dataclasses.replace(table, learnability_NM=table.learnability_NM[:, ::-1])
    outputs = [for_student(donor, features, own)[0].predict(features) for own in (table, turned)]
    chosen = {
        alpha: [output.parts.mixed(alpha).argmax(axis=1) for output in outputs] for alpha in (0.0, 0.4, 1.0)
    }
    np.testing.assert_array_equal(*chosen[0.0])
    assert (chosen[0.4][0] != chosen[0.4][1]).mean() > 0.05
    assert (chosen[1.0][0] != chosen[1.0][1]).mean() > 0.5


def test_held_out_predictions_are_by_heads_that_did_not_see_the_prompt() -> None:
    """A training prompt of the donor by the member that left it out, in any order; a new one by the head."""
    donor = make_donor()
    features, table = world(80)
    new_features, new_table = world(5, first_id=1000, seed=5)
    rows = np.array([7, 70, 3])
    lent = donor.lent(features[rows], table.select(rows)).fit
    folds = donor.model.facts[FOLDS_FACT]
    expected = [donor.model.members[folds[row]].quality.predict(features[[row]])[0] for row in rows]
    np.testing.assert_allclose(lent.out_of_fold_NM, expected)
    fresh = donor.lent(new_features, new_table).fit
    np.testing.assert_allclose(fresh.out_of_fold_NM, donor.model.chosen.quality.predict(new_features))


def test_the_donors_prompts_count_as_seen() -> None:
    """No report is made on a prompt that the quality heads know, and its member is remembered."""
    donor = make_donor()
    features, table = world(20, first_id=70, seed=4)
    model, training = for_student(donor, features, table)
    donated = donor.manifest.training.prompt_sha256
    assert set(training.prompt_sha256) == {*donated, *table.prompt_hashes()}
    assert training.n_prompts == 20
    unseen = unseen_by(model.facts, training.prompt_sha256, donated)
    assert list(unseen.quality_N) == donor.model.facts[FOLDS_FACT]
    assert list(unseen.learnability_N[:70]) == [-1] * 70
    new = unseen_by(model.facts, training.prompt_sha256, table.prompt_hashes()[10:])
    assert list(new.quality_N) == [-1] * 10
    assert min(new.learnability_N) >= 0


def test_few_prompts_of_the_new_student_are_enough() -> None:
    """Fewer folds than the donor has members, down to none."""
    donor = make_donor()
    for n_prompts in (1, 3):
        features, table = world(n_prompts, first_id=200)
        model, _ = for_student(donor, features, table, "auto")
        assert len(model.members) == len(model.member_means.quality) == (3 if n_prompts == 3 else 0)
        assert np.isfinite(model.predict(features).at(0.4).members_EBM).all()


def test_columns_follow_the_donors_order() -> None:
    """A table has its teachers by name, an extended router the new ones last."""
    donor = make_donor()
    turned = [*TEACHERS[1:], TEACHERS[0]]
    _, table = world(5)
    other = dataclasses.replace(donor.manifest, teachers=tuple(summary(name, 0.5) for name in turned))
    ordered = QualityDonor(donor.model, other).ordered(table)
    assert list(ordered.teachers) == turned
    np.testing.assert_array_equal(ordered.quality_NM[:, -1], table.quality_NM[:, 0])
    with pytest.raises(CheckpointError, match="the quality heads are of the teachers"):
        donor.ordered(table.with_teachers(TEACHERS[:4]))


def test_what_does_not_fit_is_refused() -> None:
    """Each with what differs and what to do."""
    donor = make_donor()
    features, table = world(80)
    for change, words in (
        ({"fingerprint": "0" * 64}, "backbone's weights"),
        ({"views": ("last@1",)}, "--views"),
        ({"frame": "chat"}, "frame"),
        ({"max_tokens": 64}, "--max-tokens"),
    ):
        with pytest.raises(CheckpointError, match=words):
            donor.require_fit(dataclasses.replace(FAKE_FACTS, **change), "minmax")
    with pytest.raises(CheckpointError, match="normalization 'minmax', not 'rank'"):
        donor.require_fit(FAKE_FACTS, "rank")
    donor.require_fit(FAKE_FACTS, "minmax")
    with pytest.raises(CheckpointError, match="no quality head to lend"):
        make_donor("bt").require_head("auto")
    with pytest.raises(CheckpointError, match="takes no quality head"):
        donor.require_head("bt")
    with pytest.raises(TableError, match="no learnability"):
        donor.lent(features, dataclasses.replace(table, learnability_NM=None))
    old = dataclasses.replace(donor, model=dataclasses.replace(donor.model, facts={}))
    with pytest.raises(CheckpointError, match="written by an earlier release"):
        old.lent(features, table)

"""New teachers without training again: what a few probe prompts give, and what they must not touch."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from router_model.column_fit import Probes, fit_column
from router_model.errors import RouterError, TableError
from router_model.extension import extend_model
from router_model.known_scale import normalize_beside
from router_model.model import RouterModel
from router_model.model_tensors import head_kinds, model_tensors, restore_model
from router_model.reward import mix_reward, regret
from router_model.table import ScoreTable
from router_model.training import fit_router
from router_model.unseen import FOLDS_FACT, unseen_by
from tests.unit.router_model.worlds import TEACHERS, linear_world, make_table

NEW = TEACHERS[-1]
N_PROBES = 50


def without(table: ScoreTable, teacher: str) -> ScoreTable:
    """The table without one of its teachers."""
    return table.with_teachers([name for name in table.teachers if name != teacher])


def world(n_prompts: int, *, seed: int = 0, noise: float = 0.5) -> tuple[NDArray[np.float32], ScoreTable]:
    """Quality and learnability, both linear in the features, of five teachers in three dimensions."""
    features, quality = linear_world(n_prompts, width=3, noise=noise, seed=seed)
    weight_DM = np.random.default_rng(77).normal(size=(3, 5))
    learnability = features @ weight_DM + noise * np.random.default_rng(seed + 1).normal(size=quality.shape)
    return features, make_table(quality, learnability - 3.0)


def trained(
    kind: str = "ridge", *, n_prompts: int = 200
) -> tuple[RouterModel, NDArray[np.float32], ScoreTable]:
    """A router of the first four teachers, and the table of all five."""
    features, table = world(n_prompts)
    return fit_router(features, without(table, NEW), alpha=0.4, head_kind=kind), features, table


def mean_regret(model: RouterModel, alpha: float) -> float:
    """On new prompts of the world, over all five teachers."""
    features, table = world(1000, seed=1)
    reward = mix_reward(table.quality_NM, table.learnability_NM, table.mask_NM, alpha=alpha)
    return float(regret(model.predict(features).at(alpha).strengths_BM, reward, table.mask_NM).mean())


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_fifty_probes_are_nearly_as_good_as_training_again(alpha: float) -> None:
    """In a linear world the extended router's regret is near that of one trained on all of the answers."""
    model, features, table = trained()
    rows = np.arange(N_PROBES)
    extended = extend_model(model, features[rows], table.select(rows), [NEW])
    whole = fit_router(features, table, alpha=0.4, head_kind="ridge")
    new_features, _ = world(1000, seed=1)
    blind = extended.predict(new_features).at(alpha).strengths_BM
    blind[:, -1] = -np.inf
    _, new = world(1000, seed=1)
    reward = mix_reward(new.quality_NM, new.learnability_NM, new.mask_NM, alpha=alpha)
    without_new = float(regret(blind, reward, new.mask_NM).mean())
    recovered = (without_new - mean_regret(extended, alpha)) / (without_new - mean_regret(whole, alpha))
    assert recovered > 0.85


def test_the_probes_of_a_teacher_without_signal_give_a_constant() -> None:
    """With shuffled answers the column hardly varies, and lies at the mean of the answers."""
    model, features, table = trained()
    spread = {}
    for name in ("planted", "shuffled"):
        quality = table.quality_NM.copy()
        if name == "shuffled":
            quality[:, -1] = np.random.default_rng(2).permutation(quality[:, -1])
        rows = np.arange(N_PROBES)
        changed = dataclasses.replace(table, quality_NM=quality).select(rows)
        column = extend_model(model, features[rows], changed, [NEW]).predict(features).parts.quality[:, -1]
        spread[name] = column.std()
        scaled = normalize_beside(
            changed.quality_NM[:, -1], changed.quality_NM[:, :-1], changed.mask_NM[:, :-1], "minmax"
        )
        assert abs(column.mean() - scaled.mean()) < 0.15
    assert spread["shuffled"] < 0.2 * spread["planted"]


@pytest.mark.parametrize("kind", ["constant", "ridge", "knn", "cluster", "mlp", "auto"])
def test_known_columns_keep_every_bit(kind: str) -> None:
    """Every tensor of the known teachers stands in the extended router as it was, one column follows."""
    model, features, table = trained(kind, n_prompts=60)
    extended = extend_model(model, features[:20], table.select(np.arange(20)), [NEW])
    before, after = model_tensors(model), model_tensors(extended)
    baseline = {name for name in before if name.startswith("baseline.paper_bt")}
    assert set(before) - baseline == set(after)
    n_wider = 0
    for name in after:
        # Of which teacher is the best there are as many columns for each alpha.
        n_blocks = len(model.top_alphas) if ".top." in name else 1
        blocks = (*before[name].shape[:-1], n_blocks, -1)
        own, wider = before[name].reshape(blocks), after[name].reshape(blocks)
        np.testing.assert_array_equal(wider[..., : own.shape[-1]], own)
        n_wider += after[name].shape != before[name].shape
    assert n_wider >= 4 + 2 * len(model.members)
    assert extended.teachers[:-1] == model.teachers
    assert extended.calibration == model.calibration
    restored = restore_model(
        after,
        head_kinds(extended),
        teachers=extended.teachers,
        alpha=0.4,
        normalization="minmax",
        mode="parts",
        kind=extended.kind,
        calibration=extended.calibration,
        coverage=extended.coverage,
        width=3,
        top_alphas=extended.top_alphas,
        facts=extended.facts,
    )
    output = restored.predict(features)
    assert np.isfinite(output.at(0.4).strengths_BM).all()
    assert output.at(0.4).members_EBM.shape == (5, 60, 5)


def test_a_table_with_gaps_extends_a_neighbour_head() -> None:
    """A missing known answer is neither zero nor NaN in the new column."""
    features, table = world(80)
    gone = np.random.default_rng(0).random((80, 4)) < 0.3
    quality = table.quality_NM.copy()
    quality[:, :4][gone] = np.nan
    holey = make_table(quality)
    model = fit_router(features, without(holey, NEW), alpha=0.0, head_kind="knn")
    extended = extend_model(model, features, holey, [NEW])
    assert np.isfinite(extended.predict(features).parts.quality).all()


def test_two_teachers_do_not_depend_on_their_order() -> None:
    """Each is fitted beside the known ones alone, at once or one after the other by name."""
    features, table = world(100)
    model = fit_router(features, without(without(table, NEW), TEACHERS[3]), alpha=0.4, head_kind="ridge")
    both = extend_model(model, features, table, [NEW, TEACHERS[3]])
    turned = extend_model(model, features, table, [TEACHERS[3], NEW])
    assert [teacher.id for teacher in both.teachers] == [*TEACHERS[:3], NEW, TEACHERS[3]]
    columns = [0, 1, 2, 4, 3]
    np.testing.assert_allclose(
        both.predict(features).parts.quality, turned.predict(features).parts.quality[:, columns]
    )
    assert [item["teacher"] for item in both.facts["extensions"]] == [NEW, TEACHERS[3]]


def test_the_summary_is_that_of_the_training_prompts() -> None:
    """Probes of one kind only do not mislead: the mean is read off where the known teachers have theirs."""
    features, table = world(400)
    model = fit_router(features, without(table, NEW), alpha=0.4, head_kind="ridge")
    truth = fit_router(features, table, alpha=0.4, head_kind="ridge").teachers[-1]
    easy = np.argsort(-features[:, 0])[:100]
    summary = extend_model(model, features[easy], table.select(easy), [NEW]).teachers[-1]
    plain = float(table.quality_NM[easy, -1].mean())
    assert abs(summary.mean_quality - truth.mean_quality) < 0.5 * abs(plain - truth.mean_quality)
    assert summary.mean_learnability is not None
    assert summary.mean_reward == pytest.approx(
        0.6 * summary.mean_quality_part + 0.4 * (summary.mean_learnability_part or 0.0)
    )


def test_members_that_have_not_seen_a_prompt_are_known() -> None:
    """The fold of each prompt is remembered: its member was trained without it."""
    features, table = world(40)
    model = fit_router(features, table, alpha=0.4, head_kind="ridge")
    hashes = table.prompt_hashes()
    member_N = unseen_by(model.facts, hashes, [*hashes[::-1], "unknown"]).quality_N
    assert list(member_N) == [*reversed(model.facts[FOLDS_FACT]), -1]
    assert sorted(np.bincount(member_N[:-1])) == [8] * 5
    assert list(unseen_by({}, hashes, hashes).learnability_N) == [-1] * 40


def bad_inputs() -> Sequence[tuple[str, type[RouterError], str]]:
    """What is wrong, the error, and words of its message."""
    return [
        ("known", RouterError, "known to the router already"),
        ("twice", RouterError, "named twice"),
        ("absent", TableError, "no answer of teacher 'zebra'"),
        ("few", TableError, "has 4 probe prompts"),
        ("alone", TableError, "no answer of a teacher that the router knows"),
        ("unscored", TableError, "has no learnability"),
        ("nobody", TableError, "no teacher that the router does not know"),
        ("paper", RouterError, "--head auto or ridge"),
    ]


@pytest.mark.parametrize(("what", "error", "words"), bad_inputs())
def test_what_cannot_be_extended_is_refused(what: str, error: type[RouterError], words: str) -> None:
    """Each with what happened and what to do."""
    model, features, table = trained("bt" if what == "paper" else "ridge", n_prompts=30)
    teachers = {"known": [TEACHERS[0]], "twice": [NEW, NEW], "absent": ["zebra"], "nobody": []}.get(
        what, [NEW]
    )
    if what == "few":
        table = table.select(np.arange(4))
    elif what == "alone":
        for name in TEACHERS[:4]:
            table = without(table, name)
    elif what == "unscored":
        table = dataclasses.replace(table, learnability_NM=None)
    with pytest.raises(error, match=words):
        extend_model(model, features[: table.n_prompts], table, teachers)


def test_values_beside_known_ones() -> None:
    """Inside the known range its scale; outside, the distance in the range of all."""
    known = np.array([[0.0, 4.0], [0.0, 4.0], [0.0, 4.0], [2.0, 2.0], [2.0, 2.0], [1.0, np.nan]])
    mask = ~np.isnan(known)
    new = np.array([1.0, 8.0, -4.0, 5.0, 2.0, 1.0])
    np.testing.assert_allclose(normalize_beside(new, known, mask, "minmax"), [0.25, 1.5, -0.5, 1.5, 0.5, 0.5])
    np.testing.assert_allclose(normalize_beside(new, known, mask, "rank"), [0.5, 1.5, -0.5, 1.5, 0.5, 0.0])
    np.testing.assert_array_equal(normalize_beside(new, known, mask, "none"), new)
    scaled = normalize_beside(new, known, mask, "zscore")
    joint = np.column_stack([known, new])[:5]
    expected = (new[:5] - known[:5].mean(axis=1)) / np.maximum(joint.std(axis=1), 1e-9)
    np.testing.assert_allclose(scaled, [*expected, 0.0], atol=1e-12)
    # The lead over the best known teacher is that of the reward over all of them.
    joint_part = mix_reward(joint, None, np.ones_like(joint, dtype=bool), alpha=0.0)
    assert joint_part[1, 2] - joint_part[1, 1] == pytest.approx(0.5)


def test_a_column_is_ridge_regression() -> None:
    """Weights and mean are those of the normal equations, and so is the leave-one-out choice."""
    rng = np.random.default_rng(0)
    known, target = rng.normal(size=(30, 4)), rng.normal(size=30)
    target += known @ np.array([1.0, -1.0, 0.5, 0.0])
    probes = Probes(known, np.zeros(30), target, np.full(4, 0.1))
    column = fit_column(probes, 10.0)
    centred = known - known.mean(axis=0)
    l2 = 10.0 * (centred**2).sum() / 30
    weight = np.linalg.solve(centred.T @ centred + l2 * np.eye(4), centred.T @ (target - target.mean()))
    np.testing.assert_allclose(column.weight_M, weight)
    assert column.mean == pytest.approx(target.mean() + weight @ (0.1 - known.mean(axis=0)))
    assert column.bias == pytest.approx(column.mean - 0.1 * weight.sum())

    def left_out(l2: float) -> NDArray[np.float64]:
        errors = []
        for row in range(30):
            rest = np.delete(np.arange(30), row)
            x, y = known[rest] - known[rest].mean(axis=0), target[rest]
            # The same ridge as on all prompts, with the unit of all.
            w = np.linalg.solve(x.T @ x + l2 * (centred**2).sum() / 30 * np.eye(4), x.T @ (y - y.mean()))
            errors.append((target[row] - y.mean() - (known[row] - known[rest].mean(axis=0)) @ w) ** 2)
        return np.array(errors)

    constant = left_out(1e12)
    errors = {l2: left_out(l2) for l2 in (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)}
    cautious = {
        l2: error.mean() + (constant - error).std(ddof=1) / np.sqrt(30) for l2, error in errors.items()
    }
    assert fit_column(probes).l2 == min(cautious, key=lambda l2: cautious[l2])


def test_a_member_has_seen_no_probe_of_its_fold() -> None:
    """Changing the new teacher's answers to a fold's prompts does not move that fold's member."""
    model, features, table = trained(n_prompts=60)
    hashes = table.prompt_hashes()
    unseen = unseen_by(model.facts, hashes, hashes)
    own = unseen.quality_N == 2
    quality = table.quality_NM.copy()
    quality[own, -1] += 5.0
    fixed = [
        extend_model(model, features, changed, [NEW], unseen=unseen).members
        for changed in (table, dataclasses.replace(table, quality_NM=quality))
    ]
    for fold in range(5):
        means = [members[fold].quality.predict(features)[:, -1].mean() for members in fixed]
        assert (abs(means[0] - means[1]) < 0.02) == (fold == 2)

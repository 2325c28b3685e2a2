"""What is a new teacher worth that was added from a few probes, next to a mean and to training again?

    python tests/bench/new_teacher.py --table t.parquet --backbone model.gguf --cache c.sqlite --out n.json

One teacher after another is left out and added again, in cross-validation over prompts. Judged over all
teachers: the share of the gap between the best single teacher, known from all labels, and the oracle.
Training again with gaps solves the known and the new columns apart, which is the same: no teacher's answers
and L2 count for another's.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_model import column_fit
from router_model.backbone import load_backbone
from router_model.design import Design, prepare
from router_model.embedding_cache import EmbeddingCache, encode_all
from router_model.extension import extend_model
from router_model.fitting import fit_ridges
from router_model.label_advice import choose_prompts
from router_model.model import RouterModel
from router_model.outlook import Parts
from router_model.reward import mix_reward, regret
from router_model.table import ScoreTable, read_table
from router_model.training import fit_router
from router_model.unseen import unseen_by

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

ALPHAS = (0.0, 0.4)
N_PROBES = (20, 50, 100)
ALL = 0
"""Stands for all training prompts."""
N_BOOTSTRAP = 10_000
COLUMN, SPREAD, MEAN, AGAIN = "column", "column, spread probes", "mean", "trained again"
WHOLE, NEVER = "all labels", "not added"


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One fold: a router of all teachers but one, and everything to judge its extensions."""

    table: ScoreTable
    features: NDArray[np.float32]
    widths: Sequence[int]
    train: IndexArray
    held: IndexArray
    new: int

    @property
    def known(self) -> IndexArray:
        """Columns of the other teachers."""
        return np.setdiff1d(np.arange(self.table.n_teachers), [self.new])


def main() -> None:
    """Leave out, add again, print a table, and keep every number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--cache", type=Path, required=True, help="Embeddings.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teachers", type=int, default=6, help="How many, those that win most prompts.")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=5, help="Random sets of probes per split.")
    options = parser.parse_args()
    table = read_table(options.table)
    backbone = load_backbone(options.backbone, max_tokens=2048)
    features = encode_all(backbone, table.prompts, cache=EmbeddingCache(options.cache)).features_BD
    widths = [backbone.hidden] * len(backbone.views)
    order = np.random.default_rng(0).permutation(table.n_prompts)
    found: list[dict[str, object]] = []
    start = time.process_time()
    for fold, held in enumerate(np.array_split(order, options.folds)):
        train = np.setdiff1d(np.arange(table.n_prompts), held)
        whole = fit_router(features[train], table.select(train), alpha=0.4, head_kind="ridge", widths=widths)
        predicted = whole.predict(features[held]).parts
        for new in most_wins(table)[: options.teachers]:
            split = Split(table, features, widths, train, held, new)
            found.append(record(split, WHOLE, ALL, predicted, fold=fold))
            found += compare(split, fold, options.draws)
            options.out.write_text(json.dumps(found))
            print(fold, table.teachers[new], f"{time.process_time() - start:.0f} CPU-s", flush=True)
    print(summary(found))


def most_wins(table: ScoreTable) -> list[int]:
    """Teachers by their share of the prompts that they win, at both alphas."""
    n_wins = np.zeros(table.n_teachers)
    for alpha in ALPHAS:
        reward = mix_reward(table.quality_NM, table.learnability_NM, table.mask_NM, alpha=alpha)
        n_wins += np.bincount(reward.argmax(axis=1), minlength=table.n_teachers)
    return [int(column) for column in np.argsort(-n_wins)]


def compare(split: Split, fold: int, n_draws: int) -> list[dict[str, object]]:
    """All ways to add the teacher, by all numbers of probes."""
    training = split.table.select(split.train)
    own = split.features[split.train]
    model = fit_router(
        own,
        training.with_teachers([split.table.teachers[m] for m in split.known]),
        alpha=0.4,
        head_kind="ridge",
        widths=split.widths,
    )
    parts = model.predict(split.features[split.held]).parts
    records = [record(split, NEVER, ALL, never_chosen(parts, split), fold=fold)]
    for n_probes in (*N_PROBES, ALL):
        size = n_probes or len(own)
        draws = [
            np.random.default_rng([draw, fold, split.new]).permutation(len(own))[:size]
            for draw in range(n_draws if n_probes else 1)
        ]
        for draw, probes in enumerate(draws):
            for name, is_mean in ((COLUMN, False), (MEAN, True)):
                parts = extended(model, split, probes, is_mean=is_mean)
                records.append(record(split, name, n_probes, parts, fold=fold, draw=draw))
        if n_probes:
            parts = trained_again(split, prepare(own, seed=0, widths=split.widths), draws[0])
            records.append(record(split, AGAIN, n_probes, parts, fold=fold))
            spread = choose_prompts(model.novelty.projection(own), np.ones(len(own)), size)
            parts = extended(model, split, spread, is_mean=False)
            records.append(record(split, SPREAD, n_probes, parts, fold=fold))
    return records


def extended(model: RouterModel, split: Split, probes: IndexArray, *, is_mean: bool) -> Parts:
    """Predictions of the extended router, in the columns of the table."""
    rows = split.train[probes]
    table = split.table.select(rows)
    trained = split.table.select(split.train).prompt_hashes()
    unseen = unseen_by(model.facts, trained, table.prompt_hashes())
    grid = column_fit.L2_GRID
    column_fit.L2_GRID = grid[:1] if is_mean else grid
    try:
        router = extend_model(
            model, split.features[rows], table, [split.table.teachers[split.new]], unseen=unseen
        )
    finally:
        column_fit.L2_GRID = grid
    parts = router.predict(split.features[split.held]).parts
    back = np.argsort([*split.known, split.new])
    assert parts.learnability is not None
    return Parts(parts.quality[:, back], parts.learnability[:, back])


def never_chosen(parts: Parts, split: Split) -> Parts:
    """The known teachers' predictions, with a column that is never the best."""
    worst = np.full((len(split.held), split.table.n_teachers), -1e6)
    quality, learnability = worst, worst.copy()
    quality[:, split.known] = parts.quality
    learnability[:, split.known] = parts.learnability
    return Parts(quality, learnability)


def trained_again(split: Split, design: Design, probes: IndexArray) -> Parts:
    """Ridge heads of a table in which the new teacher answered the probes alone."""
    table = split.table.select(split.train)
    mask = table.mask_NM.copy()
    mask[np.setdiff1d(np.arange(len(mask)), probes), split.new] = False
    targets = {
        name: mix_reward(table.quality_NM, table.learnability_NM, mask, alpha=alpha)
        for name, alpha in (("quality", 0.0), ("learnability", 1.0))
    }
    predicted = {name: np.empty((len(split.held), table.n_teachers)) for name in targets}
    for columns in (split.known, np.array([split.new])):
        own = {name: values[:, columns] for name, values in targets.items()}
        for name, fit in fit_ridges(design, own, mask[:, columns]).items():
            predicted[name][:, columns] = fit.head.predict(split.features[split.held])
    return Parts(predicted["quality"], predicted["learnability"])


def record(
    split: Split, method: str, n_probes: int, parts: Parts, *, fold: int, draw: int = 0
) -> dict[str, object]:
    """Reward above the best single teacher, prompt by prompt."""
    table, found = split.table, {}
    for alpha in ALPHAS:
        reward = mix_reward(table.quality_NM, table.learnability_NM, table.mask_NM, alpha=alpha)
        held, mask = reward[split.held], table.mask_NM[split.held]
        single = np.tile(reward[split.train].mean(axis=0), (len(held), 1))
        base = regret(single, held, mask)
        found[str(alpha)] = {
            "gap": base.tolist(),
            "gain": (base - regret(parts.mixed(alpha), held, mask)).tolist(),
        }
    return {
        "teacher": table.teachers[split.new],
        "method": method,
        "n_probes": n_probes,
        "fold": fold,
        "draw": draw,
        "at": found,
    }


def summary(found: Sequence[dict[str, object]]) -> str:
    """Share of the gap closed, mean over the teachers; the column less each rival, paired over prompts."""
    names = (NEVER, COLUMN, SPREAD, MEAN, AGAIN, WHOLE)
    lines = ["| alpha | probes | " + " | ".join(names) + " |", "|--:" * 8 + "|"]
    notes = []
    for alpha in ALPHAS:
        gap = per_prompt(found, WHOLE, ALL, alpha, "gap")
        weights = np.random.default_rng(0).multinomial(len(gap), np.full(len(gap), 1 / len(gap)), N_BOOTSTRAP)
        total = weights @ gap

        def share(method: str, n_probes: int, alpha: float = alpha) -> FloatArray | None:
            if not any((item["method"], item["n_probes"]) == (method, n_probes) for item in found):
                return None
            return per_prompt(found, method, n_probes, alpha, "gain")

        always = {name: per_prompt(found, name, ALL, alpha, "gain") for name in (NEVER, WHOLE)}
        for n_probes in (*N_PROBES, ALL):
            own = {name: share(name, n_probes) for name in (COLUMN, SPREAD, MEAN, AGAIN)}
            gains = {NEVER: always[NEVER], **own, WHOLE: always[WHOLE]}
            cells = ["" if gain is None else f"{100 * gain.sum() / gap.sum():.1f}" for gain in gains.values()]
            lines.append(f"| {alpha:g} | {n_probes or 'all'} | " + " | ".join(cells) + " |")
            for name, gain in gains.items():
                if name == COLUMN or gain is None:
                    continue
                difference = gains[COLUMN] - gain
                low, high = np.quantile(100 * (weights @ difference) / total, [0.025, 0.975])
                middle = 100 * difference.sum() / gap.sum()
                notes.append(
                    f"alpha {alpha:g}, {n_probes or 'all'} probes: column less {name}: "
                    f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
                )
    return "\n".join([*lines, *notes])


def per_prompt(
    found: Sequence[dict[str, object]], method: str, n_probes: int, alpha: float, what: str
) -> FloatArray:
    """Mean over teachers and draws for each prompt, fold after fold."""
    values = []
    for fold in sorted({int(str(item["fold"])) for item in found}):
        own = [
            item["at"][str(alpha)][what]
            for item in found
            if (item["method"], item["n_probes"], item["fold"]) == (method, n_probes, fold)
        ]
        values.append(np.mean(own, axis=0))
    return np.concatenate(values)


if __name__ == "__main__":
    main()

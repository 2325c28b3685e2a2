"""Do the router's decisions beat its rivals'? Cross-validation over pools of teachers, same features.

    python tests/bench/router_quality.py --table instruct.parquet --backbone model.gguf --out comparison.json

Every method chooses its hyper-parameters inside the training part of each split. The pools are all teachers,
and those without one family after another, each at two alphas.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_model.backbone import load_backbone
from router_model.design import prepare
from router_model.embedding_cache import EmbeddingCache, encode_all
from router_model.fitting import fit_neighbours
from router_model.objective_fit import fit_objective
from router_model.reward import mix_reward, regret
from router_model.table import LEARNABILITY_COLUMNS, ScoreTable, read_table
from router_model.training import fit_router

FloatArray = NDArray[np.float64]

ALPHAS = (0.0, 0.4)
RIVALS = {"ridge": "regression", "hard BT": "bt", "soft BT": "soft_bt", "paper's loss": "paper_bt"}
GRID = (math.inf, 100.0, 30.0, 10.0, 3.0)
N_BOOTSTRAP = 10_000


def main() -> None:
    """Compare, print a table, and keep every number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--cache", type=Path, required=True, help="Embeddings.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learnability", choices=list(LEARNABILITY_COLUMNS), default="mean_logprob")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--first-repeat", type=int, default=0, help="To go on where another call ended.")
    parser.add_argument("--pools", nargs="*", help="Names of the pools; all by default.")
    parser.add_argument(
        "--join", type=Path, nargs="*", default=[], help="Results of other calls to sum up too."
    )
    options = parser.parse_args()
    table = read_table(options.table, learnability=options.learnability)
    backbone = load_backbone(options.backbone, max_tokens=2048)
    features = encode_all(backbone, table.prompts, cache=EmbeddingCache(options.cache)).features_BD
    widths = [backbone.hidden] * len(backbone.views)
    found = []
    chosen = [pool for pool in pools(table) if options.pools is None or pool[0] in options.pools]
    for repeat in range(options.first_repeat, options.first_repeat + options.repeats):
        for name, pool in chosen:
            found += compare(name, pool, features, widths, repeat=repeat, n_folds=options.folds)
            options.out.write_text(json.dumps(found))
    for path in options.join:
        found += json.loads(path.read_text())
    print(summary(found))


def pools(table: ScoreTable) -> list[tuple[str, ScoreTable]]:
    """All teachers, all but one family, and all but the best one or five, while at least four remain."""
    order = np.argsort(-table.quality_NM.mean(axis=0))
    columns = {"all": np.arange(table.n_teachers)}
    for family in sorted({str(family) for family in table.families.values()}):
        kept = [m for m, teacher in enumerate(table.teachers) if str(table.families[teacher]) != family]
        columns[f"without {family}"] = np.array(kept)
    for n_best in (1, 5):
        columns[f"without the {n_best} best"] = np.sort(order[n_best:])
    return [(name, narrowed(table, kept)) for name, kept in columns.items() if len(kept) >= 4]


def narrowed(table: ScoreTable, columns: NDArray[np.int64]) -> ScoreTable:
    """The table with some of its teachers."""
    learnability = table.learnability_NM
    return dataclasses.replace(
        table,
        teachers=tuple(table.teachers[m] for m in columns),
        quality_NM=table.quality_NM[:, columns],
        learnability_NM=None if learnability is None else learnability[:, columns],
        mask_NM=table.mask_NM[:, columns],
        n_tokens_NM=None,
        cost_usd_NM=None,
    )


def compare(
    name: str,
    table: ScoreTable,
    features: NDArray[np.float32],
    widths: Sequence[int],
    *,
    repeat: int,
    n_folds: int,
) -> list[dict[str, object]]:
    """Reward above the best single teacher of the training part, prompt by prompt, for every method."""
    records: list[dict[str, object]] = []
    order = np.random.default_rng(repeat).permutation(table.n_prompts)
    for number, held in enumerate(np.array_split(order, n_folds)):
        train = np.setdiff1d(order, held)
        model = fit_router(features[train], table.select(train), alpha=0.4, seed=repeat, widths=widths)
        output = model.predict(features[held])
        for alpha in ALPHAS:
            reward = mix_reward(table.quality_NM, table.learnability_NM, table.mask_NM, alpha=alpha)
            mask = table.mask_NM
            design = prepare(features[train], seed=repeat, widths=widths)
            fits = {
                rival: fit_objective(objective, design, reward[train], mask[train], grid=GRID)
                for rival, objective in RIVALS.items()
            }
            fits["kNN"] = fit_neighbours(design, reward[train], mask[train])
            values = {rival: fit.head.predict(features[held]) for rival, fit in fits.items()}
            values["PerSyn"] = output.at(alpha).strengths_BM
            values["PerSyn, never falling back"] = output.parts.strengths(
                alpha, output.mean_parts.mixed(alpha)
            )
            single = np.tile(reward[train].mean(axis=0), (len(held), 1))
            base = regret(single, reward[held], mask[held])
            records.append(
                {
                    "pool": name,
                    "alpha": alpha,
                    "repeat": repeat,
                    "fold": number,
                    "helps": output.at(alpha).helps,
                    "gap": base.tolist(),
                    "gain": {
                        key: (base - regret(value, reward[held], mask[held])).tolist()
                        for key, value in values.items()
                    },
                }
            )
            gap = base.sum()
            shares = {key: round(100 * float(np.sum(v)) / gap, 1) for key, v in records[-1]["gain"].items()}
            print(name, alpha, number, output.at(alpha).helps, shares, flush=True)
    return records


def summary(found: Sequence[dict[str, object]]) -> str:
    """Gap closed by each method, and PerSyn less each rival with its paired interval over prompts."""
    methods = list(found[0]["gain"])
    cells = sorted({(str(item["pool"]), float(item["alpha"])) for item in found})
    lines = ["| pool | alpha | " + " | ".join(methods) + " |", "|---|---" + "|--:" * len(methods) + "|"]
    shares: dict[str, list[FloatArray]] = {method: [] for method in methods}
    rng = np.random.default_rng(0)
    for pool, alpha in cells:
        own = [item for item in found if (item["pool"], item["alpha"]) == (pool, alpha)]
        gap = np.concatenate([item["gap"] for item in own])
        gain = np.column_stack([np.concatenate([item["gain"][method] for item in own]) for method in methods])
        lines.append(
            f"| {pool} | {alpha:g} | "
            + " | ".join(f"{100 * total / gap.sum():.1f}" for total in gain.sum(axis=0))
            + " |"
        )
        drawn = rng.multinomial(len(gap), np.full(len(gap), 1 / len(gap)), size=N_BOOTSTRAP)
        ratio = 100 * (drawn @ gain) / (drawn @ gap)[:, None]
        for index, method in enumerate(methods):
            shares[method].append(np.append(ratio[:, index], 100 * gain[:, index].sum() / gap.sum()))
    mean = {method: np.mean(values, axis=0) for method, values in shares.items()}
    lines.append("| **mean** | | " + " | ".join(f"**{mean[method][-1]:.1f}**" for method in methods) + " |")
    for method in methods:
        difference = mean["PerSyn"] - mean[method]
        low, high = np.quantile(difference[:-1], [0.025, 0.975])
        lines.append(f"PerSyn less {method}: {difference[-1]:+.1f} [{low:+.1f}, {high:+.1f}]")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

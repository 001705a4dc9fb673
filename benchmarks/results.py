"""The figures of docs/results.md: heads on a frozen backbone on real preference data.

    python benchmarks/results.py personas8   --data personas8.parquet   --out docs/results/personas8.json
    python benchmarks/results.py ukpconvarg1 --data ukpconvarg1.parquet --out docs/results/ukpconvarg1.json
    python benchmarks/results.py pandalm     --data pandalm.parquet     --out docs/results/pandalm.json

Everything is chosen on validation rows; the test rows of a split are read once per model. Hidden states are cached, so
only the first run of a data set costs a pass of the backbone.
"""

import argparse
import os
import platform
import random
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prlhf.cli.output import write_json
from prlhf.core.artefact import versions
from prlhf.core.comparisons import Comparison, Comparisons, RowPolicy, User
from prlhf.core.pretrained import EXAMPLE_MODEL, Backbone, find_model, load_backbone
from prlhf.core.sources import load_comparisons
from prlhf.core.splits import SplitPlan, prompt_text, split
from prlhf.core.tokenize import TextLayout
from prlhf.eval.metrics import accuracies, clustered_mean, mean_over_users, paired_difference, resampling_units
from prlhf.eval.preference import margins
from prlhf.evaluation import evaluate_model
from prlhf.prm.fit import fit_reward_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.reward_model import PersonalizedRewardModel

SEEDS = (0, 1, 2)
LAYOUT = TextLayout(user_text="ignore")
USER_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "individualized": ("individualized", {}),
    "cluster_2": ("cluster", {"clusters": 2}),
    "cluster_4": ("cluster", {"clusters": 4}),
    "cluster_8": ("cluster", {"clusters": 8}),
}


@dataclass
class Pooled:
    """Test rows of several splits, with each model's correctness on them."""

    rows: list[Comparison] = field(default_factory=list)
    correct: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def add(self, rows: Iterable[Comparison], correct: dict[str, np.ndarray]) -> None:
        self.rows += rows
        for model, values in correct.items():
            self.correct[model].append(values)

    def accuracy(self) -> dict[str, Any]:
        """`{model: {"top", "average": {"all"}}}`; intervals draw users or prompts, which splits may share."""
        _, units = self.units()
        users = np.asarray([row.user.id for row in self.rows], dtype=object)
        figures = {}
        for model, parts in self.correct.items():
            values = np.concatenate(parts)
            means = np.asarray([values[users == user].mean() for user in sorted(set(users))])
            figures[model] = {"top": clustered_mean(values, units), "average": {"all": mean_over_users(means)}}
        return figures

    def difference(self, first: str, second: str, users: set[str | None] | None = None) -> dict[str, Any]:
        values = [np.concatenate(self.correct[model]) for model in (first, second)]
        kept = np.asarray([users is None or row.user.id in users for row in self.rows])
        units = np.asarray(self.units()[1], dtype=object)
        return paired_difference(values[0][kept], values[1][kept], units[kept])

    def units(self) -> tuple[str, Any]:
        return resampling_units([r.user.id for r in self.rows], [prompt_text(r.prompt) for r in self.rows])


def fit(
    parts: dict[str, list[Comparison]], whole: Comparisons, backbone: Backbone, **config: Any
) -> PersonalizedRewardModel:
    pooling = config.pop("pooling", "mean")
    train, validation = (whole.subset(parts[name]) for name in ("train", "validation"))
    return fit_reward_model(train, validation, backbone, LAYOUT, pooling, HeadConfig(**config))


def progress(what: str, begun: float) -> None:
    print(f"{time.time() - begun:7.0f} s  {what}", file=sys.stderr, flush=True)


def personas8(whole: Comparisons, backbone: Backbone) -> dict[str, Any]:
    """Unseen prompts: user models, poolings, and accuracy against comparisons per user."""
    begun, pooled, chosen = time.time(), {p: Pooled() for p in ("mean", "last")}, []
    curve: dict[str, Pooled] = defaultdict(Pooled)
    added: dict[str, Pooled] = defaultdict(Pooled)
    for seed in SEEDS:
        parts = split(whole, SplitPlan("prompt", seed=seed))
        for pooling, pool in pooled.items():
            correct: dict[str, np.ndarray] = {}
            for name, (user_model, options) in USER_MODELS.items():
                model = fit(
                    parts, whole, backbone, pooling=pooling, user_model=user_model, user_options=options, seed=seed
                )
                found = evaluate_model(model, parts["test"], name)
                row0 = {f"{name}_row0": found.correct["row0"]}
                correct = {**found.correct, **correct, name: found.correct[name], **row0}
                chosen.append({"seed": seed, "pooling": pooling, "model": name, **brief(model)})
                progress(f"seed {seed}, {pooling}, {name}: {found.correct[name].mean():.4f}", begun)
            correct.pop("row0")
            pool.add(parts["test"], correct)
        for count in (5, 10, 20, 50, 100, 200, 400, None):
            few = {**parts, "train": first_rows(parts["train"], count, seed)}
            found = evaluate_model(fit(few, whole, backbone, seed=seed), parts["test"], "individualized")
            curve[str(count or "all")].add(parts["test"], found.correct)
            progress(f"seed {seed}, {count or 'all'} comparisons per user", begun)
        apart = split(whole, SplitPlan("prompt", unseen_users=0.25, seed=seed))
        onboard(fit(apart, whole, backbone, seed=seed), apart, (5, 20, 100, 400), added, "individualized")
    return {
        "accuracy": pooled["mean"].accuracy(),
        "accuracy_last_pooling": pooled["last"].accuracy(),
        "difference": {
            f"individualized_minus_{other}": pooled["mean"].difference("individualized", other)
            for other in ("uniform", "individualized_row0", "length_rule", "cluster_8", "shuffled_users")
        },
        "validation": chosen,
        "accuracy_by_comparisons_per_user": {count: pool.accuracy() for count, pool in curve.items()},
        "unseen_users": gains(added),
    }


def brief(model: PersonalizedRewardModel) -> dict[str, Any]:
    """What was chosen on validation rows, and how well it did there."""
    kept = ("base_strength", "user_strength", "validation_log_loss")
    accuracy = {name: f["value"] for name, f in model.figures["validation_accuracy"].items()}
    return {**{key: model.figures[key] for key in kept}, "validation_accuracy": accuracy}


def first_rows(rows: list[Comparison], count: int | None, seed: int) -> list[Comparison]:
    """At most `count` rows of each user, drawn at random."""
    if count is None:
        return rows
    order = random.Random(seed).sample(rows, len(rows))
    seen: Counter[str | None] = Counter()
    kept = []
    for row in order:
        seen[row.user.id] += 1
        if seen[row.user.id] <= count:
            kept.append(row)
    return kept


def ukpconvarg1(whole: Comparisons, backbone: Backbone) -> dict[str, Any]:
    """People with 20 rows or more, split by pair; and people never seen, given 5, 10 and 20 comparisons."""
    begun, pooled, chosen = time.time(), Pooled(), []
    added: dict[str, Pooled] = defaultdict(Pooled)
    sizes = Counter(whole.user_ids)
    enough = whole.subset([row for row in whole if sizes[row.user.id] >= 20])
    for seed in SEEDS:
        parts = split(enough, SplitPlan("pair", unseen_users=0.15, seed=seed))
        correct: dict[str, np.ndarray] = {}
        known = {row.user.id for row in parts["train"]}
        rows = [row for row in parts["test"] if row.user.id in known]
        for name, (user_model, options) in {**USER_MODELS, "cluster_16": ("cluster", {"clusters": 16})}.items():
            model = fit(parts, enough, backbone, user_model=user_model, user_options=options, seed=seed)
            found = evaluate_model(model, rows, name)
            correct = {**found.correct, **correct, name: found.correct[name], f"{name}_row0": found.correct["row0"]}
            chosen.append({"seed": seed, "model": name, **brief(model)})
            progress(
                f"seed {seed}, {name}: {found.correct[name].mean():.4f}, row 0 {found.correct['row0'].mean():.4f}",
                begun,
            )
            if name in ("individualized", "cluster_8"):
                onboard(model, parts, (5, 10, 20), added, name)
                progress(f"seed {seed}, {name}: unseen users added", begun)
        correct.pop("row0")
        pooled.add(rows, correct)
    return {
        "users": {"with_20_rows": len(set(enough.user_ids)), "rows": len(enough)},
        "accuracy": pooled.accuracy(),
        "difference": {
            f"{name}_minus_{other}": pooled.difference(name, other)
            for name in ("individualized", "cluster_8")
            for other in ("uniform", f"{name}_row0", "shuffled_users")
        },
        "individualized_minus_row0_by_rows_of_the_user": {
            f"{low} to {high - 1}": pooled.difference(
                "individualized", "individualized_row0", {user for user, n in sizes.items() if low <= n < high}
            )
            for low, high in ((20, 50), (50, 200), (200, 10_000))
        },
        "unseen_users": gains(added),
        "validation": chosen,
    }


def onboard(
    model: PersonalizedRewardModel,
    parts: dict[str, list[Comparison]],
    counts: Iterable[int],
    added: dict[str, Pooled],
    key: str,
) -> None:
    """Adds every unseen user who has enough onboarding rows, from so many of them, and tests on their test rows."""
    mine: dict[str, list[Comparison]] = defaultdict(list)
    for row in parts["onboarding"]:
        mine[row.user.id or ""].append(row)
    users = [user for user, rows in mine.items() if len(rows) >= max(counts)]
    rows = [row for row in parts["test"] if row.user.id in users]
    row0 = accuracies(margins(model.score, rows, [User(None)] * len(rows)))
    for count in counts:
        for user in users:
            model.add_user(user, mine[user][:count], replace=True)
        own = accuracies(margins(model.score, rows, [row.user for row in rows]))
        added[f"{key}_{count}"].add(rows, {"added": own, "row0": row0})


def gains(added: dict[str, Pooled]) -> dict[str, Any]:
    return {
        key: {
            **pool.accuracy(),
            "gain_over_row0": pool.difference("added", "row0"),
            "users": len({r.user.id for r in pool.rows}),
        }
        for key, pool in added.items()
    }


def pandalm(whole: Comparisons, backbone: Backbone) -> dict[str, Any]:
    """A control: three annotators who agree on 95 %, so personalization must not help, and must not hurt."""
    begun, pooled, chosen = time.time(), Pooled(), []
    for fold in range(1, 6):
        parts = split(whole, SplitPlan("prompt", fold=fold, folds=5))
        correct: dict[str, np.ndarray] = {}
        for name in ("individualized", "cluster_2"):
            user_model, options = USER_MODELS[name]
            model = fit(parts, whole, backbone, user_model=user_model, user_options=options)
            found = evaluate_model(model, parts["test"], name)
            correct = {**found.correct, **correct, name: found.correct[name], f"{name}_row0": found.correct["row0"]}
            chosen.append({"fold": fold, "model": name, **brief(model)})
            progress(f"fold {fold}, {name}: {found.correct[name].mean():.4f}", begun)
        correct.pop("row0")
        pooled.add(parts["test"], correct)
    return {
        "accuracy": pooled.accuracy(),
        "difference": {f"{n}_minus_row0": pooled.difference(n, f"{n}_row0") for n in ("individualized", "cluster_2")},
        "left_out": whole.dropped_counts,
        "validation": chosen,
    }


DATA_SETS: dict[str, Callable[[Comparisons, Backbone], dict[str, Any]]] = {
    "personas8": personas8,
    "ukpconvarg1": ukpconvarg1,
    "pandalm": pandalm,
}


def made_by(script: str, *words: str) -> dict[str, Any]:
    """What every file of figures begins with: the command, the machine, the versions, the model."""
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *words]),
        "machine": f"{torch.cpu.get_capabilities().get('cpu_name')}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions(),
        "model": find_model(EXAMPLE_MODEL).label,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=DATA_SETS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    begun = time.time()
    # pandalm holds empty responses; they are left out and counted.
    whole = load_comparisons(
        arguments.data, policy=RowPolicy(max_bad_rows=200 if arguments.data_set == "pandalm" else 0)
    )
    backbone = load_backbone(find_model(EXAMPLE_MODEL))
    shown = replace(whole, source=Path(arguments.data).name)
    figures = DATA_SETS[arguments.data_set](shown, backbone)
    made = {
        **made_by("results.py", arguments.data_set, "--data", shown.source, "--out", str(arguments.out)),
        "model": f"{backbone.source.label}, {str(backbone.dtype).removeprefix('torch.')}",
        "seconds": round(time.time() - begun, 1),
    }
    write_json({**made, **figures}, arguments.out)


if __name__ == "__main__":
    main()

"""The figures of docs/results.md on reward models that are trained together with their backbone.

    python benchmarks/joint.py simulated --work runs/joint --out docs/results/joint-simulated.json
    python benchmarks/joint.py stated --work runs/joint --out docs/results/joint-stated.json
    python benchmarks/joint.py personas8 --work runs/joint --data F.parquet --out docs/results/joint-personas8.json
    python benchmarks/joint.py prefeval --work runs/joint --data F.parquet --out docs/results/joint-prefeval.json

Each arm is a run in `--work`; arms that are there are not trained again, an interrupted one goes on from its newest
complete checkpoint. `--arms a b` trains and compares these alone. The step of each arm is chosen on validation rows.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from results import first_rows, made_by

from prlhf.cli.output import write_json
from prlhf.core.artefact import MANIFEST
from prlhf.core.comparisons import Comparison, Comparisons, User
from prlhf.core.pretrained import EXAMPLE_MODEL, find_model, load_backbone
from prlhf.core.sources import load_comparisons
from prlhf.core.sources.simulated import POOL, SimulationPlan, simulated_parts
from prlhf.core.splits import SplitPlan, prompt_text, split
from prlhf.core.tokenize import TextLayout
from prlhf.eval.metrics import accuracies, paired_difference
from prlhf.eval.preference import margins
from prlhf.evaluation import evaluate_model
from prlhf.prm.fit import fit_reward_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.joint import train_reward_model
from prlhf.prm.reward_model import PersonalizedRewardModel
from prlhf.prm.trainer import PersonalizedRewardConfig

SEED = 0
Parts = dict[str, list[Comparison]]


@dataclass
class Setting:
    """Rows of an experiment, how they are read, and its arms: options of `PersonalizedRewardConfig`, {} for heads."""

    parts: Parts
    layout: TextLayout
    arms: dict[str, dict[str, Any]]


def simulated(_: str | None) -> Setting:
    """Two tastes, 12 seen and 4 unseen users: LoRA must learn what frozen states tell only in part."""
    plan = SimulationPlan(users=16, comparisons=400, properties=("length", "exclamation"), seed=SEED)
    _, parts = simulated_parts(POOL, plan, SplitPlan("prompt", 0.1, 0.25, 0.25, SEED))
    parts["validation"] = first_rows(parts["validation"], 12, SEED)
    linear = {"num_train_epochs": 4, "group_by_prompt": True, "per_device_train_batch_size": 96}
    arms: dict[str, dict[str, Any]] = {
        "frozen_heads": {},
        "linear_head": linear,
        "soft_prompt": {**SOFT, **STEADY, "num_train_epochs": 2, "eval_steps": 0.125, "save_steps": 0.125},
        "uniform": {**linear, "user_model": "uniform", "num_train_epochs": 2},
    }
    return Setting(parts, TextLayout("none", user_text="ignore"), arms)


def stated(_: str | None) -> Setting:
    """Pairs of users with opposite tastes, told in plain words, judge the same responses; nobody has a vector."""
    names = ("length", "exclamation")
    plan = SimulationPlan(users=40, comparisons=100, properties=names, stated=True, mirrored=True, seed=SEED)
    _, parts = simulated_parts(POOL, plan, SplitPlan("prompt", 0.1, 0.25, 0.25, SEED))
    arms = {
        "reads_text": {"user_model": "uniform", "num_train_epochs": 3, "train_sampling_strategy": "group_by_length"}
    }
    return Setting(parts, TextLayout("none"), arms)


def personas8(data: str | None) -> Setting:
    """Sixty comparisons of each of eight personas; heads on the frozen model see the same rows."""
    whole = load_comparisons(data or "")
    parts = split(whole, SplitPlan("prompt", seed=SEED))
    few = {"train": first_rows(parts["train"], 60, SEED), "validation": first_rows(parts["validation"], 12, SEED)}
    few["test"] = first_rows(parts["test"], 40, SEED)
    common = {"num_train_epochs": 2, "train_sampling_strategy": "group_by_length"}
    arms: dict[str, dict[str, Any]] = {
        "frozen_heads": {},
        "linear_head": common,
        "soft_prompt": {**SOFT, **common},
        "soft_prompt_cluster": {**SOFT, **common, "user_model": "cluster", "user_clusters": 4},
    }
    return Setting(few, TextLayout(user_text="ignore", max_length=256), arms)


def prefeval(data: str | None) -> Setting:
    """A stated preference decides which option fits; text-blind models get far by the options' wording alone."""
    parts = split(load_comparisons(data or ""), SplitPlan("prompt", unseen_users=0.25, seed=SEED))
    arms = {
        "reads_text": {"user_model": "uniform", "num_train_epochs": 1, "train_sampling_strategy": "group_by_length"}
    }
    return Setting(parts, TextLayout("none"), arms)


SOFT = {
    "aggregator": "soft_prompt",
    "user_tokens": 10,
    "user_loss": "sampled",
    "user_learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "train_sampling_strategy": "group_by_length",
}
# With more comparisons than a few: smaller steps of larger batches (docs/results.md).
STEADY = {"learning_rate": 5e-4, "user_learning_rate": 3e-3, "per_device_train_batch_size": 16}
SETTINGS: dict[str, Callable[[str | None], Setting]] = {
    "simulated": simulated,
    "stated": stated,
    "personas8": personas8,
    "prefeval": prefeval,
}


def train(setting: Setting, arm: str, run: Path) -> PersonalizedRewardModel:
    """The arm's model, trained unless its run is complete."""
    if (run / MANIFEST).exists():
        return PersonalizedRewardModel.from_pretrained(run, show=True)
    rows = [Comparisons(setting.parts[name], f"{run.parent.name}/{name}") for name in ("train", "validation")]
    backbone = load_backbone(find_model(EXAMPLE_MODEL))
    options, begun = setting.arms[arm], time.time()
    print(f"{arm}: {len(rows[0]):,} comparisons", file=sys.stderr, flush=True)
    if not options:
        model = fit_reward_model(*rows, backbone, setting.layout, "mean", HeadConfig(), show=True)
        model.figures |= {"training_seconds": round(time.time() - begun, 1), "trainable_parameters": None}
    else:
        model = train_reward_model(
            *rows, backbone, setting.layout, config(run, options), "lora", lora(options), show=True
        )
    model.save_pretrained(run)
    return model


def config(run: Path, options: dict[str, Any]) -> PersonalizedRewardConfig:
    """What all arms share; on a CPU there is memory enough to keep activations."""
    shared = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 5,
        "eval_steps": 0.25,
        "save_steps": 0.25,
        "gradient_checkpointing": False,
        "compile_layers": True,
        "resume_from_checkpoint": True,
        "seed": SEED,
    }
    return PersonalizedRewardConfig(output_dir=str(run), **{**shared, **options})  # type: ignore[arg-type]


def lora(options: dict[str, Any]) -> LoraConfig:
    """LoRA on all linear layers; with the linear head on those of the upper half, below which nothing is run backward.

    A soft prompt's gradient has to come down to the input whatever is trained above it.
    """
    upper = None if options.get("aggregator") == "soft_prompt" else list(range(15, 30))
    return LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEAR), layers_to_transform=upper)


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def figures(name: str, setting: Setting, models: dict[str, PersonalizedRewardModel]) -> dict[str, Any]:
    rows = setting.parts["test"]
    costs = {arm: {key: model.figures.get(key) for key in COSTS} for arm, model in models.items()}
    made = {"rows": {part: len(of) for part, of in setting.parts.items()}, "costs": costs}
    if name in ("stated", "prefeval"):
        return {**made, **by_text(models["reads_text"], setting, name)}
    found = {arm: evaluate_model(model, rows, arm, shuffles=1) for arm, model in models.items()}
    units = np.asarray([prompt_text(row.prompt) for row in rows], dtype=object)
    seen = next(iter(found.values())).seen
    accuracy = {
        arm: {**f.figures["accuracy"][arm], "ceiling": f.figures["accuracy"].get("ceiling")} for arm, f in found.items()
    }
    correct = {arm: f.correct[arm] for arm, f in found.items()}
    row0 = {arm: f.correct["row0"] for arm, f in found.items() if "row0" in f.correct}
    baseline = "frozen_heads"
    out = {
        **made,
        "accuracy": accuracy,
        "difference_to_frozen_heads_seen": {
            arm: paired_difference(values[seen], correct[baseline][seen], units[seen])
            for arm, values in correct.items()
            if arm != baseline
        },
        "minus_own_row0_seen": {
            arm: paired_difference(correct[arm][seen], values[seen], units[seen]) for arm, values in row0.items()
        },
        "baselines": {n: f for n, f in found[baseline].figures["accuracy"].items() if n != baseline},
    }
    if "uniform" in correct:
        out["row0_minus_uniform_unseen"] = {
            arm: paired_difference(values[~seen], correct["uniform"][~seen], units[~seen])
            for arm, values in row0.items()
            if (~seen).any()
        }
    return out


COSTS = ("training_seconds", "peak_memory_gb", "trainable_parameters", "steps", "best_step", "validation_accuracy")


def by_text(model: PersonalizedRewardModel, setting: Setting, name: str) -> dict[str, Any]:
    """Unseen users: their own text, somebody else's, none; beside a model that never reads any."""
    known = {row.user.id for row in setting.parts["train"]}
    rows = [row for row in setting.parts["test"] if row.user.id not in known]
    texts = sorted({row.user.text for row in rows})
    random.Random(SEED).shuffle(texts)
    other = dict(zip(texts, texts[1:] + texts[:1], strict=True))
    asked = {
        "real": [row.user for row in rows],
        "shuffled": [User(None, other[row.user.text]) for row in rows],
        "none": [User(None)] * len(rows),
    }
    correct = {how: accuracies(margins(model.score, rows, users)) for how, users in asked.items()}
    blind = train(
        replace(setting, layout=replace(setting.layout, user_text="ignore"), arms={"blind": {}}),
        "blind",
        (model.folder or Path()).parent / "text_blind",
    )
    correct["text_blind_heads"] = accuracies(margins(blind.score, rows, [User(None)] * len(rows)))
    units = np.asarray([prompt_text(row.prompt) for row in rows], dtype=object)
    new = np.asarray([row.user.text not in {r.user.text for r in setting.parts["train"]} for row in rows])
    halves = {"all": np.ones(len(rows), dtype=bool), "text_never_seen": new}
    out: dict[str, Any] = {
        "unseen_users": {
            "users": len({r.user.id for r in rows}),
            "rows": len(rows),
            "rows_with_new_text": int(new.sum()),
        }
    }
    for half, which in halves.items():
        zero = np.zeros(int(which.sum()))
        out[half] = {
            "accuracy": {how: paired_difference(c[which], zero, units[which]) for how, c in correct.items()},
            "real_minus": {
                how: paired_difference(correct["real"][which], c[which], units[which])
                for how, c in correct.items()
                if how != "real"
            },
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--data")
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting](arguments.data)
    models = {
        arm: train(setting, arm, arguments.work / arguments.setting / arm) for arm in arguments.arms or setting.arms
    }
    if not arguments.out:
        return
    chosen = ["--arms", *arguments.arms] if arguments.arms else []
    made = made_by("joint.py", arguments.setting, *chosen, "--out", str(arguments.out))
    write_json({**made, **figures(arguments.setting, setting, models)}, arguments.out)


if __name__ == "__main__":
    main()

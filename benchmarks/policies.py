"""The figures of docs/results.md on personalized policies.

    python benchmarks/policies.py conflict --work runs/policies --out docs/results/conflict.json
    python benchmarks/policies.py personas8 --work runs/policies --data F.parquet --out docs/results/policy.json

`conflict` is the paper's controlled experiment (5.1, C.3, C.4), small: seven simulated users always prefer the longer
response, three the shorter. Each arm and seed is a run in `--work`; what is there is not trained again, an interrupted
arm goes on from its newest complete checkpoint, texts that were drawn are kept. `--arms` and `--seeds` choose; some
arms are only run when they are named. The step of each arm is chosen on validation rows.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from joint import personas8 as persona_rows
from peft import LoraConfig
from results import first_rows, made_by

from prlhf.cli.output import write_json
from prlhf.core.artefact import MANIFEST
from prlhf.core.comparisons import Comparison, Comparisons, Prompt, User
from prlhf.core.generation import GenerateRequest, LocalGenerator
from prlhf.core.pretrained import EXAMPLE_MODEL, find_model, load_language_model
from prlhf.core.sample import sample
from prlhf.core.sampling import Sampling
from prlhf.core.sources.simulated import POOL, SimulationPlan, simulated_parts
from prlhf.core.splits import SplitPlan, prompt_text
from prlhf.core.store import JsonlStore
from prlhf.core.tokenize import RowTokenizer, TextLayout
from prlhf.eval.metrics import clustered_mean, paired_difference
from prlhf.evaluation import evaluate_model
from prlhf.policy.policy import PersonalizedPolicy
from prlhf.policy.train import train_policy
from prlhf.policy.trainer import PersonalizedDPOConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from sft import finetune

CAP = 96  # new tokens
PROMPTS = 24  # held-out prompts that are answered for every user
Parts = dict[str, list[Comparison]]


@dataclass
class Setting:
    """Rows of an experiment, how they are read, and what every arm has in common.

    Attributes:
        finetuned: whether training starts from a model that was fine-tuned on the training rows' responses.
        writes: whether texts are drawn.
    """

    parts: Parts
    layout: TextLayout
    options: dict[str, Any] = field(default_factory=dict)
    finetuned: bool = False
    writes: bool = False


def conflict(_: str | None, seed: int, users: int = 10) -> Setting:
    """`users` seen users, seven tenths of whom prefer longer responses, and as many unseen ones."""
    plan = SimulationPlan(users=2 * users, comparisons=160, properties=("length",), strength=20, seed=seed)
    world, parts = simulated_parts(POOL, plan, SplitPlan("prompt", 0.1, 0.25, 0.0, seed))
    groups: dict[str, list[str]] = {"majority": [], "minority": []}
    for name, user in world.users.items():
        groups[user.group].append(name)
    seen = {name for mine in groups.values() for name in mine[: len(mine) // 2]}
    few = {"train": 80, "validation": 8}
    kept = {name: first_rows([row for row in parts[name] if row.user.id in seen], n, seed) for name, n in few.items()}
    kept["test"] = first_rows(parts["test"], 20, seed)
    return Setting(kept, TextLayout("none", user_text="ignore"), {"num_train_epochs": 2}, True, True)


def personas8(data: str | None, seed: int) -> Setting:
    """The rows of the reward models' table (benchmarks/joint.py)."""
    made = persona_rows(data)
    return Setting(made.parts, made.layout, {"num_train_epochs": 2, "per_device_train_batch_size": 4})


SETTINGS = {"conflict": conflict, "personas8": personas8}
PERSONAL: dict[str, Any] = {"user_tokens": 10, "user_loss": "sampled"}
ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {"user_model": "uniform", "user_tokens": 0, "user_loss_alpha": 1.0},
    "individualized": PERSONAL,
    "cluster": {**PERSONAL, "user_model": "cluster", "user_clusters": 5},
    "alpha1": {"user_tokens": 10, "user_loss_alpha": 1.0},
    "one_vector": {**PERSONAL, "user_tokens": 1},
    "ipo": {**PERSONAL, "loss_type": ["ipo"], "loss_weights": [1.0]},
    "ipo_sum": {**PERSONAL, "loss_type": ["ipo_sum", "sft"], "beta": 0.05},
    "dpo_without_sft": {**PERSONAL, "loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "no_e0": {**PERSONAL, "user_shared": False},
    "two_clusters": {**PERSONAL, "user_model": "cluster", "user_clusters": 2},
}
STEP0 = {**PERSONAL, "max_steps": 1, "learning_rate": 0.0, "user_learning_rate": 0.0, "eval_strategy": "no"}
STEP0 |= {"save_strategy": "no", "load_best_model_at_end": False}
MAIN = {
    "conflict": ("vanilla", "individualized", "cluster", "alpha1", "one_vector", "ipo", "ipo_sum"),
    "personas8": ("vanilla", "individualized"),
}
SEEDS_OF_ALL = ("vanilla", "individualized", "cluster")  # the other arms run with the first seed alone


def config(run: Path, seed: int, options: dict[str, Any]) -> PersonalizedDPOConfig:
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 5e-4,
        "user_learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2],
        "beta": 0.1,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 5,
        "eval_steps": 0.25,
        "save_steps": 0.25,
        "gradient_checkpointing": False,
        "compile_layers": True,
        "resume_from_checkpoint": True,
        "seed": seed,
    }
    return PersonalizedDPOConfig(output_dir=str(run), **{**shared, **options})


def trained(setting: Setting, start: str, run: Path, seed: int, options: dict[str, Any]) -> PersonalizedPolicy:
    """The arm's policy, trained unless its run is complete."""
    if (run / MANIFEST).exists():
        return PersonalizedPolicy.from_pretrained(run, show=True)
    rows = [Comparisons(setting.parts[name], f"{run.parent.name}/{name}") for name in ("train", "validation")]
    print(f"{run}: {len(rows[0]):,} comparisons", file=sys.stderr, flush=True)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    made = config(run, seed, {**setting.options, **options})
    policy = train_policy(*rows, load_language_model(find_model(start)), setting.layout, made, "lora", lora, show=True)
    policy.save_pretrained(run)
    return policy


def start_of(setting: Setting, folder: Path) -> str:
    """The model that all arms of a seed start from."""
    if not setting.finetuned:
        return EXAMPLE_MODEL
    if not (folder / "done").exists():
        finetune(Comparisons(setting.parts["train"], "train"), folder, setting.layout, compile_layers=True)
        (folder / "done").touch()
    return str(folder)


@dataclass
class Texts:
    """Drawn texts as records of the store."""

    records: list[dict[str, Any]]

    def of(self, users: Sequence[str | None]) -> "Texts":
        return Texts([record for record in self.records if record["user_id"] in users])

    def figures(self) -> dict[str, Any]:
        prompts = [str(record["prompt"]) for record in self.records]
        measured = {
            "tokens": ([r["tokens"] for r in self.records], (0.0, None)),
            "words": ([len(r["text"].split()) for r in self.records], (0.0, None)),
            "ended": ([r["ended"] for r in self.records], (0.0, 1.0)),
            "empty": ([not r["text"] for r in self.records], (0.0, 1.0)),
        }
        return {
            name: clustered_mean(np.asarray(values, dtype=np.float64), prompts, bounds=bounds)
            for name, (values, bounds) in measured.items()
        } | {"median_tokens": float(np.median([r["tokens"] for r in self.records])) if self.records else None}


def write(generator: LocalGenerator, people: list[User], prompts: list[Prompt], store: Path, name: Any) -> Texts:
    """One text of every prompt for every user; those in the store are not drawn again."""
    sampling = Sampling(CAP, temperature=0.7)
    requests = [GenerateRequest(prompt, user=user, sampling=sampling) for prompt in prompts for user in people]
    kept = JsonlStore(store)
    sample(generator, requests, kept, name, show=True)
    return Texts(list(kept.values()))


def measure(policy: PersonalizedPolicy, setting: Setting, arm: str, run: Path) -> dict[str, Any]:
    """Accuracies, costs, curves, and texts of one arm and seed."""
    group = "group" if setting.writes else None
    found = evaluate_model(policy, setting.parts["test"], arm, group, shuffles=1)
    logs = [entry for entry in policy.figures["log"] if "eval_loss" in entry]
    made: dict[str, Any] = {
        "accuracy": found.figures["accuracy"][arm],
        "baselines": {name: f for name, f in found.figures["accuracy"].items() if name != arm},
        "costs": {key: policy.figures.get(key) for key in COSTS},
        "curve": [{key: entry.get(key) for key in CURVE} for entry in logs],
        "correct": found.correct[arm],
        "correct_row0": found.correct["row0"],
    }
    if setting.writes:
        people = [User(user) for user in policy.users.ids] + [User(None)]
        texts = write(policy.generator(), people, asked(setting), run / "texts.jsonl", policy.backbone.fingerprint)
        made["texts"] = texts
    return made


CURVE = ("step", "eval_loss", "eval_rewards/accuracies", "eval_generic/rewards/accuracies", "eval_accuracy_average")
COSTS = ("training_seconds", "peak_memory_gb", "trainable_parameters", "steps", "best_step", "validation_accuracy")


def asked(setting: Setting) -> list[Prompt]:
    prompts = {prompt_text(row.prompt): row.prompt for row in setting.parts["test"]}
    return list(prompts.values())[:PROMPTS]


def groups_of(setting: Setting) -> dict[str, list[str | None]]:
    """Seen users by group, and nobody as `row0`."""
    rows = {row.user.id: row.extra["group"] for row in setting.parts["train"]}
    return {g: [u for u in rows if rows[u] == g] for g in ("majority", "minority")} | {"row0": [None]}


def written(setting: Setting, texts: Texts) -> dict[str, Any]:
    """Lengths and shares of an arm's texts by group and by user, and some of the texts."""
    groups = groups_of(setting)
    users = [user for mine in groups.values() for user in mine]
    shown = {str(record["prompt"]) for record in texts.records[:4]}
    return {
        **{group: texts.of(mine).figures() for group, mine in groups.items()},
        "per_user": {user or "row0": texts.of([user]).figures() for user in users},
        "examples": [
            {key: record[key] for key in ("user_id", "prompt", "text", "tokens", "ended")}
            for record in texts.records
            if str(record["prompt"]) in shown
        ],
    }


def one_seed(name: str, data: str | None, work: Path, arms: Sequence[str], seed: int) -> dict[str, Any]:
    setting = SETTINGS[name](data, seed)
    start = start_of(setting, work / "start")
    made: dict[str, Any] = {"rows": {part: len(of) for part, of in setting.parts.items()}, "arms": {}}
    runs = {"step0": STEP0, **{arm: ARMS[arm] for arm in arms}}
    for arm, options in runs.items():
        begun = time.time()
        policy = trained(setting, start, work / arm, seed, options)
        made["arms"][arm] = measure(policy, setting, arm, work / arm)
        print(f"{work / arm}: {time.time() - begun:.0f} s", file=sys.stderr, flush=True)
    if setting.writes:
        model = load_language_model(find_model(start))
        generator = LocalGenerator(model.model, RowTokenizer(model.tokenizer, setting.layout))
        made["start"] = write(generator, [User(None)], asked(setting), work / "start.jsonl", model.fingerprint)
        for found in made["arms"].values():
            found["written"] = written(setting, found["texts"])
    made["setting"] = setting
    return made


def conflict_figures(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Lengths and shares over all seeds: the start, vanilla DPO, and the individualized arm by group."""
    pooled: dict[str, list[dict[str, Any]]] = {"start": [], "vanilla": [], "majority": [], "minority": [], "row0": []}
    for made in seeds:
        pooled["start"] += made["start"].records
        pooled["vanilla"] += made["arms"]["vanilla"]["texts"].of([None]).records
        for group, users in groups_of(made["setting"]).items():
            pooled[group] += made["arms"]["individualized"]["texts"].of(users).records
    found = {name: Texts(records).figures() for name, records in pooled.items()}
    capped = {name: 1 - figures["ended"]["value"] for name, figures in found.items()}
    return {
        "length": {name: figures["tokens"] for name, figures in found.items()},
        "words": {name: figures["words"] for name, figures in found.items()},
        "median_tokens": {name: figures["median_tokens"] for name, figures in found.items()},
        "shares": {
            name: {"empty": figures["empty"], "ended": figures["ended"], "capped": capped[name]}
            for name, figures in found.items()
        },
    }


def plain(made: dict[str, Any]) -> dict[str, Any]:
    """One seed's figures without what they were made of; differences to vanilla DPO on the same rows."""
    rows = made["setting"].parts["test"]
    units = [prompt_text(row.prompt) for row in rows]
    known = {row.user.id for row in made["setting"].parts["train"]}
    seen = np.asarray([row.user.id in known for row in rows])
    base = made["arms"]["vanilla"]["correct"] if "vanilla" in made["arms"] else None
    arms = {}
    for arm, found in made["arms"].items():
        kept = {key: value for key, value in found.items() if key not in ("texts", "correct", "correct_row0")}
        if base is not None and arm != "vanilla":
            of_seen = np.asarray(units, dtype=object)[seen]
            kept["minus_vanilla_seen"] = paired_difference(found["correct"][seen], base[seen], of_seen)
        arms[arm] = kept
    return {"rows": made["rows"], "arms": arms}


def over_seeds(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each arm, mean over the seeds that it was run with, and each of these."""
    found: dict[str, Any] = {}
    for arm in seeds[0]["arms"]:
        values = [made["arms"][arm]["accuracy"]["top"]["value"] for made in seeds if arm in made["arms"]]
        found[arm] = {"top": {"mean": mean(values), "seeds": values}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--data")
    parser.add_argument("--arms", nargs="*", choices=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    arms = given.arms or MAIN[given.setting]
    seeds = []
    for seed in given.seeds:
        some = arms if seed == given.seeds[0] else [arm for arm in arms if arm in SEEDS_OF_ALL]
        seeds.append(one_seed(given.setting, given.data, given.work / f"{given.setting}-{seed}", some, seed))
    if not given.out:
        return
    write_json({**facts(given), **figures(given.setting, seeds)}, given.out)


def figures(name: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = conflict_figures(seeds) if name == "conflict" else {}
    return {**lengths, "accuracy_over_seeds": over_seeds(seeds), "seeds": [plain(made) for made in seeds]}


def facts(given: argparse.Namespace) -> dict[str, Any]:
    chosen = ["--arms", *given.arms] if given.arms else []
    words = [given.setting, *chosen, "--seeds", *map(str, given.seeds), "--out", str(given.out)]
    return made_by("policies.py", *words)


if __name__ == "__main__":
    main()

"""Seconds per training step with and without `--compile-layers`, in turn, on the same batches.

    python benchmarks/compiled.py --out docs/results/compiled.json

A soft prompt with LoRA on the example model, on simulated users' comparisons. The first two steps, in which layers are
compiled, are told apart.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import joint
import torch
from results import made_by
from transformers import TrainerCallback

from prlhf.cli.output import write_json
from prlhf.core.comparisons import Comparisons
from prlhf.core.pretrained import EXAMPLE_MODEL, find_model, load_backbone
from prlhf.prm.joint import train_reward_model

STEPS, FIRST = 8, 2


class Timer(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)


def steps(setting: joint.Setting, compile_layers: bool) -> list[float]:
    few = {"max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    options = {**joint.SOFT, **few, "compile_layers": compile_layers}
    rows = [Comparisons(setting.parts["train"], "train"), Comparisons(setting.parts["validation"][:16], "validation")]
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        config = joint.config(Path(folder), options)
        backbone = load_backbone(find_model(EXAMPLE_MODEL))
        train_reward_model(*rows, backbone, setting.layout, config, "lora", joint.lora(options), callbacks=[timer])
    return timer.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    setting, found = joint.simulated(None), {"plain": [], "compiled": []}  # type: ignore[var-annotated]
    for _ in range(given.repeats):
        for name, seconds in found.items():
            seconds.append(steps(setting, name == "compiled"))
            print(name, [round(s, 2) for s in seconds[-1]], file=sys.stderr, flush=True)
    later = {name: median(s for run in runs for s in run[FIRST:]) for name, runs in found.items()}
    write_json(
        {
            **made_by("compiled.py", "--out", str(given.out)),
            "threads": torch.get_num_threads(),
            "first_steps_seconds": {name: median(sum(run[:FIRST]) for run in runs) for name, runs in found.items()},
            "seconds_per_step": later,
            "ratio": later["plain"] / later["compiled"],
            "runs": found,
        },
        given.out,
    )


if __name__ == "__main__":
    main()

"""The figures of docs/demo.md: the demo with several seeds, and the seen users of all of them by main taste.

python benchmarks/demo.py --out docs/results/demo.json
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.cli.output import write_json
from prlhf.core.pretrained import EXAMPLE_MODEL
from prlhf.demo import Outcome, run
from prlhf.eval.metrics import mean_over_users

MODELS = ("individualized", "row0", "length_rule", "ceiling")


def add_users(found: Outcome, by_taste: dict[str, dict[str, list[float]]]) -> None:
    """Accuracy of every model for each seen user, under the user's main taste."""
    seen = found.evaluation.users[found.evaluation.users["known"]]
    for user in seen.to_dict("records"):
        taste = found.learned.world.users[user["user_id"]].taste
        for model in MODELS:
            by_taste[taste][model].append(user[model])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EXAMPLE_MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    by_taste: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seeds: dict[str, Any] = {}
    for seed in arguments.seeds:
        found = run(arguments.runs / f"demo{seed}", arguments.model, seed)
        seeds[str(seed)] = found.results()
        add_users(found, by_taste)
    tastes = {
        taste: {model: mean_over_users(np.asarray(values)) for model, values in models.items()}
        for taste, models in sorted(by_taste.items())
    }
    write_json({"seeds": seeds, "average_by_taste": tastes}, arguments.out)


if __name__ == "__main__":
    main()

"""Training speed of users' linear heads on cached features: comparisons per second and core.

    python benchmarks/heads.py --json docs/results/heads-speed.json

Steps of the individualized and the cluster heads at several numbers of users, beside the same loss under torch's own
optimizers through autograd. All sides take turns in one run, in random order, on one thread, and process CPU time is
counted, so that other work on the machine touches all of them alike. Figures are medians with their range over turns.
"""

import argparse
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from prlhf.cli.output import table, write_json
from prlhf.core.users import make_user_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.head_steps import make_steps

ROWS = 65536  # 151 MB at D = 576: as in training, rows of features come from main memory and not from a cache
SIZES = (1_000, 100_000, 1_000_000)
Step = Callable[[Tensor, Tensor], None]


@dataclass
class Side:
    """One way of training at one number of users; `speeds` holds comparisons/s of each turn."""

    method: str
    users: int
    step: Step
    turns: int
    speeds: list[float] = field(default_factory=list)


def library_step(name: str, users: int, width: int) -> Step:
    model = make_user_model(name, users, 0.02 * torch.randn(width))
    if name == "individualized":
        # As in the middle of training: pages of zeros that nothing has written to yet are not real memory.
        model.offsets.weight.data[1:].normal_(0, 0.01)
    counts, config = torch.full((users,), 16), HeadConfig(user_model=name)
    return make_steps(model, counts, config, base=1.0, strength=10.0, start=torch.zeros(width)).step


def torch_step(users: int, width: int, sparse: bool) -> Step:
    """The individualized loss (without its penalties) through autograd, offsets under SparseAdam or Adam."""
    table = torch.nn.Embedding(users, width, sparse=sparse, _weight=0.01 * torch.randn(users, width))
    base = torch.nn.Parameter(0.02 * torch.randn(width))
    kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
    optimizers = [kind([table.weight], lr=1e-3), torch.optim.Adam([base], lr=1e-3)]

    def step(z: Tensor, rows: Tensor) -> None:
        with torch.enable_grad():
            generic = z @ base
            own = generic + (table(rows) * z).sum(1)
            (0.5 * softplus(-own) + 0.5 * softplus(-generic)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def all_sides(width: int, turns: int) -> Iterator[Side]:
    for users in SIZES:
        for name in ("individualized", "cluster"):
            yield Side(name, users, library_step(name, users, width), turns)
    for users in SIZES[:2]:  # with a million users, Adam's two moments and a dense gradient would take 9 GB
        yield Side("SparseAdam", users, torch_step(users, width, sparse=True), max(turns // 4, 3))
        yield Side("dense Adam", users, torch_step(users, width, sparse=False), max(turns // 8, 3))
    yield Side("reading the features alone", 0, lambda z, rows: None, turns)


@torch.no_grad()
def turn(side: Side, z: Tensor, batch: int, steps: int) -> float:
    """Comparisons/s over a few steps in a row, after one that brings back to the caches what training keeps there."""
    users = torch.randint(max(side.users, 1), (len(z),))
    for number, index in enumerate(torch.randint(len(z), (steps + 1, batch))):
        if number == 1:
            begun = time.process_time()
        side.step(z.index_select(0, index), users.index_select(0, index))  # gathered as in `heads.train`
    return steps * batch / (time.process_time() - begun)


def measure(sides: list[Side], z: Tensor, batch: int, steps: int) -> None:
    for number in range(-1, max(side.turns for side in sides)):
        # Slow sides take fewer turns; turn -1 is thrown away.
        for side in random.sample(sides, len(sides)):
            if number < side.turns:
                few = 1 if side.method == "dense Adam" else steps
                speed = turn(side, z, batch, few)
                side.speeds += [speed] if number >= 0 else []


def figure(values: list[float]) -> dict[str, float]:
    return {"value": median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratios(sides: list[Side]) -> dict[str, dict[str, dict[str, float]]]:
    """Speeds over the same method's with the fewest users, and over torch's optimizers', turn by turn."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    by_name = {(side.method, side.users): side for side in sides}
    for method in ("individualized", "cluster"):
        for other, users in [(method, SIZES[0]), *((m, None) for m in ("SparseAdam", "dense Adam"))]:
            for size in SIZES:
                mine, theirs = by_name[method, size], by_name.get((other, users or size))
                if theirs and mine is not theirs:
                    name = f"{method} / {other}" + (f" with {users:,}" if users else "")
                    found.setdefault(name, {})[str(size)] = ratio(mine, theirs)
    return found


def ratio(mine: Side, theirs: Side) -> dict[str, float]:
    # Slow sides take the first turns only.
    return figure([own / other for own, other in zip(mine.speeds, theirs.speeds, strict=False)])


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(sides: list[Side], relative: dict[str, Any]) -> None:
    def text(f: dict[str, float], form: str) -> str:
        return f"{f['value']:{form}} ({f['low']:{form}} to {f['high']:{form}}, n={f['n']})"

    rows = [(s.method, f"{s.users:,}" if s.users else "any", text(figure(s.speeds), ",.0f")) for s in sides]
    table("Comparisons/s/core", ("method", "users", "median (range)"), rows)
    rows = [(name, f"{int(users):,}", text(f, ".3f")) for name, sizes in relative.items() for users, f in sizes.items()]
    table("Ratios of speeds", ("ratio", "users", "median (range)"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--width", type=int, default=576, help="D, the backbone's hidden size")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a turn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    sides = list(all_sides(given.width, given.turns))
    measure(sides, torch.randn(ROWS, given.width), given.batch, given.steps)
    relative = ratios(sides)
    show(sides, relative)
    if given.json:
        speeds: dict[str, Any] = {}
        for side in sides:
            speeds.setdefault(side.method, {})[str(side.users or "any")] = figure(side.speeds)
        settings = {"D": given.width, "batch": given.batch, "steps_per_turn": given.steps, "threads": 1}
        made = {"cpu": cpu(), "torch": torch.__version__, "python": platform.python_version(), **settings}
        write_json({**made, "comparisons_per_second_per_core": speeds, "ratios": relative}, given.json)


if __name__ == "__main__":
    main()

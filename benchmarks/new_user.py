"""Time to fit a new user from a few comparisons, everything else frozen.

    python benchmarks/new_user.py --json docs/results/new-user-speed.json

Milliseconds per user, one at a time, with a prior of rank 64; the same problem under an isotropic prior beside
scikit-learn's LogisticRegression, with the largest distance of both from a tightly converged optimum; and users per
second of a batch. All sides take turns in one run, on one thread, and process CPU time is counted. Figures are medians
with their range over turns.
"""

import argparse
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from prlhf.cli.output import table, write_json
from prlhf.prm.new_user import MAX_RANK, OffsetPrior, fit_offsets

WIDTHS, COUNTS = (576, 4096), (5, 20, 100)
BATCH = (1000, 16, 576)
# Variance of one coefficient. The factor adds as much again, so that a user's margins on scaled features spread by 3.4
# at D = 576 and by 9 at D = 4096.
ISOTROPIC = 0.01


@dataclass
class Side:
    """One fit; `seconds` holds the mean time of a call in each turn."""

    method: str
    shape: tuple[int, int, int]
    call: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)


def problem(users: int, count: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences (n, k, D) that each user's own random taste decides, and margins under row 0 (n, k)."""
    draw = np.random.default_rng(seed)
    z = draw.standard_normal((users, count, width), dtype=np.float32)
    taste = draw.standard_normal((users, width, 1), dtype=np.float32)
    return z * np.sign(z @ taste), draw.standard_normal((users, count), dtype=np.float32)


def prior(width: int, rank: int) -> OffsetPrior:
    size = np.sqrt(ISOTROPIC / max(rank, 1))
    factor = size * np.random.default_rng(1).standard_normal((rank, width))
    return OffsetPrior(ISOTROPIC, factor.astype(np.float32))


def logistic(z: np.ndarray, tight: bool) -> Callable[[], np.ndarray]:
    """The same objective in scikit-learn: every second difference turned round, as it wants both labels."""
    labels = np.where(np.arange(len(z)) % 2, 1, -1)
    turned = z * labels[:, None].astype(z.dtype)
    if tight:
        turned = turned.astype(np.float64)
    limits = {"tol": 1e-12, "max_iter": 100_000} if tight else {}
    model = LogisticRegression(C=ISOTROPIC, fit_intercept=False, **limits)
    return lambda: model.fit(turned, labels).coef_[0]


def all_sides() -> tuple[list[Side], list[dict[str, float]]]:
    sides, apart = [], []
    for width in WIDTHS:
        for count in COUNTS:
            shape = (1, count, width)
            z, base = problem(*shape, seed=count)
            whole, round_prior = prior(width, MAX_RANK), prior(width, 0)
            plain, theirs = _fit(z, 0 * base, round_prior), logistic(z[0], tight=False)
            sides.append(Side(f"fit_offsets, rank {MAX_RANK}", shape, _fit(z, base, whole)))
            sides.append(Side("fit_offsets, isotropic", shape, plain))
            sides.append(Side("LogisticRegression", shape, theirs))
            best = logistic(z[0], tight=True)()
            far = {"fit_offsets": distance(plain()[0], best), "LogisticRegression": distance(theirs(), best)}
            apart.append({"k": count, "D": width, "largest_coefficient": float(abs(best).max()), **far})
    z, base = problem(*BATCH, seed=0)
    sides.append(Side(f"batch, rank {MAX_RANK}", BATCH, _fit(z, base, prior(BATCH[2], MAX_RANK))))
    return sides, apart


def _fit(z: np.ndarray, base: np.ndarray, offset_prior: OffsetPrior) -> Callable[[], np.ndarray]:
    return lambda: fit_offsets(z, base, offset_prior)


def distance(found: np.ndarray, best: np.ndarray) -> float:
    return float(np.abs(found - best).max())


def measure(sides: list[Side], turns: int, calls: int) -> None:
    for number in range(-1, turns):  # turn -1 is thrown away
        for side in random.sample(sides, len(sides)):
            times = 1 if side.shape[0] > 1 else calls
            begun = time.process_time()
            for _ in range(times):
                side.call()
            spent = (time.process_time() - begun) / times
            side.seconds += [spent] if number >= 0 else []


def figure(values: list[float]) -> dict[str, float]:
    return {"value": median(values), "low": min(values), "high": max(values), "n": len(values)}


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def figures(sides: list[Side]) -> dict[str, Any]:
    """Milliseconds per user by method, D and k, and users/s/core of the batch."""
    found: dict[str, Any] = {}
    for side in sides[:-1]:
        by_width = found.setdefault(side.method, {}).setdefault(f"D={side.shape[2]}", {})
        by_width[f"k={side.shape[1]}"] = figure([1000 * seconds for seconds in side.seconds])
    batch = figure([sides[-1].shape[0] / seconds for seconds in sides[-1].seconds])
    return {"milliseconds_per_user": found, "logistic_over_fit": ratios(sides), "users_per_second_per_core": batch}


def ratios(sides: list[Side]) -> dict[str, dict[str, float]]:
    """Time of scikit-learn over that of `fit_offsets` on the same problem, turn by turn."""
    ours, theirs = ([s for s in sides if s.method == name] for name in ("fit_offsets, isotropic", "LogisticRegression"))
    pairs = {f"D={a.shape[2]}, k={a.shape[1]}": (a.seconds, b.seconds) for a, b in zip(ours, theirs, strict=True)}
    return {name: figure([b / a for a, b in zip(*pair, strict=True)]) for name, pair in pairs.items()}


def show(found: dict[str, Any], apart: list[dict[str, float]]) -> None:
    def text(f: dict[str, float], form: str) -> str:
        return f"{f['value']:{form}} ({f['low']:{form}} to {f['high']:{form}}, n={f['n']})"

    nested = found["milliseconds_per_user"].items()
    rows = [
        (method, width, count, text(f, ".3f"))
        for method, widths in nested
        for width, counts in widths.items()
        for count, f in counts.items()
    ]
    table("Milliseconds per new user", ("method", "D", "k", "median (range)"), rows)
    rows = [(name, text(f, ".2f")) for name, f in found["logistic_over_fit"].items()]
    table("LogisticRegression's time over fit_offsets', isotropic prior", ("problem", "median (range)"), rows)
    print(f"Batch of {BATCH}: {text(found['users_per_second_per_core'], ',.0f')} users/s/core\n")
    columns = list(apart[0])
    rows = [[f"{row[c]:.2g}" if c not in ("k", "D") else str(row[c]) for c in columns] for row in apart]
    table("Largest coefficient difference to the optimum, isotropic prior", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--calls", type=int, default=10, help="fits of one user in a turn")
    given = parser.parse_args()
    random.seed(0)
    with threadpool_limits(1):
        sides, apart = all_sides()
        measure(sides, given.turns, given.calls)
    found = figures(sides)
    show(found, apart)
    if given.json:
        made = {"cpu": cpu(), "numpy": np.__version__, "scikit-learn": sklearn.__version__, "threads": 1}
        settings = {"isotropic": ISOTROPIC, "rank": MAX_RANK, "batch": dict(zip("nkD", BATCH, strict=True))}
        differences = {"largest_coefficient_difference_to_optimum": apart}
        write_json({**made, "python": platform.python_version(), **settings, **found, **differences}, given.json)


if __name__ == "__main__":
    main()

"""Metrics as pure functions of arrays.

Figures are those of `core.figures`; where there is nothing to measure, value, low and high are None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ..core.figures import NOTHING, Figure, figure, wilson

ENOUGH_USERS = 30
DRAWS = 2000


def accuracies(margins: np.ndarray) -> np.ndarray:
    """Per comparison (B,): 1 where the chosen response scores higher, 0.5 on a tie, else 0.

    Raises:
        ValueError: a margin is not a number; names the first position.
    """
    margins = np.asarray(margins, dtype=np.float64)
    if np.isnan(margins).any():
        raise ValueError(f"the margin of comparison {int(np.isnan(margins).argmax())} is not a number")
    return 0.5 * (np.sign(margins) + 1)


def log_losses(margins: np.ndarray) -> np.ndarray:
    """Per comparison (B,): -log sigmoid(margin) in nats (Bradley-Terry; the paper's reward-model loss)."""
    return np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64))


def clustered_mean(
    values: np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    seed: int = 0,
    bounds: tuple[float, float | None] = (0.0, 1.0),
) -> Figure:
    """Mean of values (B,) with a percentile bootstrap that draws whole clusters.

    Where the clusters do not differ, a bootstrap has no width; then the interval is as wide as Wilson's for a share of
    0 or 1. With a single cluster it is all of `bounds`.
    """
    if not len(values):
        return dict(NOTHING)
    codes, names = pd.factorize(np.asarray(clusters, dtype=object))
    mean = float(np.mean(values))
    if len(names) < 2:
        return {"value": mean, "low": bounds[0], "high": bounds[1], "n": len(values)}
    sums = np.bincount(codes, weights=values)
    sizes = np.bincount(codes).astype(np.float64)
    random = np.random.default_rng(seed)
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        times = np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))
        means[i] = times @ sums / (times @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    if high - low < 1e-12:
        half = wilson(0, len(names))["high"]
        low, high = max(bounds[0], mean - half), min(np.inf if bounds[1] is None else bounds[1], mean + half)
    return figure(mean, low, high, len(values))


def resampling_units(user_ids: Sequence[Any], prompts: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """What a bootstrap should draw: users where there are 30 or more of them, else prompts."""
    return ("user", user_ids) if len(set(user_ids)) >= ENOUGH_USERS else ("prompt", prompts)


def paired_difference(
    first: np.ndarray, second: np.ndarray, clusters: Sequence[Any] | np.ndarray, seed: int = 0
) -> Figure:
    """Mean of first - second on the same comparisons, with the same bootstrap."""
    return clustered_mean(np.asarray(first) - np.asarray(second), clusters, seed, (-1.0, 1.0))


def mean_over_users(values: np.ndarray, bounds: tuple[float | None, float | None] = (0.0, 1.0)) -> Figure:
    """Mean over users of one value each, such as the per-user accuracy (Accuracy-average, C.3); n counts users.

    The interval is the paper's standard error over users times Student's t, kept within the bounds that values have;
    with one user it is all of the bounds.
    """
    n = len(values)
    if not n:
        return dict(NOTHING)
    least, most = (-np.inf if bounds[0] is None else bounds[0]), (np.inf if bounds[1] is None else bounds[1])
    mean = float(np.mean(values))
    if n == 1:
        return {"value": mean, "low": bounds[0], "high": bounds[1], "n": 1}
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return figure(mean, max(least, mean - half), min(most, mean + half), n)


def per_user(user_ids: Sequence[str | None], columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Mean of each column of values (B,) per user, and `n`; one row per user, None being the unknown user."""
    names = ["" if user is None else user for user in user_ids]
    table = pd.DataFrame({"user_id": names, **columns})
    means = table.groupby("user_id", sort=True).mean()
    return means.assign(n=table.groupby("user_id").size()).reset_index()

"""Metrics as pure functions of arrays.

A figure with its uncertainty is `{"value", "low", "high", "n"}`, a 95 % interval; where there is nothing to measure,
value, low and high are None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

Figure = dict[str, Any]
Z95 = 1.959963984540054
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


def figure(value: float, low: float, high: float, n: int) -> Figure:
    return {"value": float(value), "low": float(low), "high": float(high), "n": int(n)}


NOTHING: Figure = {"value": None, "low": None, "high": None, "n": 0}


def wilson(successes: float, n: int) -> Figure:
    """Share with Wilson's score interval; half successes (ties) are allowed."""
    if not n:
        return dict(NOTHING)
    share, square = successes / n, Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * np.sqrt(share * (1 - share) / n + square / (4 * n**2))
    return figure(share, centre - half, centre + half, n)


def clustered_mean(values: np.ndarray, clusters: Sequence[Any] | np.ndarray, seed: int = 0) -> Figure:
    """Mean of values (B,) with a percentile bootstrap that draws whole clusters."""
    if not len(values):
        return dict(NOTHING)
    codes, names = pd.factorize(np.asarray(clusters, dtype=object))
    sums = np.bincount(codes, weights=values)
    sizes = np.bincount(codes).astype(np.float64)
    random = np.random.default_rng(seed)
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        times = np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))
        means[i] = times @ sums / (times @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    return figure(float(np.mean(values)), low, high, len(values))


def resampling_units(user_ids: Sequence[Any], prompts: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """What a bootstrap should draw: users where there are 30 or more of them, else prompts."""
    return ("user", user_ids) if len(set(user_ids)) >= ENOUGH_USERS else ("prompt", prompts)


def paired_difference(
    first: np.ndarray, second: np.ndarray, clusters: Sequence[Any] | np.ndarray, seed: int = 0
) -> Figure:
    """Mean of first - second on the same comparisons, with the same bootstrap."""
    return clustered_mean(np.asarray(first) - np.asarray(second), clusters, seed)


def mean_over_users(per_user: np.ndarray) -> Figure:
    """Accuracy-average (C.3): the mean over users of the per-user accuracy; n counts users.

    The interval is the paper's standard error over users times Student's t; with one user it is unbounded, so [0, 1].
    """
    n = len(per_user)
    if not n:
        return dict(NOTHING)
    mean = float(np.mean(per_user))
    if n == 1:
        return figure(mean, 0.0, 1.0, 1)
    half = stats.t.ppf(0.975, n - 1) * np.std(per_user, ddof=1) / np.sqrt(n)
    return figure(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def per_user(user_ids: Sequence[str | None], columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Mean of each column of values (B,) per user, and `n`; one row per user, None being the unknown user."""
    names = ["" if user is None else user for user in user_ids]
    table = pd.DataFrame({"user_id": names, **columns})
    means = table.groupby("user_id", sort=True).mean()
    return means.assign(n=table.groupby("user_id").size()).reset_index()

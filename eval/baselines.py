"""What a personalized model has to beat: length rules, and its own scores under somebody else's id."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..core.comparisons import Comparison, User
from ..core.scoring import Scorer, each


def always_longer() -> Scorer:
    """Scores a response by its length in characters."""
    return each(lambda user, prompt, response: float(len(response)))


def length_rule(directions: Mapping[str | None, int]) -> Scorer:
    """Always longer or always shorter, a fixed direction per user; unknown users get the direction of None."""
    return each(lambda user, prompt, response: float(len(response)) * directions.get(user.id, directions[None]))


def length_directions(longer: Mapping[str | None, tuple[int, int]]) -> dict[str | None, int]:
    """Best fixed direction per user from training rows, and over all rows under None.

    Args:
        longer: user -> (rows whose chosen response is the longer one, rows whose chosen response is the shorter one).
    """
    total = np.sum([list(counts) for counts in longer.values()], axis=0) if longer else np.zeros(2)
    best = {user: 1 if more >= fewer else -1 for user, (more, fewer) in longer.items()}
    return {**best, None: 1 if total[0] >= total[1] else -1}


def length_counts(rows: Sequence[Comparison]) -> dict[str | None, tuple[int, int]]:
    """What `length_directions` reads, counted over training rows."""
    counts: dict[str | None, tuple[int, int]] = {}
    for row in rows:
        more, fewer = counts.get(row.user.id, (0, 0))
        difference = len(row.chosen) - len(row.rejected)
        counts[row.user.id] = (more + (difference > 0), fewer + (difference < 0))
    return counts


def shuffled_users(users: Sequence[User], known: Sequence[str], seed: int = 0) -> list[User]:
    """The same rows under other people's ids: every known user is replaced by another known one, at random per user.

    With fewer than two known users there is nobody to swap with, and the ids stay.
    """
    present = sorted({user.id for user in users if user.id is not None} & set(known))
    pool = present if len(present) > 1 else sorted(known)
    order = np.random.default_rng(seed).permutation(len(pool))
    # A cycle through a random order gives everyone somebody else.
    swap = {pool[order[i]]: pool[order[(i + 1) % len(pool)]] for i in range(len(pool))}
    return [User(swap.get(user.id, user.id) if user.id is not None else None, user.text) for user in users]

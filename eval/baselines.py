"""What a personalized model has to beat: length rules, and its own scores under somebody else's id."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..core.comparisons import User
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


def row0(scorer: Scorer) -> Scorer:
    """The same scorer for the unknown user, whoever asks; what is written about the user stays."""
    return lambda requests: scorer([replace(r, user=User(None, r.user.text)) for r in requests])


def shuffled_users(users: Sequence[User], known: Sequence[str], seed: int = 0) -> list[User]:
    """The same rows under other people's ids: each known user is replaced by another known one, always the same."""
    order = np.random.default_rng(seed).permutation(sorted(known)).tolist()
    # A cycle through a random order gives everyone somebody else.
    swap = dict(zip(order, order[1:] + order[:1], strict=True))
    return [User(swap.get(user.id, user.id) if user.id is not None else None, user.text) for user in users]

"""Tastes of simulated users: which they are, and what a user says about them.

A taste is a property and its weight; the weight of a user's main taste is 1 or -1 here.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from .properties import PROPERTIES

SIDE_TASTE = 0.15  # standard deviation of the weights beside the main taste
CONFLICT_WEIGHT = 0.35  # of the property that the groups differ on, for users whose main taste is another
STATED = 0.25  # weights from here on are worth a word in the text about a user

Tastes = Sequence[tuple[str, float]]


def draw_weights(
    users: int, names: Sequence[str], conflict: str, majority: float, draws: np.random.Generator
) -> np.ndarray:
    """Weights of all users on the properties, (users, properties).

    Main tastes go round, and so do likes and dislikes among the users who share one; on the property in conflict the
    group decides.
    """
    at = list(names).index(conflict)
    weights = draws.normal(0, SIDE_TASTE if len(names) > 1 else 0, (users, len(names)))
    more = round(majority * users)
    side = draws.permutation([1] * more + [-1] * (users - more))
    weights[:, at] = CONFLICT_WEIGHT * side
    for i in range(users):
        main = (at + i) % len(names)
        weights[i, main] = side[i] if main == at else (-1) ** (i // len(names))
    return weights


def with_opposites(weights: np.ndarray) -> np.ndarray:
    """Each user's weights, followed by their negatives: (2 * users, properties)."""
    return np.stack([weights, -weights], 1).reshape(-1, weights.shape[1])


def clear_tastes(names: Sequence[str], weights: np.ndarray) -> Tastes:
    """The tastes of one user that are worth a word, the strongest first."""
    order = sorted(range(len(weights)), key=lambda k: -abs(weights[k]))
    return [(names[k], float(weights[k])) for k in order if abs(weights[k]) >= STATED]


def liking(name: str, weight: float) -> str:
    """What somebody with this taste likes."""
    return PROPERTIES[name].more if weight > 0 else PROPERTIES[name].less


def in_own_words(tastes: Tastes, draws: np.random.Generator) -> str:
    """A text in which a user says what they like, first things first, in a manner that is drawn."""
    openings = ("Above all I like {}.", "What I want most is {}.", "I prefer {}.", "Give me {}.")
    further = ("I also like {}.", "Next to that, {}.", "And {}, please.", "{}, too.")
    first, rest = str(draws.choice(openings)), str(draws.choice(further))
    liked = [liking(*taste) for taste in tastes]
    said = [first.format(liked[0]), *(rest.format(thing) for thing in liked[1:])]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said)


def in_plain_words(tastes: Tastes) -> str:
    """Likes and dislikes in the order given: "I like short answers and lists. I do not like being asked back." """
    parted = [PROPERTIES[name].says[weight < 0].partition("like ") for name, weight in tastes]
    kinds = [(kind, [thing for *_, thing in some]) for kind, some in groupby(parted, key=lambda parts: parts[0])]
    return " ".join(f"I {kind}like {_listed(things)}." for kind, things in kinds)


def _listed(things: Sequence[str]) -> str:
    *first, last = things
    return f"{', '.join(first)} and {last}" if first else last

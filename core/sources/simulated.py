"""Simulated users, whose true utility is known: whatever is claimed about learning what people like can be checked.

A user's utility is linear in measurable properties of a response (`core.properties`), and their choices between two
responses of a pool follow Bradley-Terry: P(a over b) = sigmoid(utility(a) - utility(b)). A majority and a minority are
in conflict on one property, as in the paper's controlled experiment (5.1); beyond that everybody has a taste of their
own. Every row keeps its true utilities in columns that no trainer reads.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..artefact import whole_file
from ..candidates import Candidates, read_candidates
from ..comparisons import Comparison, Comparisons, DataError, Prompt, User
from ..properties import PROPERTIES
from ..scoring import Scorer, each
from ..splits import SplitPlan, prompt_text, split

POOL = Path(__file__).with_name("everyday.jsonl")
UTILITY_COLUMNS = ("utility_chosen", "utility_rejected")
WORLD_FORMAT = 1
SIDE_TASTE = 0.15  # standard deviation of the weights beside the main taste, which weighs 1
CONFLICT_WEIGHT = 0.35  # of the property that the groups differ on, for users whose main taste is another
STATED = 0.25  # weights from here on are worth a word in the text about a user


@dataclass(frozen=True)
class SimulationPlan:
    """Who is simulated.

    Attributes:
        users: how many.
        comparisons: of each user; no pair comes twice.
        properties: what users can like or dislike; each user's main taste is one of them, in turn.
        conflict: the property that the majority likes more of and the minority less of.
        majority: share of the users in the majority.
        strength: standard deviation of a user's utility over the responses of a prompt, in logits: how sure choices
            are.
        user_text: whether each user comes with a text that states their utility.
    """

    users: int = 40
    comparisons: int = 200
    properties: Sequence[str] = tuple(PROPERTIES)
    conflict: str = "length"
    majority: float = 0.7
    strength: float = 3.0
    user_text: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.properties if name not in PROPERTIES]
        if unknown:
            raise ValueError(f"--properties: there is no {unknown[0]!r}; there are {', '.join(PROPERTIES)}")
        if len(set(self.properties)) < len(self.properties):
            raise ValueError(f"--properties {','.join(self.properties)}: each one once")
        if self.conflict not in self.properties:
            raise ValueError(
                f"--conflict {self.conflict}: the groups differ on it, but it is not one of --properties "
                f"{','.join(self.properties)}; add it there, or name one of them as --conflict"
            )
        for name in ("users", "comparisons"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, found {getattr(self, name)}")
        if not 0 <= self.majority <= 1:
            raise ValueError(f"--majority must lie between 0 and 1, found {self.majority}")
        if not 0 < self.strength < math.inf:
            raise ValueError(f"--strength must be a number greater than 0, found {self.strength}")


@dataclass(frozen=True)
class SimulatedUser:
    """One user's taste.

    Attributes:
        group: `majority` or `minority`, by the property in conflict.
        taste: in words, what they like above all.
        weights: property -> utility per within-prompt standard deviation of the property, in logits.
    """

    user: User
    group: str
    taste: str
    weights: Mapping[str, float]


@dataclass(frozen=True)
class World:
    """Simulated users and the units of their utilities; it can score any text for any of them.

    Attributes:
        scales: property -> its standard deviation within a prompt, over the pool.
    """

    plan: SimulationPlan
    scales: Mapping[str, float]
    users: Mapping[str, SimulatedUser]

    def utility(self, user_id: str | None, response: str) -> float:
        """True utility of a response in logits, up to a constant of the user's.

        Raises:
            KeyError: nobody of that name lives in this world.
        """
        if user_id is None or user_id not in self.users:
            raise KeyError(f"user {user_id!r}: not one of the {len(self.users)} simulated users")
        weights = self.users[user_id].weights
        return math.fsum(w * _measured(name, response) / self.scales[name] for name, w in weights.items())

    def scorer(self) -> Scorer:
        """The true utility as a scorer: no model can do better than it on noisy choices."""
        return each(lambda user, prompt, response: self.utility(user.id, response))

    def save(self, path: Path) -> None:
        """Writes the world as JSON; it is whole or not there."""
        users = {name: asdict(found) for name, found in self.users.items()}
        facts = {"format": WORLD_FORMAT, "plan": asdict(self.plan), "scales": dict(self.scales), "users": users}
        with whole_file(path) as new:
            new.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "World":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or is no world; names it.
        """
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["format"] != WORLD_FORMAT:
                raise ValueError(f"its format is {facts['format']!r}, this version reads {WORLD_FORMAT}")
            plan = SimulationPlan(**{**facts["plan"], "properties": tuple(facts["plan"]["properties"])})
            users = {name: SimulatedUser(**{**f, "user": User(**f["user"])}) for name, f in facts["users"].items()}
            scales = {name: float(facts["scales"][name]) for name in plan.properties}
            return cls(plan, scales, users)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; `prlhf data simulate` writes it") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a file of simulated users: {error}") from None


@lru_cache(maxsize=100_000)
def _measured(name: str, response: str) -> float:
    """A property of a text; many users are asked about the same few texts."""
    return PROPERTIES[name].measure(response)


def simulate(pool: Sequence[Candidates], plan: SimulationPlan) -> tuple[World, list[Comparison]]:
    """Makes users and lets them choose between responses of the pool.

    Raises:
        DataError: the pool has an empty response, too few pairs, or a property that does not vary.
    """
    pairs = _pairs(pool)
    if len(pairs) < plan.comparisons:
        raise DataError(f"the pool has {len(pairs):,} pairs, too few for {plan.comparisons:,} comparisons of each user")
    world = make_world(pool, plan)
    draws = np.random.default_rng([plan.seed, 1])
    return world, [row for user in world.users.values() for row in _choices(world, user, pairs, draws)]


def _pairs(pool: Sequence[Candidates]) -> list[tuple[Prompt, str, str]]:
    """Every two different responses to a prompt, once, however often the pool holds them."""
    empty = next((c for c in pool for text in c.responses if not text.strip()), None)
    if empty:
        raise DataError(f"{empty.place}: responses: one is empty, and nobody can choose it; leave it out")
    every = [(c.prompt, a, b) for c in pool for a, b in combinations(dict.fromkeys(c.responses), 2)]
    return list({(prompt_text(p), *sorted((a, b))): (p, a, b) for p, a, b in every}.values())


def simulated_parts(
    pool: Path, plan: SimulationPlan, split_plan: SplitPlan
) -> tuple[World, dict[str, list[Comparison]]]:
    """Simulates and splits: the world, and its comparisons by part (see `core.splits`)."""
    world, rows = simulate(read_candidates(pool), plan)
    return world, split(Comparisons(rows, f"{pool.name} with {plan.users} simulated users"), split_plan)


def load(source: str | Path, plan: SimulationPlan | None = None) -> Iterator[Comparison]:
    """Choices of simulated users over the pool in a file."""
    yield from simulate(read_candidates(Path(source)), plan or SimulationPlan())[1]


def make_world(pool: Sequence[Candidates], plan: SimulationPlan) -> World:
    """Users whose utility has a standard deviation of `plan.strength` within the pool's prompts."""
    deviations = _within_prompt(pool, plan.properties)  # (responses, properties)
    spreads = deviations.std(0)
    flat = [name for name, spread in zip(plan.properties, spreads, strict=True) if spread < 1e-9]
    if flat:
        raise DataError(
            f"the pool's responses to a prompt do not differ in {', '.join(flat)}; name the others as --properties"
        )
    draws = np.random.default_rng([plan.seed, 0])
    raw = _weights(plan, draws)  # (users, properties)
    unit = (raw @ (deviations / spreads).T).std(1, keepdims=True)
    weights = raw / unit * plan.strength
    width = len(str(plan.users))
    users = {}
    for i, (mine, signs) in enumerate(zip(weights, raw, strict=True)):
        made = _user(f"user{i + 1:0{width}}", mine, signs, plan, draws)
        users[str(made.user.id)] = made
    return World(plan, dict(zip(plan.properties, spreads.tolist(), strict=True)), users)


def _within_prompt(pool: Sequence[Candidates], names: Sequence[str]) -> np.ndarray:
    """Properties of all responses that have another beside them, less their prompt's mean: (responses, properties)."""
    several = [c.responses for c in pool if len(c.responses) > 1]
    measured = [np.asarray([[_measured(n, text) for n in names] for text in texts]) for texts in several]
    return np.concatenate([values - values.mean(0) for values in measured])


def _weights(plan: SimulationPlan, draws: np.random.Generator) -> np.ndarray:
    """Weights of all users before they are scaled, (users, properties).

    Main tastes go round, and so do likes and dislikes among the users who share one; on the property in conflict the
    group decides.
    """
    names, at = list(plan.properties), list(plan.properties).index(plan.conflict)
    weights = draws.normal(0, SIDE_TASTE if len(names) > 1 else 0, (plan.users, len(names)))
    majority = round(plan.majority * plan.users)
    side = draws.permutation([1] * majority + [-1] * (plan.users - majority))
    weights[:, at] = CONFLICT_WEIGHT * side
    for i in range(plan.users):
        main = (at + i) % len(names)
        weights[i, main] = side[i] if main == at else (-1) ** (i // len(names))
    return weights


def _user(
    name: str, weights: np.ndarray, raw: np.ndarray, plan: SimulationPlan, draws: np.random.Generator
) -> SimulatedUser:
    order = sorted(range(len(raw)), key=lambda k: -abs(raw[k]))
    liked = [_liking(plan.properties[k], raw[k]) for k in order if abs(raw[k]) >= STATED]
    text = _stated(liked, draws) if plan.user_text else ""
    group = "majority" if raw[list(plan.properties).index(plan.conflict)] > 0 else "minority"
    by_name = dict(zip(plan.properties, weights.tolist(), strict=True))
    return SimulatedUser(User(name, text), group, liked[0], by_name)


def _liking(name: str, weight: float) -> str:
    return PROPERTIES[name].more if weight > 0 else PROPERTIES[name].less


def _stated(liked: Sequence[str], draws: np.random.Generator) -> str:
    """A text in which a user says what they like, first things first."""
    openings = ("Above all I like {}.", "What I want most is {}.", "I prefer {}.", "Give me {}.")
    further = ("I also like {}.", "Next to that, {}.", "And {}, please.", "{}, too.")
    first, rest = str(draws.choice(openings)), str(draws.choice(further))
    said = [first.format(liked[0]), *(rest.format(thing) for thing in liked[1:])]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said)


def _choices(
    world: World, user: SimulatedUser, pairs: Sequence[tuple[Prompt, str, str]], draws: np.random.Generator
) -> Iterator[Comparison]:
    for at in draws.choice(len(pairs), world.plan.comparisons, replace=False):
        prompt, *texts = pairs[at]
        utilities = [world.utility(user.user.id, text) for text in texts]
        first = draws.random() < 1 / (1 + math.exp(min(700.0, utilities[1] - utilities[0])))
        chosen, rejected = (0, 1) if first else (1, 0)
        truth = dict(zip(UTILITY_COLUMNS, (utilities[chosen], utilities[rejected]), strict=True))
        extra: dict[str, Any] = {"group": user.group, "taste": user.taste, **truth}
        yield Comparison(user.user, prompt, texts[chosen], texts[rejected], extra=extra)


def true_margins(rows: Sequence[Comparison] | Comparisons) -> np.ndarray | None:
    """True utility of chosen minus rejected, (B,); None unless every row holds both as numbers."""
    pairs = np.asarray([[_number(row.extra.get(column)) for column in UTILITY_COLUMNS] for row in rows])
    return pairs[:, 0] - pairs[:, 1] if len(pairs) and np.isfinite(pairs).all() else None


def _number(value: Any) -> float:
    """A number, also as the text that CSV makes of it; NaN for what is none, since the column is somebody else's."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan

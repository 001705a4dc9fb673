"""Simulated users, whose true utility is known: whatever is claimed about learning what people like can be checked.

A user's utility is linear in measurable properties of a response (`core.properties`), and their choices between two
responses of a pool follow Bradley-Terry: P(a over b) = sigmoid(utility(a) - utility(b)). A majority and a minority are
in conflict on one property, as in the paper's controlled experiment (5.1); beyond that everybody has a taste of their
own, or, where users are mirrored, the opposite of somebody else's. Every row keeps its true utilities in columns that
no trainer reads.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from ..tastes import clear_tastes, draw_weights, in_own_words, in_plain_words, liking, with_opposites

POOL = Path(__file__).with_name("everyday.jsonl")
UTILITY_COLUMNS = ("utility_chosen", "utility_rejected")
WORLD_FORMAT = 1


@dataclass(frozen=True)
class SimulationPlan:
    """Who is simulated.

    Attributes:
        users: how many.
        comparisons: of each user; no pair comes twice.
        properties: what users can like or dislike; each user's main taste is one of them, in turn.
        conflict: the property that the majority likes more of and the minority less of.
        majority: share of the users in the majority; where they are mirrored, of the first of each pair.
        strength: standard deviation of a user's utility over the responses of a prompt, in logits: how sure choices
            are.
        user_text: whether each user comes with a text that states their utility, in words of their own.
        stated: whether each user comes with a text that states it in the same plain words for everybody.
        mirrored: whether users come in pairs, user 1 with user 2 and so on: the second's utility is the negated one
            of the first, and both are asked about the same pairs of responses. Who is not told the user, by id or
            text, is then right half of the time on average.
    """

    users: int = 40
    comparisons: int = 200
    properties: Sequence[str] = tuple(PROPERTIES)
    conflict: str = "length"
    majority: float = 0.7
    strength: float = 3.0
    user_text: bool = False
    seed: int = 0
    stated: bool = False
    mirrored: bool = False

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
        if self.stated and self.user_text:
            raise ValueError(
                "--stated and --user-text: a user has one text, and each of them writes it; give one of them"
            )
        if self.mirrored and self.users % 2:
            raise ValueError(
                f"--users {self.users}: with --mirrored users come in pairs; give an even number, as {self.users + 1}"
            )

    def facts(self) -> dict[str, Any]:
        """For JSON; what plans did not always have stands there only where it is used, so other files stay the same."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("stated", "mirrored")}


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

    def asked_together(self) -> list[list[SimulatedUser]]:
        """All users, in lists of those who are asked about the same pairs: two who are mirrored, or one."""
        everybody, size = list(self.users.values()), 2 if self.plan.mirrored else 1
        return [everybody[at : at + size] for at in range(0, len(everybody), size)]

    def save(self, path: Path) -> None:
        """Writes the world as JSON; it is whole or not there."""
        users = {name: asdict(found) for name, found in self.users.items()}
        facts = {"format": WORLD_FORMAT, "plan": self.plan.facts(), "scales": dict(self.scales), "users": users}
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
    rows: list[Comparison] = []
    for together in world.asked_together():
        asked = [pairs[at] for at in draws.choice(len(pairs), plan.comparisons, replace=False)]
        rows += [row for user in together for row in _choices(world, user, asked, draws)]
    return world, rows


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
    source = f"{pool.name} with {plan.users} simulated users"
    return world, _split_together(world, Comparisons(rows, source), split_plan)


def _split_together(world: World, rows: Comparisons, plan: SplitPlan) -> dict[str, list[Comparison]]:
    """Splits; mirrored users are shown to it under the id of the first of their pair, so both are held out, or none."""
    first = {user.user.id: together[0].user for together in world.asked_together() for user in together}
    shown = [replace(row, user=first[row.user.id]) for row in rows]
    own = {id(row): mine for row, mine in zip(shown, rows, strict=True)}
    return {name: [own[id(row)] for row in part] for name, part in split(rows.subset(shown), plan).items()}


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
    drawn = plan.users // 2 if plan.mirrored else plan.users
    raw = draw_weights(drawn, plan.properties, plan.conflict, plan.majority, draws)
    unit = (raw @ (deviations / spreads).T).std(1, keepdims=True)
    weights = raw / unit * plan.strength  # (users, properties)
    if plan.mirrored:  # after they are scaled, so that the two of a pair are opposite to the last bit
        raw, weights = with_opposites(raw), with_opposites(weights)
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


def _user(
    name: str, weights: np.ndarray, raw: np.ndarray, plan: SimulationPlan, draws: np.random.Generator
) -> SimulatedUser:
    tastes = clear_tastes(plan.properties, raw)
    text = in_plain_words(tastes) if plan.stated else in_own_words(tastes, draws) if plan.user_text else ""
    group = "majority" if raw[list(plan.properties).index(plan.conflict)] > 0 else "minority"
    by_name = dict(zip(plan.properties, weights.tolist(), strict=True))
    return SimulatedUser(User(name, text), group, liking(*tastes[0]), by_name)


def _choices(
    world: World, user: SimulatedUser, asked: Sequence[tuple[Prompt, str, str]], draws: np.random.Generator
) -> Iterator[Comparison]:
    for prompt, *texts in asked:
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

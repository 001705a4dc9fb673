"""Texts that state the tastes of simulated users, and users who are mirrored."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import prlhf
from pools import small_pool, write_pool

from prlhf.core.candidates import Candidates
from prlhf.core.comparisons import Comparison, User
from prlhf.core.properties import PROPERTIES
from prlhf.core.sources import load_comparisons
from prlhf.core.sources.simulated import SimulationPlan, World, make_world, simulate, simulated_parts, true_margins
from prlhf.core.splits import SplitPlan, data_hash
from prlhf.core.tastes import STATED, in_plain_words

SMALL = SimulationPlan(users=12, comparisons=60)
MIRRORED = replace(SMALL, users=20, mirrored=True)
SAID = {phrase: (name, sign) for name, p in PROPERTIES.items() for phrase, sign in zip(p.says, (1, -1), strict=True)}


@pytest.fixture(scope="module")
def pool() -> list[Candidates]:
    return small_pool()


@pytest.fixture(scope="module")
def pool_file(pool: list[Candidates], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool") / "mine.jsonl", pool)


def read_tastes(text: str) -> list[tuple[str, int]]:
    """What a text says, by its words alone: (property, direction), in its order."""
    found = []
    for sentence in re.findall(r"I ([^.]+)\.", text):
        verb = "do not like " if sentence.startswith("do not like ") else "like "
        found += [SAID[verb + thing] for thing in re.split(", | and ", sentence.removeprefix(verb))]
    return found


def clear_tastes(weights: dict[str, float]) -> list[tuple[str, int]]:
    largest = max(map(abs, weights.values()))
    order = sorted(weights, key=lambda name: -abs(weights[name]))
    return [(name, int(np.sign(weights[name]))) for name in order if abs(weights[name]) >= STATED * largest]


@pytest.mark.parametrize(
    ("tastes", "text"),
    [
        ([("length", -1.0)], "I like short answers."),
        ([("list", -0.1)], "I do not like lists."),
        (
            [("length", -1), ("list", 0.5), ("question", -0.4)],
            "I like short answers and lists. I do not like being asked back.",
        ),
        (
            [("you", -1), ("exclamation", -0.9), ("long_words", 0.8), ("list", -0.3)],
            "I do not like being addressed in person and exclamation marks. I like long words. I do not like lists.",
        ),
        (
            [("exclamation", 1), ("long_words", -1), ("length", 1), ("list", 1)],
            "I like exclamation marks, short words, long answers and lists.",
        ),
    ],
)
def test_tastes_in_plain_words(tastes: list[tuple[str, float]], text: str) -> None:
    assert in_plain_words(tastes) == text


def test_every_direction_has_words_of_its_own() -> None:
    assert len(SAID) == 2 * len(PROPERTIES)
    for phrase in SAID:
        assert re.fullmatch(r"(do not )?like [\w ]+", phrase)
        assert " and " not in phrase


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_text_states_the_clear_tastes_and_no_other(pool: list[Candidates], mirrored: bool) -> None:
    world = make_world(pool, SimulationPlan(users=120, stated=True, mirrored=mirrored, seed=2))
    read = {name: read_tastes(user.user.text) for name, user in world.users.items()}
    for name, user in world.users.items():
        assert read[name] == clear_tastes(dict(user.weights))
    assert len({taste for tastes in read.values() for taste in tastes}) == len(SAID)
    assert {len(tastes) for tastes in read.values()} >= {1, 2, 3}


def test_stating_changes_no_choice(pool: list[Candidates]) -> None:
    rows = simulate(pool, replace(SMALL, stated=True))[1]
    assert rows == simulate(pool, replace(SMALL, stated=True))[1]
    assert all(row.user.text for row in rows)
    assert [replace(row, user=User(row.user.id)) for row in rows] == simulate(pool, SMALL)[1]


def test_rows_without_the_options_are_those_of_earlier_versions(pool: list[Candidates]) -> None:
    """Hashes of the version before there were `stated` and `mirrored`."""
    assert data_hash(simulate(pool, SMALL)[1]) == "82b2eec8d124ea66"
    assert data_hash(simulate(pool, replace(SMALL, user_text=True))[1]) == "1c1596e9db6ffc71"
    assert not {"stated", "mirrored"} & set(SMALL.facts())


@pytest.mark.parametrize("options", [{"stated": True}, {"mirrored": True}, {"stated": True, "mirrored": True}])
def test_world_file_keeps_the_options(pool: list[Candidates], tmp_path: Path, options: dict[str, bool]) -> None:
    world = make_world(pool, replace(SMALL, **options))  # type: ignore[arg-type]
    world.save(tmp_path / "world.json")
    again = World.load(tmp_path / "world.json")
    assert again == world
    assert again.asked_together() == world.asked_together()


def asked(row: Comparison) -> tuple[str, frozenset[str]]:
    return str(row.prompt), frozenset((row.chosen, row.rejected))


def test_mirrored_users_are_opposite_and_asked_the_same(pool: list[Candidates]) -> None:
    world, rows = simulate(pool, MIRRORED)
    assert rows == simulate(pool, MIRRORED)[1]
    of = {name: [row for row in rows if row.user.id == name] for name in world.users}
    names = list(world.users)
    texts = [text for c in pool for text in c.responses]
    for first, second in zip(names[::2], names[1::2], strict=True):
        assert [asked(row) for row in of[first]] == [asked(row) for row in of[second]]
        assert len({asked(row) for row in of[first]}) == MIRRORED.comparisons
        assert [world.utility(second, text) for text in texts] == [-world.utility(first, text) for text in texts]
        assert {world.users[name].group for name in (first, second)} == {"majority", "minority"}
        assert world.users[first].taste != world.users[second].taste
    assert len({frozenset(map(asked, found)) for found in of.values()}) == len(names) // 2
    assert len({tuple(user.weights.values()) for user in world.users.values()}) == len(names)


def test_mirrored_users_choose_by_bradley_terry_and_each_for_themselves(pool: list[Candidates]) -> None:
    plan = replace(MIRRORED, users=40, comparisons=200)
    margins = true_margins(simulate(pool, plan)[1])
    assert margins is not None
    expected = 1 / (1 + np.exp(-np.abs(margins)))
    assert abs(((margins > 0) - expected).sum()) < 4 * np.sqrt((expected * (1 - expected)).sum())
    assert np.square(margins).mean() == pytest.approx(2 * 6 / 5 * plan.strength**2, rel=0.1)
    chance = simulate(pool, replace(plan, strength=1e-6))[1]
    same = [a.chosen == b.chosen for a, b in pairs_of_rows(chance, plan.comparisons)]
    assert np.mean(same) == pytest.approx(0.5, abs=0.04)


def pairs_of_rows(rows: Sequence[Comparison], each: int) -> list[tuple[Comparison, Comparison]]:
    starts = range(0, len(rows), 2 * each)
    return [(rows[at + k], rows[at + each + k]) for at in starts for k in range(each)]


@pytest.mark.parametrize(("seed", "unseen"), [(0, 0.2), (1, 0.2), (2, 0.5), (3, 0.3), (4, 0.0)])
def test_mirrored_users_are_held_out_together(pool_file: Path, seed: int, unseen: float) -> None:
    split_plan = SplitPlan("prompt", 0.1, 0.25, unseen, seed)
    world, parts = simulated_parts(pool_file, replace(MIRRORED, seed=seed), split_plan)
    assert sum(map(len, parts.values())) == 20 * 60
    assert {row.user.id for part in parts.values() for row in part} == set(world.users)
    seen = {row.user.id for row in parts["train"]}
    held = {row.user.id for row in parts["onboarding"]}
    assert len(held) == 2 * round(10 * unseen)
    assert seen == set(world.users) - held
    for together in world.asked_together():
        assert len({user.user.id in held for user in together}) == 1
    prompts = [{row.prompt for row in parts[name]} for name in ("train", "validation", "test")]
    assert len(set.union(*prompts)) == sum(map(len, prompts))


@pytest.mark.parametrize("held", [False, True])
def test_who_does_not_know_the_user_is_right_half_of_the_time(pool_file: Path, held: bool) -> None:
    """Without noise each choice has its opposite in the same part, among users of either kind."""
    world, parts = simulated_parts(pool_file, replace(MIRRORED, strength=1e6), SplitPlan("prompt", 0.1, 0.25, 0.3))
    unseen = {row.user.id for row in parts["onboarding"]}
    for name, part in parts.items():
        rows = [row for row in part if (row.user.id in unseen) == held]
        assert bool(rows) == (name in (("test", "onboarding") if held else ("train", "validation", "test")))
        sure = [row for row in rows if row.extra["utility_chosen"] != row.extra["utility_rejected"]]
        assert len(sure) >= 0.8 * len(rows)
        choices = Counter((str(row.prompt), row.chosen, row.rejected) for row in sure)
        assert choices == Counter({(p, rejected, chosen): n for (p, chosen, rejected), n in choices.items()})
        right = [world.utility(row.user.id, row.chosen) > world.utility(row.user.id, row.rejected) for row in sure]
        assert all(right)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"users": 7, "mirrored": True}, "--users 7: with --mirrored users come in pairs; give an even number, as 8"),
        ({"users": 1, "mirrored": True}, "--users 1: with --mirrored"),
        ({"stated": True, "user_text": True}, "--stated and --user-text.*give one of them"),
    ],
)
def test_bad_plan_names_the_flag(bad: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SimulationPlan(**bad)  # type: ignore[arg-type]


def test_command_writes_texts_of_mirrored_users(pool_file: Path) -> None:
    work = pool_file.parent
    own = ("data", "simulate", "--pool", "mine.jsonl", "--users", 20, "--comparisons", 60, "--stated", "--mirrored")
    figures = json.loads(prlhf(*own, "--out", "D", "--seed", 3, "--json", cwd=work).stdout)
    assert (figures["plan"]["stated"], figures["plan"]["mirrored"]) == (True, True)
    assert {name: part["users"] for name, part in figures["parts"].items()} == {
        "train": 16,
        "validation": 16,
        "test": 20,
        "onboarding": 4,
    }
    world = World.load(work / "D" / "world.json")
    for name in figures["parts"]:
        for row in load_comparisons(work / "D" / f"{name}.parquet"):
            assert read_tastes(row.user.text) == clear_tastes(dict(world.users[row.user.id].weights))
    unseen = {row.user.id for row in load_comparisons(work / "D" / "onboarding.parquet")}
    assert all(len({u.user.id in unseen for u in together}) == 1 for together in world.asked_together())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--users", 7, "--mirrored"), "--users 7: with --mirrored"),
        (("--stated", "--user-text"), "--stated and --user"),
    ],
)
def test_command_refuses_what_does_not_go_together(pool_file: Path, flags: tuple[object, ...], said: str) -> None:
    done = prlhf("data", "simulate", "--pool", "mine.jsonl", "--out", "bad", *flags, cwd=pool_file.parent, code=2)
    assert said in done.stderr
    assert not (pool_file.parent / "bad").exists()

"""Simulated users: their choices are what their utilities say, and no trainer sees those."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import prlhf
from pools import small_pool, write_pool

from prlhf.core.candidates import Candidates, read_candidates
from prlhf.core.comparisons import Comparison, Comparisons, DataError, User
from prlhf.core.generation import whole_sentences
from prlhf.core.pretrained import Backbone
from prlhf.core.properties import PROPERTIES, words
from prlhf.core.scoring import ScoreRequest
from prlhf.core.sources import load_comparisons
from prlhf.core.sources.simulated import (
    POOL,
    UTILITY_COLUMNS,
    SimulatedUser,
    SimulationPlan,
    World,
    make_world,
    simulate,
    simulated_parts,
    true_margins,
)
from prlhf.core.splits import SplitPlan, data_hash
from prlhf.core.tastes import CONFLICT_WEIGHT, STATED
from prlhf.core.tokenize import TextLayout
from prlhf.prm.fit import fit_reward_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.reward_model import PersonalizedRewardModel

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = SimulationPlan(users=12, comparisons=60)
CHOICES = SimulationPlan(users=20, comparisons=300, seed=3)


@pytest.fixture(scope="module")
def pool() -> list[Candidates]:
    return small_pool()


@pytest.fixture(scope="module")
def made(pool: list[Candidates]) -> tuple[World, list[Comparison]]:
    return simulate(pool, CHOICES)


def margins_of(pool: Sequence[Candidates], plan: SimulationPlan) -> np.ndarray:
    found = true_margins(simulate(pool, plan)[1])
    assert found is not None
    return found


def sigmoid(margins: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-margins))


def z_score(margins: np.ndarray) -> float:
    """How many standard deviations the number of choices for the better response is off Bradley-Terry's."""
    expected = sigmoid(np.abs(margins))
    return float(((margins > 0) - expected).sum() / np.sqrt((expected * (1 - expected)).sum()))


def test_rows_are_the_seeds(pool: list[Candidates]) -> None:
    rows = simulate(pool, SMALL)[1]
    assert rows == simulate(pool, SMALL)[1]
    assert len(rows) == 12 * 60
    other = simulate(pool, replace(SMALL, seed=1))[1]
    assert sum(a == b for a, b in zip(rows, other, strict=True)) < 10


def test_columns_hold_the_utilities_of_the_texts(made: tuple[World, list[Comparison]]) -> None:
    world, rows = made
    for row in rows[::7]:
        chosen, rejected = (world.utility(row.user.id, text) for text in (row.chosen, row.rejected))
        assert (row.extra["utility_chosen"], row.extra["utility_rejected"]) == (chosen, rejected)
        assert row.extra["group"] == world.users[str(row.user.id)].group
        assert row.extra["taste"] == world.users[str(row.user.id)].taste


def test_choices_follow_bradley_terry(made: tuple[World, list[Comparison]]) -> None:
    """In total, and among pairs of every difficulty."""
    found = true_margins(made[1])
    assert found is not None
    assert abs(z_score(found)) < 4
    order = np.argsort(np.abs(found))
    for part in np.array_split(found[order], 8):
        assert abs(z_score(part)) < 4
        assert (part > 0).mean() == pytest.approx(sigmoid(np.abs(part)).mean(), abs=0.06)


def test_strength_makes_choices_surer(pool: list[Candidates]) -> None:
    plans = [replace(CHOICES, comparisons=150, strength=strength) for strength in (1e-6, 0.5, 3.0, 12.0, 1e6)]
    margins = [margins_of(pool, plan) for plan in plans]
    assert all(abs(z_score(found)) < 4 for found in margins[:-1])
    right = [(found > 0).mean() for found in margins]
    assert right == sorted(right)
    assert right[0] == pytest.approx(0.5, abs=0.04)
    assert right[-1] > 0.995  # ties are left to chance
    pairs = 2 * 6 / 5  # mean square of the difference of two of six, in variances
    assert np.square(margins[2]).mean() == pytest.approx(pairs * 3**2, rel=0.1)


@pytest.mark.parametrize("properties", [tuple(PROPERTIES), ("length",), ("question", "length", "you")])
def test_spread_within_a_prompt_is_the_strength(pool: list[Candidates], properties: tuple[str, ...]) -> None:
    """For every user; prompts with a single response, where nothing can be chosen, do not count."""
    single = [Candidates(f"Only {i}", (f"Only {i}!",)) for i in range(30)]
    world = make_world([*pool, *single], replace(SMALL, properties=properties, strength=2.5))
    for user in world.users:
        utilities = [np.asarray([world.utility(user, text) for text in c.responses]) for c in pool]
        deviations = np.concatenate([u - u.mean() for u in utilities])
        assert deviations.std() == pytest.approx(2.5, rel=1e-9)


def main_taste(user: SimulatedUser) -> tuple[str, int]:
    name = max(user.weights, key=lambda n: abs(user.weights[n]))
    return name, int(np.sign(user.weights[name]))


@pytest.mark.parametrize("conflict", ["length", "question"])
def test_groups_differ_in_the_sign_on_the_conflict(pool: list[Candidates], conflict: str) -> None:
    world = make_world(pool, SimulationPlan(users=40, conflict=conflict))
    assert Counter(u.group for u in world.users.values()) == {"majority": 28, "minority": 12}
    for user in world.users.values():
        assert (user.weights[conflict] > 0) == (user.group == "majority")
        largest = max(abs(w) for w in user.weights.values())
        assert abs(user.weights[conflict]) / largest == pytest.approx(
            1 if main_taste(user)[0] == conflict else CONFLICT_WEIGHT
        )


def test_main_tastes_are_balanced_and_named(pool: list[Candidates]) -> None:
    world = make_world(pool, SimulationPlan(users=48))
    counts = Counter(main_taste(user) for user in world.users.values())
    for name, made in PROPERTIES.items():
        assert counts[name, 1] + counts[name, -1] == 8
        if name != "length":
            assert counts[name, 1] == counts[name, -1] == 4
        for user in world.users.values():
            if main_taste(user)[0] == name:
                assert user.taste == (made.more if user.weights[name] > 0 else made.less)


def test_no_pair_comes_twice_to_a_user(pool: list[Candidates]) -> None:
    """Not even where the plan takes all pairs, or the pool holds a prompt and a response more than once."""
    few = pool[:4]
    turned = [Candidates(c.prompt, (*c.responses[::-1], c.responses[0])) for c in few]
    rows = simulate([*few, *turned], SimulationPlan(users=5, comparisons=4 * 15))[1]
    seen = [(r.user.id, r.prompt, frozenset((r.chosen, r.rejected))) for r in rows]
    assert len(set(seen)) == len(seen) == 5 * 4 * 15
    assert all(row.chosen != row.rejected for row in rows)


def test_the_papers_controlled_conflict(pool: list[Candidates]) -> None:
    """On one property everybody likes more of it or less, and nothing else counts."""
    plan = SimulationPlan(users=10, comparisons=80, properties=("length",), strength=1e6, user_text=True)
    world, rows = simulate(pool, plan)
    assert {round(w, 3) for user in world.users.values() for w in user.weights.values()} == {1e6, -1e6}
    for row in rows:
        longer = len(words(row.chosen)) - len(words(row.rejected))
        assert longer >= 0 if row.extra["group"] == "majority" else longer <= 0
    for user in world.users.values():
        said = user.user.text.lower()
        assert ("detailed answers" in said, "brief answers" in said) == (
            (True, False) if user.group == "majority" else (False, True)
        )


def test_user_text_states_likes_and_changes_no_choice(pool: list[Candidates]) -> None:
    plan = replace(SMALL, user_text=True)
    world, rows = simulate(pool, plan)
    for user in world.users.values():
        said, largest = user.user.text.lower(), max(abs(w) for w in user.weights.values())
        for name, weight in user.weights.items():
            phrases = {PROPERTIES[name].more: weight > 0, PROPERTIES[name].less: weight < 0}
            for phrase, meant in phrases.items():
                assert (phrase in said) == (meant and abs(weight) / largest >= STATED)
        assert said.index(user.taste) == min(said.index(p) for p in phrases_in(said))
        assert user.user.text[0].isupper()
        assert user.user.text.endswith((".", "too."))
    without = simulate(pool, SMALL)[1]
    assert [replace(row, user=User(row.user.id)) for row in rows] == without
    assert {row.user.text for row in without} == {""}


def phrases_in(said: str) -> list[str]:
    return [p for made in PROPERTIES.values() for p in (made.more, made.less) if p in said]


def test_the_worlds_scorer_gives_utilities(made: tuple[World, list[Comparison]], pool: list[Candidates]) -> None:
    world = made[0]
    user = next(iter(world.users.values()))
    (scores,) = world.scorer()([ScoreRequest(user.user, pool[0].prompt, pool[0].responses)])
    expected = [world.utility(user.user.id, text) for text in pool[0].responses]
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)
    for stranger in ("nobody", None):
        with pytest.raises(KeyError, match="not one of the 20 simulated users"):
            world.utility(stranger, "text")


def test_world_file_round_trip(pool: list[Candidates], tmp_path: Path) -> None:
    world = make_world(pool, replace(SMALL, user_text=True))
    world.save(tmp_path / "new" / "world.json")
    again = World.load(tmp_path / "new" / "world.json")
    assert again == world
    assert again.utility("user01", "You? Yes!") == world.utility("user01", "You? Yes!")


def damaged(facts: dict[str, Any], how: str) -> bytes:
    text = json.dumps(facts)
    if how == "cut":
        return text[: len(text) // 2].encode()
    if how == "not UTF-8":
        return b"\xff\xfe" + text.encode()
    if how in ("[]", "null", "{}", '"text"'):
        return how.encode()
    changed: dict[str, Any] = {"format": 99, "users": [], "scales": {}, "plan": {"users": 3}}
    return json.dumps({**facts, how: changed[how]}).encode()


@pytest.mark.parametrize("how", ["cut", "not UTF-8", "[]", "null", "{}", '"text"', "format", "users", "scales", "plan"])
def test_damaged_world_file_is_named(pool: list[Candidates], tmp_path: Path, how: str) -> None:
    path = tmp_path / "world.json"
    make_world(pool, SMALL).save(path)
    path.write_bytes(damaged(json.loads(path.read_text()), how))
    with pytest.raises(DataError, match=r"world\.json: not a file of simulated users"):
        World.load(path)


def test_missing_world_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/world\.json: No such file.*prlhf data simulate"):
        World.load(tmp_path / "nowhere" / "world.json")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"users": 0}, "--users"),
        ({"comparisons": 0}, "--comparisons"),
        ({"properties": ("length", "charm")}, "--properties.*'charm'.*exclamation"),
        ({"properties": ("length", "list", "length")}, "--properties length,list,length: each one once"),
        ({"properties": ("list",)}, "--conflict length.*--properties list"),
        ({"properties": ()}, "--conflict length"),
        ({"conflict": "charm"}, "--conflict charm"),
        ({"majority": 1.1}, "--majority"),
        ({"majority": -0.1}, "--majority"),
        ({"majority": float("nan")}, "--majority"),
        ({"strength": 0.0}, "--strength"),
        ({"strength": float("nan")}, "--strength"),
        ({"strength": float("inf")}, "--strength"),
    ],
)
def test_bad_plan_names_the_flag(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SimulationPlan(**bad)


def test_pool_that_gives_nothing_to_choose_is_refused(pool: list[Candidates]) -> None:
    flat = [Candidates("p", ("It rains today.", "Your boots are wet."), "pool:1")]
    with pytest.raises(DataError, match="do not differ in list, exclamation, question"):
        simulate(flat, SimulationPlan(users=2, comparisons=1, properties=("list", "exclamation", "length", "question")))
    alike = [Candidates("p", ("Yes.", "Yes."), "pool:1"), Candidates("q", ("No.",), "pool:2")]
    with pytest.raises(DataError, match="the pool has 0 pairs, too few for 1 comparisons"):
        simulate(alike, SimulationPlan(users=2, comparisons=1))
    with pytest.raises(DataError, match=r"the pool has 600 pairs, too few for 601"):
        simulate(pool, SimulationPlan(users=2, comparisons=601))
    with pytest.raises(DataError, match=r"pool:7: responses: one is empty"):
        simulate([*pool, Candidates("p", ("Yes.", " \n"), "pool:7")], SMALL)


@pytest.fixture(scope="module")
def parts(pool: list[Candidates], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Comparison]]:
    path = write_pool(tmp_path_factory.mktemp("pool") / "P.jsonl", pool)
    return simulated_parts(path, SMALL, SplitPlan("prompt", 0.2, 0.3, 0.25))[1]


def test_parts_share_no_prompt_and_unseen_users_stay_unseen(parts: dict[str, list[Comparison]]) -> None:
    prompts = {name: {row.prompt for row in rows} for name, rows in parts.items()}
    learned = ("train", "validation", "test")
    assert sum(len(prompts[name]) for name in learned) == len(set().union(*(prompts[name] for name in learned)))
    assert not prompts["onboarding"] & prompts["test"]
    users = {name: {row.user.id for row in rows} for name, rows in parts.items()}
    assert len(users["onboarding"]) == 3
    assert not users["onboarding"] & (users["train"] | users["validation"])
    assert users["onboarding"] <= users["test"]
    assert len(users["train"]) == 9
    assert sum(map(len, parts.values())) == 12 * 60


def fitted(parts: dict[str, list[Comparison]], backbone: Backbone) -> PersonalizedRewardModel:
    train, validation = (Comparisons(parts[name], "simulated") for name in ("train", "validation"))
    return fit_reward_model(train, validation, backbone, TextLayout(), "mean", HeadConfig())


def test_no_trainer_reads_the_true_utilities(parts: dict[str, list[Comparison]], tiny_backbone: Backbone) -> None:
    """What is learned is the same to the last bit without them, and with wrong ones."""
    draws = random.Random(0)
    bare = {name: [replace(row, extra={}) for row in rows] for name, rows in parts.items()}
    wrong = {
        name: [replace(row, extra={**row.extra, **{c: draws.random() for c in UTILITY_COLUMNS}}) for row in rows]
        for name, rows in parts.items()
    }
    first, *others = (fitted(each, tiny_backbone) for each in (parts, bare, wrong))
    learned = first.user_model.state_dict()
    assert any(value.abs().max() > 0 for value in learned.values())
    for other in others:
        assert all(torch.equal(value, learned[key]) for key, value in other.user_model.state_dict().items())
        assert torch.equal(other.head.uniform, first.head.uniform)
    assert data_hash(parts["train"]) == data_hash(bare["train"]) == data_hash(wrong["train"])


FOREIGN = {"utility_chosen": "high", "utility_rejected": "low"}


def test_true_margins_need_both_columns_in_every_row(made: tuple[World, list[Comparison]]) -> None:
    rows = [replace(made[1][0], extra=dict(zip(UTILITY_COLUMNS, pair, strict=True))) for pair in ((3, 1), ("2", "2.5"))]
    assert true_margins(rows).tolist() == [2, -0.5]  # type: ignore[union-attr]
    for extra in ({}, {"utility_chosen": 1.0}, {"utility_chosen": 1.0, "utility_rejected": None}, FOREIGN):
        assert true_margins([*rows, replace(rows[0], extra=extra)]) is None


@pytest.fixture(scope="module")
def work(pool: list[Candidates], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulate")
    write_pool(folder / "mine.jsonl", pool)
    return folder


OWN = ("data", "simulate", "--pool", "mine.jsonl", "--users", 10, "--comparisons", 60)


def test_command_writes_parts_world_and_ceilings(work: Path) -> None:
    done = prlhf(*OWN, "--out", "D", "--user-text", "--seed", 5, "--json", cwd=work)
    figures = json.loads(done.stdout)
    assert figures == json.loads((work / "D" / "split.json").read_text())
    assert (figures["pool"], figures["plan"]["seed"]) == ("mine.jsonl", 5)
    world, rows = World.load(work / "D" / "world.json"), 0
    assert list(figures["parts"]) == ["train", "validation", "test", "onboarding"]
    for name, part in figures["parts"].items():
        read = load_comparisons(work / "D" / f"{name}.parquet")
        rows += len(read)
        assert (part["rows"], part["hash"]) == (len(read), data_hash(read.rows))
        margins = [world.utility(r.user.id, r.chosen) - world.utility(r.user.id, r.rejected) for r in read]
        right = np.mean([0.5 * (np.sign(m) + 1) for m in margins])
        assert part["ceiling"]["value"] == pytest.approx(right)
        assert 0.5 < part["ceiling"]["low"] < right < part["ceiling"]["high"] < 1
        assert {r.user.text for r in read} == {world.users[str(r.user.id)].user.text for r in read}
    assert rows == 600
    assert figures["parts"]["train"]["users"] == 8


def test_command_again_removes_a_part_that_is_no_more(work: Path) -> None:
    prlhf(*OWN, "--out", "E", cwd=work)
    assert (work / "E" / "onboarding.parquet").is_file()
    shown = prlhf(*OWN, "--out", "E", "--unseen-users", 0, cwd=work).stdout
    assert not (work / "E" / "onboarding.parquet").exists()
    assert "mine.jsonl" in shown
    assert "ceiling" in shown
    assert "onboarding" not in shown


def test_command_takes_the_everyday_pool_and_some_properties(work: Path) -> None:
    args = ("--users", 10, "--comparisons", 50, "--properties", "length, list", "--conflict", "list", "--json")
    figures = json.loads(prlhf("data", "simulate", "--out", "F", *args, cwd=work).stdout)
    assert figures["pool"] == POOL.name
    assert figures["plan"]["properties"] == ["length", "list"]
    assert all(0.5 < part["ceiling"]["value"] < 1 for part in figures["parts"].values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--strength", 0), "--strength must be a number greater than 0, found 0"),
        (("--users", 0), "--users must be at least 1"),
        (("--properties", "length,charm"), "'charm'"),
        (("--conflict", "charm"), "--conflict charm"),
        (("--majority", 2), "--majority"),
        (("--unseen-users", 1), "--unseen-users"),
        (("--comparisons", 601), "600 pairs"),
        (("--pool", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ],
)
def test_command_refuses_what_it_can_not_do(work: Path, flags: tuple[object, ...], said: str) -> None:
    done = prlhf(*OWN, "--out", "bad", *flags, cwd=work, code=2)
    assert said in done.stderr
    assert "--candidates" not in done.stderr
    assert not (work / "bad").exists()


def test_the_everyday_pool_is_whole() -> None:
    assert POOL.stat().st_size < 2_000_000
    pool = read_candidates(POOL)
    assert len(pool) >= 190
    assert len({str(c.prompt).casefold() for c in pool}) == len(pool)
    for found in pool:
        assert len(set(found.responses)) == len(found.responses) == 8, found.place
        for text in found.responses:
            assert 1 <= len(words(text)) <= 100, found.place
            assert whole_sentences(text) == text == text.strip(), found.place

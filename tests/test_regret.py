"""Regret computed by hand, row 0 of a scorer, and the ceiling of simulated rows."""

import numpy as np
import pytest
import torch

from prlhf.core.candidates import Candidates
from prlhf.core.comparisons import Comparison, User
from prlhf.core.scoring import Scorer, ScoreRequest, each
from prlhf.eval.baselines import row0
from prlhf.eval.preference import evaluate
from prlhf.eval.regret import regret

POOL = [Candidates("p", ("a", "b", "c")), Candidates("q", ("d", "e", "f"))]
USERS = [User("ann"), User("bob")]
# Variances within the prompts 2 and 2, so ann's unit is the root of 2; 6 and 0, so bob's is the root of 3.
UTILITIES = {
    "ann": {"a": 0.0, "b": 0.0, "c": 3.0, "d": 3.0, "e": 0.0, "f": 0.0},
    "bob": {"a": -3.0, "b": 0.0, "c": 3.0, "d": 7.0, "e": 7.0, "f": 7.0},
}
UNIT = {"ann": 2**0.5, "bob": 3**0.5}


def utility(scale: float = 1.0, shift: float = 0.0) -> Scorer:
    return each(lambda user, prompt, response: scale * UTILITIES[user.id or ""][response] + shift)


def always(order: str) -> Scorer:
    """Prefers responses that come first in a word."""
    return each(lambda user, prompt, response: -float(order.index(response)))


def test_regret_by_hand() -> None:
    found = regret(utility(), {"middle": always("beadcf"), "first": always("abcdef")}, USERS, POOL)
    table = found.users.set_index("user_id")
    assert list(table.index) == ["ann", "bob"]
    # ann: a and b lose 3, d nothing and e 3. bob: a loses 6, b 3, and of q none loses anything.
    assert table.loc["ann", "middle"] == pytest.approx((3 + 3) / 2 / UNIT["ann"])
    assert table.loc["ann", "first"] == pytest.approx((3 + 0) / 2 / UNIT["ann"])
    assert table.loc["bob", "middle"] == pytest.approx((3 + 0) / 2 / UNIT["bob"])
    assert table.loc["bob", "first"] == pytest.approx((6 + 0) / 2 / UNIT["bob"])
    assert table.loc["ann", "random"] == pytest.approx((2 + 2) / 2 / UNIT["ann"])
    assert table.loc["bob", "random"] == pytest.approx((3 + 0) / 2 / UNIT["bob"])
    assert table["oracle"].tolist() == [0, 0]
    assert table["n"].tolist() == [2, 2]
    for arm in ("middle", "first", "random"):
        assert found.figures[arm]["value"] == pytest.approx(table[arm].mean())
        assert found.figures[arm]["n"] == 4
        assert found.figures[arm]["low"] <= found.figures[arm]["value"] <= found.figures[arm]["high"]
    assert found.figures["oracle"] == {"value": 0, "low": 0, "high": 0, "n": 4}


def test_gold_loses_nothing_and_its_opposite_most() -> None:
    arms = {"gold": utility(5, -2), "opposite": utility(-1)}
    arms |= {f"always {order}": always(order) for order in ("abcdef", "cbafed", "bacefd")}
    table = regret(utility(), arms, USERS, POOL).users
    assert (table["gold"] == 0).all()
    assert all((table["opposite"] >= table[arm]).all() for arm in ["random", *arms])
    worst = [(3 + 3) / 2 / UNIT["ann"], (6 + 0) / 2 / UNIT["bob"]]
    assert table["opposite"].tolist() == pytest.approx(worst)


def test_random_is_the_expectation_of_blind_picks() -> None:
    draws = np.random.default_rng(0)
    found = regret(utility(), {"blind": each(lambda *_: draws.random())}, USERS * 500, POOL).users.set_index("user_id")
    assert found["blind"].to_numpy() == pytest.approx(found["random"].to_numpy(), abs=0.12)


def test_the_unit_is_the_users_spread() -> None:
    """However strongly somebody feels, and wherever their zero lies."""
    arms = {"first": always("abcdef"), "middle": always("beadcf")}
    one, large = (regret(utility(*by), arms, USERS, POOL) for by in ((1.0, 0.0), (1000.0, 500.0)))
    for name, found in one.figures.items():
        assert large.figures[name] == pytest.approx(found, rel=1e-5)
    assert np.allclose(one.users[["random", "first"]], large.users[["random", "first"]], rtol=1e-5)


def test_somebody_to_whom_all_is_equal_loses_nothing() -> None:
    found = regret(each(lambda *_: 2.0), {"first": always("abcdef")}, USERS, POOL)
    assert found.figures["first"]["value"] == found.figures["random"]["value"] == 0


def test_prompts_with_one_response_are_left_out() -> None:
    arms = {"first": always("abcdef")}
    more = [*POOL, Candidates("r", ("a",)), Candidates("s", ())]
    assert regret(utility(), arms, USERS, more).figures == regret(utility(), arms, USERS, POOL).figures


@pytest.mark.parametrize("name", ["random", "oracle"])
def test_names_of_the_baselines_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'.*always there"):
        regret(utility(), {name: utility()}, USERS, POOL)


@pytest.mark.parametrize(("users", "pool"), [([], POOL), (USERS, []), (USERS, [Candidates("p", ("a",))])])
def test_nothing_to_pick_is_refused(users: list[User], pool: list[Candidates]) -> None:
    with pytest.raises(ValueError, match="at least one user and one prompt with two responses"):
        regret(utility(), {}, users, pool)


def test_row_0_of_a_scorer_gives_nobodys_score_and_keeps_the_text() -> None:
    asked: list[ScoreRequest] = []

    def scorer(requests: list[ScoreRequest]) -> list[torch.Tensor]:
        asked.extend(requests)
        return [torch.full((len(r.responses),), 0.0 if r.user.id is None else 1.0) for r in requests]

    requests = [ScoreRequest(User("ann", "I like lists."), "p", ("a", "b")), ScoreRequest(User(None), "q", ("c",))]
    assert [s.tolist() for s in row0(scorer)(requests)] == [[0, 0], [0]]
    assert [r.user for r in asked] == [User(None, "I like lists."), User(None)]
    assert [(r.prompt, r.responses) for r in asked] == [("p", ("a", "b")), ("q", ("c",))]


def rows_of(*margins: float | None, user: str = "ann") -> list[Comparison]:
    """A row per difference of the true utilities; None for a row that has none."""
    extras = [{} if m is None else {"utility_chosen": 1.0 + m, "utility_rejected": 1.0} for m in margins]
    return [Comparison(User(user), f"p{i}", "aa", "b", extra=extra) for i, extra in enumerate(extras)]


def test_the_ceiling_is_the_accuracy_of_the_true_utility() -> None:
    """A scorer that is never right is 62.5 points below it, and it counts unseen users too."""
    rows = [*rows_of(2.0, 1.0, 0.0, -1.0), *rows_of(-3.0, -0.5, user="new")]
    wrong = each(lambda user, prompt, response: -float(len(response)))
    figures = evaluate("mine", wrong, rows, lambda u: u.id == "ann", {}, {None: 1}).figures
    ceiling = figures["accuracy"]["ceiling"]
    assert ceiling["top"]["value"] == (1 + 1 + 0.5 + 0) / 4
    assert ceiling["top_row0"]["value"] is None
    assert ceiling["generic"]["value"] == 0
    assert ceiling["average"]["all"]["value"] == 0.625
    assert figures["difference"]["ceiling"]["value"] == -0.625


def test_rows_without_true_utilities_have_no_ceiling() -> None:
    scorer = each(lambda user, prompt, response: float(len(response)))
    found = evaluate("mine", scorer, rows_of(1.0, None), lambda u: True, {}, {None: 1})
    assert "ceiling" not in found.figures["accuracy"]
    assert "ceiling" not in found.figures["difference"]
    assert "ceiling" not in found.users

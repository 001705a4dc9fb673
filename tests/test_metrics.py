"""Metrics against values computed by hand."""

import numpy as np
import pytest

from prlhf.core.comparisons import Comparison, User
from prlhf.core.figures import NOTHING, wilson
from prlhf.core.scoring import each
from prlhf.eval import metrics
from prlhf.eval.baselines import length_directions, shuffled_users
from prlhf.eval.preference import evaluate


def test_accuracy_counts_a_tie_as_half_and_refuses_nan() -> None:
    assert metrics.accuracies(np.array([2.0, -1.0, 0.0])).tolist() == [1, 0, 0.5]
    with pytest.raises(ValueError, match="comparison 1"):
        metrics.accuracies(np.array([1.0, np.nan]))


def test_log_loss_at_zero_margin_is_log_2_and_does_not_overflow() -> None:
    assert metrics.log_losses(np.array([0.0, -1000.0])) == pytest.approx([np.log(2), 1000])


def test_wilson_of_8_in_10() -> None:
    found = wilson(8, 10)
    assert (found["value"], found["n"]) == (0.8, 10)
    assert (found["low"], found["high"]) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert wilson(0, 0) == NOTHING


def test_mean_over_users_is_students_t() -> None:
    found = metrics.mean_over_users(np.array([0.5, 0.6, 0.7]))
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert (found["value"], found["low"], found["n"]) == pytest.approx((0.6, 0.6 - half, 3), abs=1e-5)
    assert metrics.mean_over_users(np.array([0.5]))["low"] == 0


def test_bootstrap_draws_whole_clusters() -> None:
    """Ten copies of the same answer are one observation: clustered, the interval stays as wide as without copies."""
    values, names = np.array([0.0, 1.0] * 20), np.arange(40)
    copied = metrics.clustered_mean(np.repeat(values, 10), np.repeat(names, 10))
    single = metrics.clustered_mean(values, names)
    assert copied["high"] - copied["low"] == pytest.approx(single["high"] - single["low"], rel=0.05)
    assert single["high"] - single["low"] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.1)


def test_bootstrap_draws_users_from_thirty_on() -> None:
    assert metrics.resampling_units(range(30), ["p"] * 30)[0] == "user"
    assert metrics.resampling_units(range(29), ["p"] * 29)[0] == "prompt"


def test_paired_difference_cancels_what_both_share() -> None:
    hard = np.random.default_rng(0).random(200) < 0.5
    found = metrics.paired_difference(hard + 0.0, hard - 0.25, range(200))
    assert found["value"] == 0.25
    assert 0.2 < found["low"] < 0.25 < found["high"] < 0.3


def test_no_interval_is_without_width() -> None:
    """Four right answers to one prompt, or to four, do not prove a model right on all."""
    one = metrics.clustered_mean(np.ones(4), ["p"] * 4)
    assert (one["value"], one["low"], one["high"]) == (1, 0, 1)
    four = metrics.clustered_mean(np.ones(4), list("abcd"))
    assert four["low"] == pytest.approx(wilson(4, 4)["low"])
    alike = metrics.paired_difference(np.ones(4), np.ones(4), list("abcd"))
    assert alike["low"] < 0 < alike["high"]


def rows_of(user: str | None, longer: int, shorter: int, group: str = "g") -> list[Comparison]:
    long, short = "long response", "short"
    pairs = [(long, short)] * longer + [(short, long)] * shorter
    return [Comparison(User(user), f"p{i}", c, r, f"x:{i}", {"group": group}) for i, (c, r) in enumerate(pairs)]


def test_length_rule_directions() -> None:
    assert length_directions({"a": (3, 1), "b": (0, 3)}) == {"a": 1, "b": -1, None: -1}


def test_shuffled_users_never_keep_their_own_id() -> None:
    users = [User(u) for u in "abcde"]
    for seed in range(20):
        swapped = shuffled_users(users, list("abcde"), seed)
        assert all(mine.id != theirs.id for mine, theirs in zip(users, swapped, strict=True))
        assert {user.id for user in swapped} == set("abcde")
    assert shuffled_users([User(None), User("new")], list("ab")) == [User(None), User("new")]


def test_evaluation_follows_the_papers_definitions() -> None:
    """The scorer knows a (longer) and b (shorter), row 0 says longer; c is unseen and prefers shorter 3 times in 4."""
    taste = {"a": 1.0, "b": -1.0}
    rows = rows_of("a", 4, 0, "majority") + rows_of("b", 1, 3, "minority") + rows_of("c", 1, 3)
    scorer = each(lambda user, prompt, response: taste.get(user.id or "", 1.0) * len(response))
    uniform = each(lambda user, prompt, response: float(len(response)))
    found = evaluate(
        "mine",
        scorer,
        rows,
        lambda u: u.id in taste,
        {"uniform": uniform, "other": scorer},
        {"a": 1, "b": -1, None: 1},
        "group",
    )
    accuracy = found.figures["accuracy"]
    assert accuracy["mine"]["top"]["value"] == 7 / 8
    assert accuracy["mine"]["top_row0"]["value"] == 5 / 8
    assert accuracy["mine"]["generic"]["value"] == 1 / 4
    assert accuracy["mine"]["average"]["all"]["value"] == pytest.approx((1 + 0.75) / 2)
    assert accuracy["mine"]["average"]["minority"]["value"] == 0.75
    assert accuracy["uniform"]["top"]["value"] == 5 / 8
    assert accuracy["other"] == accuracy["mine"]  # a baseline that reads the user has a row 0 of its own
    assert accuracy["length_rule"]["top"]["value"] == 7 / 8
    assert accuracy["length_rule"]["top_row0"]["value"] == 5 / 8
    assert accuracy["shuffled_users"]["top"]["value"] == 1 / 8
    assert found.figures["difference"]["uniform"]["value"] == pytest.approx(2 / 8)
    assert {"value", "low", "high", "n"} == set(accuracy["mine"]["generic"])
    assert found.users.set_index("user_id").loc["c", "known"] == False  # noqa: E712


def test_evaluation_without_unseen_users_says_so() -> None:
    scorer = each(lambda user, prompt, response: float(len(response)))
    found = evaluate("mine", scorer, rows_of("a", 1, 1), lambda u: True, {}, {None: 1})
    assert found.figures["accuracy"]["mine"]["generic"] == NOTHING
    assert "shuffled_users" not in found.figures["accuracy"]  # nobody to swap with

import random
from collections import Counter

import pytest

from prlhf.core import splits
from prlhf.core.comparisons import Comparison, Comparisons, DataError, RowPolicy, User
from prlhf.core.sources import load_comparisons
from prlhf.core.splits import SplitPlan, group_key, split, to_records, write_parquet

LEARNED = ("train", "validation", "test")
BYS = ("prompt", "pair", "topic", "user_id")


def comparison(number, user=None, prompt=None, **extra):
    prompt = f"prompt {number}" if prompt is None else prompt
    return Comparison(User(user or f"u{number % 7}"), prompt, f"a {number}", f"b {number}", f"rows:{number}", extra)


def dataset(groups=60, sizes=(1, 2, 3, 4)):
    """Rows in groups of mixed sizes, the group being the prompt and the column `topic`."""
    rows = []
    for group in range(groups):
        for _ in range(sizes[group % len(sizes)]):
            number = len(rows)
            rows.append(comparison(number, f"u{number % 11}", f"prompt {group}", topic=group))
    return Comparisons(rows, "rows")


def places(rows):
    return sorted(row.place for row in rows)


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize("unseen_users", [0.0, 0.3])
def test_each_row_is_in_one_part_and_no_group_in_two(by, unseen_users):
    rows = dataset()
    parts = split(rows, SplitPlan(by, validation=0.2, test=0.3, unseen_users=unseen_users))
    assert places([row for part in parts.values() for row in part]) == places(rows)
    groups = Counter(group for name in LEARNED for group in {group_key(row, by) for row in parts[name]})
    assert set(groups.values()) == {1}


def test_shares_are_close_to_what_was_asked():
    rows = dataset(400)
    parts = split(rows, SplitPlan(validation=0.1, test=0.2))
    assert len(parts["validation"]) / len(rows) == pytest.approx(0.1, abs=0.01)
    assert len(parts["test"]) / len(rows) == pytest.approx(0.2, abs=0.01)
    assert parts["onboarding"] == []


def test_split_depends_on_the_seed_and_not_on_row_order():
    rows = dataset()
    mixed = rows.subset(random.Random(5).sample(rows.rows, len(rows)))
    plan = SplitPlan(unseen_users=0.3)
    first, again, other = split(rows, plan), split(mixed, plan), split(rows, SplitPlan(unseen_users=0.3, seed=1))
    assert {name: places(part) for name, part in first.items()} == {n: places(part) for n, part in again.items()}
    assert places(first["test"]) != places(other["test"])


def test_unseen_users_are_only_in_test_and_onboarding():
    rows = dataset()
    parts = split(rows, SplitPlan(validation=0.1, test=0.3, unseen_users=0.3))
    users = {name: {row.user.id for row in part} for name, part in parts.items()}
    unseen = set(rows.user_ids) - users["train"] - users["validation"]
    assert len(unseen) == round(0.3 * len(set(rows.user_ids)))
    assert users["onboarding"] == unseen
    assert users["test"] & unseen


def test_rows_without_user_are_no_unseen_user():
    rows = dataset()
    rows = rows.subset([*rows.rows, *[Comparison(User(None), f"prompt {i}", "a", "b", f"none:{i}") for i in range(40)]])
    parts = split(rows, SplitPlan(unseen_users=0.5))
    assert None not in {row.user.id for row in parts["onboarding"]}


@pytest.mark.parametrize("folds", [2, 3, 5, 7, 10])
@pytest.mark.parametrize("seed", range(8))
def test_folds_cover_all_rows_with_disjoint_test_parts(folds, seed):
    rows = dataset(50, sizes=(2, 1, 3))
    found = []
    for fold in range(1, folds + 1):
        parts = split(rows, SplitPlan(validation=0.1, fold=fold, folds=folds, seed=seed))
        assert places([row for part in parts.values() for row in part]) == places(rows)
        found += parts["test"]
    assert places(found) == places(rows)


def test_by_prompt_ignores_case_and_space():
    texts = ["Name  a fruit", "name a FRUIT ", "\tName a\nfruit"]
    assert len({group_key(comparison(0, prompt=text), "prompt") for text in texts}) == 1
    conversations = [[{"role": "user", "content": text}] for text in texts]
    assert len({group_key(comparison(0, prompt=turns), "prompt") for turns in conversations}) == 1
    assert group_key(comparison(0, prompt="Name a fruit!"), "prompt") != group_key(
        comparison(0, prompt=texts[0]), "prompt"
    )


def test_by_pair_ignores_the_order_of_the_two_responses():
    one, other = (Comparison(User("u"), "p", *texts) for texts in (("Yes", "No"), ("no ", "yes")))
    assert group_key(one, "pair") == group_key(other, "pair")
    assert group_key(one, "pair") != group_key(Comparison(User("u"), "p", "Yes", "Maybe"), "pair")
    assert group_key(one, "pair") != group_key(Comparison(User("u"), "q", "Yes", "No"), "pair")


def test_by_column_and_by_user():
    row = comparison(0, "ann", topic=3)
    assert group_key(row, "topic") == "3"
    assert group_key(row, "user_id") == "ann"


def test_by_unknown_column_names_the_columns_there_are():
    with pytest.raises(DataError, match=r"--by topics: no such column in rows:0; columns are topic"):
        split(dataset(), SplitPlan(by="topics"))


def test_too_few_groups_are_refused():
    with pytest.raises(DataError, match="no row is left for"):
        split(dataset(1, sizes=(9,)), SplitPlan())


@pytest.mark.parametrize(
    "settings",
    [
        {"validation": -0.1},
        {"test": 1.0},
        {"validation": 0.5, "test": 0.5},
        {"unseen_users": 1.5},
        {"fold": 0, "folds": 5},
        {"fold": 6, "folds": 5},
        {"validation": 0.5, "fold": 1, "folds": 2},
    ],
)
def test_impossible_plans_are_refused(settings):
    with pytest.raises(ValueError, match=r"must lie|leave nothing|must lie between"):
        SplitPlan(**settings)


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ROWS = {
    "plain": [comparison(0), comparison(1)],
    "conversational": [comparison(0, prompt=CONVERSATION), comparison(1, prompt=CONVERSATION[1:])],
    "extras": [comparison(0, group="a", utility=[0.5, 1.0]), comparison(1, group="b", utility=[1.0])],
    "extras in later rows only": [comparison(0), comparison(1, group="b")],
    "user text": [Comparison(User("ann", "Likes fruit."), "p", "a", "b"), Comparison(User("bob"), "p", "a", "b")],
    "no user": [Comparison(User(None), "p", "a", "b"), Comparison(User("bob"), "p", "a", "b")],
    "odd text": [Comparison(User("ann"), '<b>\n"q",\u2028 \U0001f600', " a", "b\r\n")],
}


@pytest.mark.parametrize("kind", ROWS)
def test_parquet_round_trip(tmp_path, kind):
    rows, path = ROWS[kind], tmp_path / "part.parquet"
    write_parquet(rows, path)
    read = load_comparisons(path, policy=RowPolicy(missing_user="generic"))

    def facts(row):
        extra = {key: value for key, value in row.extra.items() if value is not None}
        return row.user, row.prompt, row.chosen, row.rejected, extra

    assert [facts(row) for row in read] == [facts(row) for row in rows]
    assert list(tmp_path.iterdir()) == [path]


def test_mixed_prompts_are_all_written_as_conversations(tmp_path):
    write_parquet([comparison(0), comparison(1, prompt=CONVERSATION)], tmp_path / "part.parquet")
    read = load_comparisons(tmp_path / "part.parquet")
    assert read[0].prompt == [{"role": "user", "content": "prompt 0"}]
    assert read[1].prompt == CONVERSATION
    assert [row.chosen for row in read] == ["a 0", "a 1"]


def test_records_are_rows_of_the_format_that_is_read():
    assert to_records(ROWS["plain"])[0] == {
        "user_id": "u0",
        "prompt": "prompt 0",
        "chosen": "a 0",
        "rejected": "b 0",
    }


@pytest.mark.parametrize(
    "values", [(1, "b"), ("b", 1), ("b", {"a": 1}), ([1], "b"), ("\ud800", "b"), (2**70, 1), ({}, {})]
)
def test_columns_that_parquet_can_not_hold_are_named(tmp_path, values):
    rows = [comparison(i, group=value) for i, value in enumerate(values)]
    with pytest.raises(ValueError, match="group"):
        write_parquet(rows, tmp_path / "part.parquet")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "part.parquet"
    write_parquet(ROWS["plain"], path)
    old = path.read_bytes()

    def no_room(table, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", no_room)
    with pytest.raises(OSError, match="No space left"):
        write_parquet(ROWS["extras"], path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_data_hash_follows_texts_users_and_order():
    rows = [comparison(0), comparison(1)]
    hashes = [
        splits.data_hash(rows),
        splits.data_hash(rows[::-1]),
        splits.data_hash([comparison(0), comparison(1, "x")]),
    ]
    assert len(set(hashes)) == 3
    assert splits.data_hash([comparison(0, note="n"), comparison(1)]) == hashes[0]


def test_rows_without_a_prompt_of_their_own_are_not_split_by_prompt():
    """Else one question, cut where two answers part, would stand on both sides."""
    from prlhf.core.comparisons import RowPolicy, check

    rows = [
        {"user_id": "a", "chosen": f"Q{i // 4}? The {w}", "rejected": f"Q{i // 4}? No"}
        for i, w in enumerate("abcdefgh")
    ]
    found = check([(f"x:{i}", row) for i, row in enumerate(rows)], "x", RowPolicy())
    with pytest.raises(DataError, match="x:0: has no prompt of its own"):
        split(found, SplitPlan("prompt"))
    assert sum(map(len, split(found, SplitPlan("pair", validation=0.2, test=0.2)).values())) == 8

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prlhf.core.comparisons import (
    FIELDS,
    Comparison,
    DataError,
    Problem,
    RowPolicy,
    TooManyBadRows,
    User,
    comparison,
    response_text,
    to_prompt,
)
from prlhf.core.sources import load_comparisons

PLAIN = {"user_id": "ann", "prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A brick."}
GENERIC = RowPolicy(missing_user="generic")
KEEP = RowPolicy(identical="keep")


def turn(role, content):
    return {"role": role, "content": content}


def made(row, policy=None):
    return comparison(row, "rows.jsonl:1", policy or RowPolicy())


def wrote(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_plain_row():
    row = made({**PLAIN, "user_text": "Ann likes fruit.", "group": 3})
    expected = Comparison(
        User("ann", "Ann likes fruit."), "Name a fruit.", "An apple.", "A brick.", "rows.jsonl:1", {"group": 3}
    )
    assert row == expected


def test_conversational_row_with_explicit_prompt():
    prompt = [turn("system", "Be brief."), turn("user", "Name a fruit.")]
    row = made(
        {
            "user_id": "ann",
            "prompt": prompt,
            "chosen": [turn("assistant", "An apple.")],
            "rejected": [turn("assistant", "A brick.")],
        }
    )
    assert (row.prompt, row.chosen, row.rejected) == (prompt, "An apple.", "A brick.")


def test_conversational_prompt_takes_plain_responses():
    prompt = [turn("user", "Name a fruit.")]
    assert made({**PLAIN, "prompt": prompt}).prompt == prompt


def test_conversational_row_with_implicit_prompt():
    shared = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "A fruit?")]
    row = made(
        {
            "user_id": "ann",
            "chosen": [*shared, turn("assistant", "An apple.")],
            "rejected": [*shared, turn("assistant", "A brick.")],
        }
    )
    assert (row.prompt, row.chosen, row.rejected) == (shared, "An apple.", "A brick.")


def test_conversations_that_part_before_the_last_message_are_refused():
    row = made(
        {
            "user_id": "ann",
            "chosen": [turn("user", "Hi"), turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", "So.")],
            "rejected": [turn("user", "Hi"), turn("assistant", "No.")],
        }
    )
    assert (row.kind, row.field) == ("bad", "chosen")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: why? A: so", "Q: why? A: no", ("Q: why? A:", " so", " no")),
        ("Q: why?\nso", "Q: why?\nno", ("Q: why?\n", "so", "no")),
        ("Say yes or", "Say yes no", ("Say yes", " or", " no")),
    ],
)
def test_implicit_plain_prompt_is_what_both_begin_with(chosen, rejected, expected):
    row = made({"user_id": "ann", "chosen": chosen, "rejected": rejected})
    assert (row.prompt, row.chosen, row.rejected) == expected


@pytest.mark.parametrize("prompt", [None, float("nan")])
def test_absent_prompt_means_implicit(prompt):
    row = made({"user_id": "ann", "prompt": prompt, "chosen": "Q? Yes.", "rejected": "Q? No."})
    assert row.prompt == "Q?"


def test_one_plain_and_one_conversational_response_without_prompt():
    row = made({"user_id": "ann", "chosen": "Yes.", "rejected": [turn("assistant", "No.")]})
    assert (row.field, row.what) == ("rejected", "chosen and rejected must both be text or both be conversations")


def test_integer_id_equals_string_id(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", [{**PLAIN, "user_id": 1}, {**PLAIN, "user_id": "1"}])
    rows = load_comparisons(path)
    assert rows.user_ids == ["1", "1"]
    assert "2 comparisons of 1 users" in rows.notice()


@pytest.mark.parametrize("user_id", [True, 1.5, [1], {"id": 1}])
def test_other_types_are_no_user_id(user_id):
    assert made({**PLAIN, "user_id": user_id}).field == "user_id"
    assert made({**PLAIN, "user_id": user_id}, GENERIC).field == "user_id"


@pytest.mark.parametrize("user_id", [None, "", float("nan"), ...])
def test_missing_user_is_refused_or_given_to_the_unknown_user(user_id):
    row = {**PLAIN, "user_id": user_id}
    if user_id is ...:
        del row["user_id"]
    refused = made(row)
    assert (refused.kind, refused.field) == ("bad", "user_id")
    assert "--missing-user generic" in refused.what
    assert made(row, GENERIC).user.id is None


def test_identical_responses_are_dropped_or_kept():
    row = {**PLAIN, "rejected": PLAIN["chosen"]}
    assert made(row).kind == "identical"
    assert made(row, KEEP).rejected == PLAIN["chosen"]


def test_identical_conversations_with_implicit_prompt_are_dropped_or_kept():
    turns = [turn("user", "Hi"), turn("assistant", "Hello")]
    row = {"user_id": "ann", "chosen": turns, "rejected": turns}
    assert made(row).kind == "identical"
    assert made(row, KEEP).chosen == "Hello"


def test_identical_plain_texts_with_implicit_prompt_are_dropped():
    assert made({"user_id": "ann", "chosen": "Q? Yes.", "rejected": "Q? Yes."}).kind == "identical"


def test_identical_rows_count_as_dropped_and_not_as_bad(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", [PLAIN, {**PLAIN, "rejected": PLAIN["chosen"]}])
    rows = load_comparisons(path)
    assert len(rows) == 1
    assert rows.dropped_counts == {"identical": 1}
    assert "1 rows with two equal responses left out" in rows.notice()


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_text_is_bad(name, text):
    assert str(made({**PLAIN, name: text})) == f"rows.jsonl:1: {name}: empty"


def test_empty_assistant_message_is_bad():
    assert made({**PLAIN, "chosen": [turn("assistant", " ")]}).field == "chosen[0].content"


def test_candidate_response_may_be_empty():
    assert response_text("", "c.jsonl:1", "responses[0]") == ""
    assert isinstance(response_text(None, "c.jsonl:1", "responses[0]"), Problem)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "value", ["a\x00b", "a\ud800b", 1.5, True, b"bytes", {"a": 1}, [1], [None], [{"role": "user"}]]
)
def test_unusable_values_name_the_field(name, value):
    problem = made({**PLAIN, name: value})
    assert isinstance(problem, Problem)
    assert problem.field.startswith(name)
    assert problem.kind == "bad"
    assert str(problem).startswith(f"rows.jsonl:1: {name}")


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_absent_response_is_missing(name):
    for row in ({**PLAIN, name: None}, {key: value for key, value in PLAIN.items() if key != name}):
        assert (made(row).field, made(row).what) == (name, "missing")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "prompt"),
        ([turn("user", "a\x00")], "prompt[0].content"),
        ([turn("user", None)], "prompt[0].content"),
        ([turn("", "hi")], "prompt[0].role"),
        ([turn("user", "hi"), "hi"], "prompt[1]"),
        ([turn("user", "hi"), turn("assistant", "hello")], "prompt"),
    ],
)
def test_unusable_conversations_name_the_message(messages, field):
    assert to_prompt(messages, "c.jsonl:1").field == field


@pytest.mark.parametrize("roles", [["user"], ["assistant", "user"], ["assistant", "assistant"]])
def test_a_response_is_one_assistant_message(roles):
    problem = made({**PLAIN, "chosen": [turn(role, "text") for role in roles]})
    assert problem.field == "chosen"
    assert ", ".join(roles) in problem.what


def test_bad_rows_beyond_the_limit_name_file_line_and_field(tmp_path):
    bad = [{**PLAIN, "chosen": ""}, '{"user_id": "ann", "prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "{"]
    path = wrote(tmp_path / "rows.jsonl", [PLAIN, *bad])
    with pytest.raises(TooManyBadRows) as caught:
        load_comparisons(path, policy=RowPolicy(max_bad_rows=2))
    message = str(caught.value)
    assert "3 of 4 rows" in message
    assert f"{path}:2: chosen: empty" in message
    assert f"{path}:3: prompt: holds half of a surrogate pair at position 0" in message
    assert f"{path}:4: line: not JSON" in message
    assert "--max-bad-rows 3" in message

    rows = load_comparisons(path, policy=RowPolicy(max_bad_rows=3))
    assert len(rows) == 1
    assert rows.dropped_counts == {"bad": 3}
    assert "3 unusable rows left out" in rows.notice()


def test_the_message_names_ten_bad_rows_and_counts_the_rest(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", [{**PLAIN, "chosen": None}] * 12)
    with pytest.raises(TooManyBadRows, match="and 2 more") as caught:
        load_comparisons(path)
    assert str(caught.value).count("chosen: missing") == 10


def test_no_usable_row_is_an_error_even_where_bad_rows_are_allowed(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", [{**PLAIN, "chosen": ""}])
    with pytest.raises(DataError, match="no usable comparison"):
        load_comparisons(path, policy=RowPolicy(max_bad_rows=5))


def test_a_shown_value_is_short():
    assert len(made({**PLAIN, "user_id": ["x" * 10_000]}).what) < 150


def test_deep_values_are_problems(tmp_path):
    limit = sys.getrecursionlimit()
    deep = ["[" * depth + "]" * depth for depth in range(limit - 300, limit + 50)]
    lines = [f'{{"user_id": {value}, "prompt": "p", "chosen": "a", "rejected": "b"}}' for value in deep]
    path = wrote(tmp_path / "rows.jsonl", [PLAIN, *lines])
    rows = load_comparisons(path, policy=RowPolicy(max_bad_rows=len(lines)))
    assert rows.dropped_counts == {"bad": len(lines)}


TEXT = st.one_of(st.sampled_from(["", " ", "a", "Q? a", "Q? b"]), st.text(st.characters(exclude_categories=())))
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", ""]) | SCALAR, "content": TEXT}
)
VALUE = st.one_of(
    TEXT,
    st.lists(MESSAGE, max_size=3),
    st.recursive(
        SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
    ),
)
POLICY = st.builds(
    RowPolicy, identical=st.sampled_from(["drop", "keep"]), missing_user=st.sampled_from(["refuse", "generic"])
)


@settings(max_examples=400, deadline=None)
@given(row=st.fixed_dictionaries({}, optional=dict.fromkeys((*FIELDS, "extra"), VALUE)), policy=POLICY)
def test_any_object_is_a_comparison_or_a_problem(row, policy):
    result = comparison(row, "rows.jsonl:1", policy)
    if isinstance(result, Problem):
        assert result.place
        assert result.field
        assert result.what
        return
    turns = [result.prompt] if isinstance(result.prompt, str) else [m["content"] for m in result.prompt]
    texts = [result.user.id or "", result.user.text, result.chosen, result.rejected, *turns]
    assert all("\x00" not in text and text.encode() is not None for text in texts)
    assert result.chosen.strip()
    assert result.rejected.strip()
    assert result.user.id or (result.user.id is None and policy.missing_user == "generic")

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prlhf.core.comparisons import DataError, RowPolicy, TooManyBadRows
from prlhf.core.sources import load_comparisons

HEADER = "user_id,prompt,chosen,rejected\n"
LENIENT = RowPolicy(max_bad_rows=1_000_000)


def row(number=0, **fields):
    return {"user_id": "ann", "prompt": f"question {number}", "chosen": "yes", "rejected": "no", **fields}


def line(number=0, **fields):
    return json.dumps(row(number, **fields)) + "\n"


def wrote(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def prompts(source, **options):
    return [found.prompt for found in load_comparisons(source, **options)]


def test_a_file_of_unknown_kind_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "prefs.tsv").write_text("user_id")
    with pytest.raises(DataError, match=r"prefs.tsv: a file of this kind can't be read; give one of .jsonl"):
        load_comparisons(tmp_path / "prefs.tsv")


def test_jsonl_with_byte_order_mark_and_blank_lines(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + f"{line(0)}\n  \r\n{line(1)}\n".encode())
    rows = load_comparisons(path)
    assert [found.prompt for found in rows] == ["question 0", "question 1"]
    assert [found.place for found in rows] == [f"{path}:1", f"{path}:4"]


def test_jsonl_without_final_line_break(tmp_path):
    assert prompts(wrote(tmp_path / "rows.jsonl", line(0) + line(1).rstrip())) == ["question 0", "question 1"]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (b'{"user_id": "ann", "prom\n', "not JSON"),
        (b'{"user_id": "\xff"}\n', "not UTF-8 at byte 13"),
        (b"[1, 2]\n", "must be an object, found list"),
        (b"null\n", "must be an object, found NoneType"),
        (b"1" * 5000 + b"\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
    ],
)
def test_unreadable_line_names_file_and_line(tmp_path, broken, what):
    path = wrote(tmp_path / "rows.jsonl", line(0).encode() + broken + line(1).encode())
    with pytest.raises(TooManyBadRows) as caught:
        load_comparisons(path)
    assert f"{path}:2: line: {what}" in str(caught.value)
    assert prompts(path, policy=LENIENT) == ["question 0", "question 1"]


def test_line_of_a_megabyte(tmp_path):
    long = "word " * 200_000 + "end"
    path = wrote(tmp_path / "rows.jsonl", line(0, prompt=long) + line(1))
    assert prompts(path) == [long, "question 1"]


def test_unreadable_line_of_a_megabyte_gives_a_short_message(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", line(0) + line(1, user_id=["x" * 1_000_000]) + '{"a": "' + "x" * 1_000_000)
    with pytest.raises(TooManyBadRows) as caught:
        load_comparisons(path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet", "none"])
def test_absent_source_is_named(tmp_path, name):
    with pytest.raises(DataError, match=name):
        load_comparisons(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_empty_file_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=name):
        load_comparisons(wrote(tmp_path / name, ""))


def test_csv_with_byte_order_mark_and_quoted_line_breaks(tmp_path):
    text = "\ufeff" + HEADER + 'ann,"two\nlines, a ""quote""",yes,no\r\n\nbob,q,yes,no\n'
    rows = load_comparisons(wrote(tmp_path / "rows.csv", text))
    assert [found.prompt for found in rows] == ['two\nlines, a "quote"', "q"]
    assert rows.user_ids == ["ann", "bob"]


@pytest.mark.parametrize("ragged", ["ann,q,yes", "ann,q,yes,no,more", "ann,q,yes,no,"])
def test_ragged_csv_row_names_file_and_line(tmp_path, ragged):
    path = wrote(tmp_path / "rows.csv", f"{HEADER}ann,q,yes,no\n{ragged}\nann,r,yes,no\n")
    with pytest.raises(TooManyBadRows) as caught:
        load_comparisons(path)
    assert f"{path}:3: line: has another number of cells" in str(caught.value)
    assert prompts(path, policy=LENIENT) == ["q", "r"]


def test_csv_with_an_unnamed_index_column(tmp_path):
    rows = load_comparisons(wrote(tmp_path / "rows.csv", f",{HEADER}0,ann,q,yes,no\n"))
    assert rows[0].prompt == "q"


def test_csv_cell_that_is_not_utf8_names_file_line_and_field(tmp_path):
    path = wrote(tmp_path / "rows.csv", HEADER.encode() + b"ann,\xff,yes,no\nann,q,yes,no\n")
    with pytest.raises(TooManyBadRows) as caught:
        load_comparisons(path)
    assert f"{path}:2: prompt: " in str(caught.value)


def test_csv_that_ends_within_quotes_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.csv:\d+: line: not CSV"):
        load_comparisons(wrote(tmp_path / "rows.csv", f'{HEADER}ann,"q,yes,no\n'))


def test_csv_keeps_ids_as_they_are_written(tmp_path):
    rows = load_comparisons(wrote(tmp_path / "rows.csv", f"{HEADER}007,q,yes,no\n"))
    assert rows.user_ids == ["007"]


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    conversation = [{"role": "user", "content": "hi"}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pq.write_table(pa.Table.from_pylist([row(user_id=7, prompt=conversation, **answers, group="a")]), path)
    rows = load_comparisons(path)
    assert (rows[0].user.id, rows[0].prompt, rows[0].chosen) == ("7", conversation, "chosen")
    assert rows[0].extra == {"group": "a"}
    assert rows[0].place == f"{path}:row 1"


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(200)]), path, compression="none")
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in range(0, len(whole), 97)]
    damaged += [whole[:at] + b"\xff" * 8 + whole[at + 8 :] for at in range(4, len(whole), 97)]
    for data in damaged:
        path.write_bytes(data)
        try:
            load_comparisons(path, policy=LENIENT)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_saved_dataset(tmp_path):
    from datasets import Dataset

    Dataset.from_list([row(i) for i in range(3)]).save_to_disk(tmp_path / "saved")
    rows = load_comparisons(tmp_path / "saved")
    assert [found.prompt for found in rows] == ["question 0", "question 1", "question 2"]
    assert rows[2].place == f"{tmp_path / 'saved'}:row 3"


def test_saved_dataset_dict_needs_a_split(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list([row(0)]), "test": Dataset.from_list([row(1)])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert prompts(f"{tmp_path / 'saved'}:train") == ["question 0"]
    assert prompts(f"{tmp_path / 'saved'}:test") == ["question 1"]
    for source in (tmp_path / "saved", f"{tmp_path / 'saved'}:validation"):
        with pytest.raises(DataError, match="has the splits train, test"):
            load_comparisons(source)


def test_saved_dataset_dict_with_one_split(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([row(0)])}).save_to_disk(tmp_path / "saved")
    assert prompts(tmp_path / "saved") == ["question 0"]
    with pytest.raises(DataError, match="train"):
        load_comparisons(f"{tmp_path / 'saved'}:test")


def test_folder_that_datasets_did_not_save(tmp_path):
    with pytest.raises(DataError, match="neither a file"):
        load_comparisons(tmp_path)


def test_columns_are_renamed_to_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    wrote(path, json.dumps({"worker": 3, "prompt": "q", "a": "yes", "b": "no", "chosen": "other", "group": "g"}))
    rows = load_comparisons(path, {"user_id": "worker", "chosen": "a", "rejected": "b"})
    assert (rows[0].user.id, rows[0].chosen, rows[0].rejected) == ("3", "yes", "no")
    assert rows[0].extra == {"group": "g"}


def test_columns_may_swap(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", line())
    rows = load_comparisons(path, {"chosen": "rejected", "rejected": "chosen"})
    assert (rows[0].chosen, rows[0].rejected) == ("no", "yes")


def test_unknown_column_is_named_with_the_columns_there_are(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", line())
    with pytest.raises(DataError) as caught:
        load_comparisons(path, {"user_id": "worker"})
    assert f"{path}:1: user_id: no column 'worker'; columns are user_id, prompt, chosen, rejected" in str(caught.value)


def test_unknown_field_is_named(tmp_path):
    path = wrote(tmp_path / "rows.jsonl", line())
    with pytest.raises(DataError, match="no field 'worker'"):
        load_comparisons(path, {"worker": "user_id"})


PIECE = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [line().encode(), b'{"user_id": 1, "prompt": ', b'"\\ud800"', b"[[", b"NaN", b'""', b"\n", b"\x00", b",", b"}"]
    ),
)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_arbitrary_bytes_raise_nothing_but_data_errors(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(pieces=st.lists(PIECE, max_size=8), policy=st.sampled_from([RowPolicy(), LENIENT]))
    def read(pieces, policy):
        Path(path).write_bytes((HEADER.encode() if suffix == ".csv" else b"") + b"".join(pieces))
        try:
            load_comparisons(path, policy=policy)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017

    read()

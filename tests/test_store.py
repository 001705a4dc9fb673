import json
import subprocess
import sys
import warnings

import pytest

from prlhf.core.store import JsonlStore

RECORDS = [{"key": f"k{i}", "score": i / 3, "text": text} for i, text in enumerate(["plain", "ä\n€", ""])]

APPEND = """
import sys
from pathlib import Path
from prlhf.core.store import JsonlStore

store = JsonlStore(Path(sys.argv[1]))
for i in range(30):
    store.append({"key": f"{sys.argv[2]}-{i}", "text": "x" * 500}, {"key": f"shared-{i}", "by": sys.argv[2]})
"""

FULL = """
import resource, sys
from pathlib import Path
from prlhf.core.store import JsonlStore

store = JsonlStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    store.append({"key": "long", "text": "x" * 1000})
except OSError:
    sys.exit(17)
"""


def filled(path, records=RECORDS):
    JsonlStore(path).append(*records)
    return path


def run(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE)


def test_records_are_kept_by_key(tmp_path):
    store = JsonlStore(filled(tmp_path / "new" / "scores.jsonl"))
    assert dict(store) == {record["key"]: record for record in RECORDS}
    assert len(store) == 3
    assert "k3" not in store


def test_first_record_of_a_key_stays(tmp_path):
    path = filled(tmp_path / "scores.jsonl")
    store = JsonlStore(path)
    store.append({"key": "k0", "score": 99}, {"key": "new", "score": 1}, {"key": "new", "score": 2})
    for seen in (store, JsonlStore(path)):
        assert seen["k0"] == RECORDS[0]
        assert seen["new"]["score"] == 1


def test_cut_at_every_byte_keeps_whole_lines(tmp_path):
    path = filled(tmp_path / "scores.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        torn = cut != sum(map(len, lines[:kept]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = JsonlStore(path)
        told = [str(warning.message) for warning in caught]
        assert told == ([f"{path}:{kept + 1}: the last line is torn and is dropped"] if torn else [])
        assert dict(store) == {record["key"]: record for record in RECORDS[:kept]}

        store.append({"key": "after", "score": 0})
        assert path.read_bytes().startswith(b"".join(lines[:kept]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(JsonlStore(path)) == [*[record["key"] for record in RECORDS[:kept]], "after"]


@pytest.mark.parametrize("broken", ['{"key": "k', "[]", "null", '{"score": 1}', '{"key": 1}', "\xff", "[" * 100_000])
def test_broken_line_in_the_middle_names_file_and_line(tmp_path, broken):
    path = filled(tmp_path / "scores.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + broken.encode("latin-1") + b"\n" + lines[1])
    with pytest.raises(ValueError, match=r"scores\.jsonl:2: "):
        JsonlStore(path)


def test_blank_lines_are_passed_over(tmp_path):
    path = filled(tmp_path / "scores.jsonl")
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\n\n"))
    assert list(JsonlStore(path)) == ["k0", "k1", "k2"]


def test_a_record_that_can_not_be_written_changes_nothing(tmp_path):
    path = filled(tmp_path / "scores.jsonl")
    old = path.read_bytes()
    for value in ("\ud800", object()):
        with pytest.raises((ValueError, TypeError)):
            JsonlStore(path).append({"key": "good"}, {"key": "bad", "text": value})
        assert path.read_bytes() == old


def test_store_sees_what_another_store_wrote(tmp_path):
    one, other = JsonlStore(tmp_path / "scores.jsonl"), JsonlStore(tmp_path / "scores.jsonl")
    one.append({"key": "a", "by": "one"})
    other.append({"key": "a", "by": "other"}, {"key": "b", "by": "other"})
    assert {key: record["by"] for key, record in other.items()} == {"a": "one", "b": "other"}


def test_four_processes_lose_nothing(tmp_path):
    path = tmp_path / "scores.jsonl"
    children = [run(APPEND, path, name) for name in "abcd"]
    for child in children:
        assert child.wait(timeout=60) == 0, child.stderr.read().decode()
        child.stderr.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = {f"{name}-{i}" for name in [*"abcd", "shared"] for i in range(30)}
    assert sorted(line["key"] for line in lines) == sorted(expected)
    assert set(JsonlStore(path)) == expected


def test_full_disk_keeps_what_was_written(tmp_path):
    path = filled(tmp_path / "scores.jsonl")
    child = run(FULL, path)
    message = child.communicate(timeout=60)[1].decode()
    assert child.returncode == 17, message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = JsonlStore(path)
    assert list(store) == ["k0", "k1", "k2"]
    store.append({"key": "later"})
    assert list(JsonlStore(path)) == ["k0", "k1", "k2", "later"]

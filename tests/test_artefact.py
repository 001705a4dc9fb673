import errno
import json
import os
import subprocess
import sys
from functools import partial

import pytest

from prlhf.core.artefact import MANIFEST, ArtefactError, load, save, versions, writing

KIND = "reward_model"

LARGE = """
import errno, resource, sys
from pathlib import Path
from prlhf.core.artefact import save

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
writers = {name: lambda path, n=n: path.write_bytes(b"new" * n) for name, n in (("a.bin", 10), ("b.bin", 100_000))}
try:
    save(Path(sys.argv[1]), "reward_model", {"step": 2}, writers)
except OSError as error:
    sys.exit(17 if error.errno == errno.EFBIG else 1)
"""

HOLD = """
import sys
from pathlib import Path
from prlhf.core.artefact import writing

with writing(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


class Killed(BaseException):
    """What a kill looks like to the code: nothing after it runs."""


def state(step):
    return {"a.bin": f"a{step}".encode() * step, "b.bin": f"b{step}".encode() * 50, "c.json": b"{}"}


def write(folder, step, contents=None):
    files = {name: partial(_put, data) for name, data in (contents or state(step)).items()}
    save(folder, KIND, {"step": step}, files)
    return folder


def _put(data, path):
    path.write_bytes(data)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def loaded(folder):
    """The step of the state that loading gives, after a check that every file is of that state."""
    step = load(folder, KIND)["step"]
    seen = contents(folder)
    assert {name: seen[name] for name in state(step)} == state(step)
    return step


def kill_at(monkeypatch, call):
    """Lets `call` renames pass and kills at the next one."""
    left, replace = iter(range(call)), os.replace

    def rename(*arguments):
        if next(left, None) is None:
            raise Killed
        replace(*arguments)

    monkeypatch.setattr(os, "replace", rename)


def run(code, folder, **options):
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], text=True, stderr=subprocess.PIPE, **options)


def test_saved_artefact_is_loaded_with_its_facts(tmp_path):
    manifest = load(write(tmp_path / "runs" / "one", 1), KIND)
    assert manifest["step"] == 1
    assert manifest["versions"] == versions()
    assert set(manifest["files"]) == {"a.bin", "b.bin", "c.json"}
    assert set(contents(tmp_path / "runs" / "one")) == {"a.bin", "b.bin", "c.json", MANIFEST}


def test_update_replaces_every_file(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert loaded(tmp_path) == 2
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("name", ["a.bin", "b.bin", "c.json"])
@pytest.mark.parametrize("damage", ["deleted", "cut", "emptied", "longer", "changed", "a folder"])
def test_damaged_file_is_named(tmp_path, name, damage):
    write(tmp_path, 1)
    path = tmp_path / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "deleted":
        made = {"cut": data[:-1], "emptied": b"", "longer": data + b"x", "changed": bytes([data[0] ^ 1]) + data[1:]}
        path.write_bytes(made[damage])
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
        load(tmp_path, KIND)


def test_manifest_cut_at_every_byte_is_named(tmp_path):
    path = write(tmp_path, 1) / MANIFEST
    whole = path.read_bytes()
    for cut in range(len(whole.rstrip())):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtefactError, match=MANIFEST):
            load(tmp_path, KIND)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": None},
        {"files": {"a.bin": None}},
        {"files": {"a.bin": {}}},
        {"files": {"a.bin": {"bytes": 2}}},
        {"kind": "policy"},
        {"kind": []},
        {"format": 99},
    ],
)
def test_manifest_with_wrong_entries_is_named(tmp_path, change):
    path = write(tmp_path, 1) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtefactError):
        load(tmp_path, KIND)


@pytest.mark.parametrize("text", [b"null", b"[]", b"7", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_no_object_is_named(tmp_path, text):
    (write(tmp_path, 1) / MANIFEST).write_bytes(text)
    with pytest.raises(ArtefactError, match=MANIFEST):
        load(tmp_path, KIND)


def test_folder_without_manifest_is_no_finished_run(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"a")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtefactError, match="no finished run"):
            load(folder, KIND)


@pytest.mark.parametrize("name", ["../outside", "sub/file", "sub/../../outside", "..", ".", "", "a\x00b", "{}/outside"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    outside, name = tmp_path / "outside", name.format(tmp_path)
    outside.write_bytes(b"a1")
    (tmp_path / "outside.new").write_bytes(b"a1")
    path = write(tmp_path / "run", 1) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["a.bin"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError):
        load(tmp_path / "run", KIND)
    assert (tmp_path / "outside.new").exists()


@pytest.mark.parametrize("failing", ["a.bin", "b.bin", "c.json"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failing_writer_leaves_the_old_state(tmp_path, failing, error):
    write(tmp_path, 1)
    old = contents(tmp_path)

    def fail(path):
        path.write_bytes(b"half")
        raise error

    files = {name: partial(_put, data) for name, data in state(2).items()}
    with pytest.raises(type(error)):
        save(tmp_path, KIND, {"step": 2}, {**files, failing: fail})
    assert contents(tmp_path) == old
    assert loaded(tmp_path) == 1


def test_facts_that_json_can_not_hold_leave_the_old_state(tmp_path):
    write(tmp_path, 1)
    old = contents(tmp_path)
    with pytest.raises(TypeError):
        save(tmp_path, KIND, {"step": object()}, {"a.bin": partial(_put, b"new")})
    assert contents(tmp_path) == old


def test_failing_first_save_leaves_no_run(tmp_path):
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, KIND, {}, {"a.bin": lambda path: 1 // 0})
    with pytest.raises(ArtefactError, match="no finished run"):
        load(tmp_path, KIND)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("call", range(4))
def test_kill_between_renames_gives_the_whole_old_or_new_state(tmp_path, monkeypatch, call):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        kill_at(patch, call)
        with pytest.raises(Killed):
            write(tmp_path, 2)
    assert loaded(tmp_path) == (1 if call == 0 else 2)
    assert loaded(tmp_path) == (1 if call == 0 else 2)
    write(tmp_path, 3)
    assert loaded(tmp_path) == 3
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("call", [1, 2, 3])
def test_kill_while_loading_finishes_an_update(tmp_path, monkeypatch, call):
    write(tmp_path, 1)
    for function, calls in ((partial(write, tmp_path, 2), call), (partial(load, tmp_path, KIND), 0)):
        with monkeypatch.context() as patch:
            kill_at(patch, calls)
            with pytest.raises(Killed):
                function()
    assert loaded(tmp_path) == 2


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("second", range(3))
def test_update_after_a_kill_gives_a_whole_state_if_it_is_killed_too(tmp_path, monkeypatch, call, second):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        kill_at(patch, call)
        with pytest.raises(Killed):
            write(tmp_path, 2)
    with monkeypatch.context() as patch:
        kill_at(patch, second)
        with pytest.raises(Killed):
            write(tmp_path, 3)
    assert loaded(tmp_path) in (2, 3)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_failing_update_after_a_kill_leaves_the_state_before_it(tmp_path, monkeypatch, call):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        kill_at(patch, call)
        with pytest.raises(Killed):
            write(tmp_path, 2)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, KIND, {}, {"a.bin": partial(_put, b"new"), "b.bin": lambda path: 1 // 0})
    assert loaded(tmp_path) == 2


def test_leftovers_of_a_killed_writer_are_passed_over(tmp_path):
    write(tmp_path, 1)
    for name in ("a.bin", "c.json", MANIFEST):
        (tmp_path / f"{name}.new").write_bytes(b"half")
    assert loaded(tmp_path) == 1


def test_loading_while_an_update_is_renaming_does_not_disturb_it(tmp_path, monkeypatch):
    write(tmp_path, 1)
    replace = os.replace

    def rename(source, target):
        replace(source, target)
        if target == tmp_path / MANIFEST:
            monkeypatch.setattr(os, "replace", replace)
            assert loaded(tmp_path) == 2

    monkeypatch.setattr(os, "replace", rename)
    write(tmp_path, 2)
    assert loaded(tmp_path) == 2


def test_second_writer_is_refused_while_the_lock_is_held(tmp_path):
    write(tmp_path, 1)
    child = run(HOLD, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ArtefactError, match="another process is writing"):
            write(tmp_path, 2)
        assert loaded(tmp_path) == 1
    finally:
        message = child.communicate(timeout=30)[1]
    assert child.returncode == 0, message
    write(tmp_path, 2)
    assert loaded(tmp_path) == 2


def test_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        1 / 0  # noqa: B018
    write(tmp_path, 1)


def test_file_size_limit_leaves_the_old_state(tmp_path):
    write(tmp_path, 1)
    old = contents(tmp_path)
    child = run(LARGE, tmp_path)
    message = child.communicate(timeout=30)[1]
    assert child.returncode == 17, message
    assert contents(tmp_path) == old
    assert loaded(tmp_path) == 1


def test_pickles_are_never_opened(tmp_path):
    canary = tmp_path / "canary"
    payload = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    write(tmp_path / "run", 1, {"model.bin": payload, "model.pt": payload})
    load(tmp_path / "run", KIND)
    assert not canary.exists()

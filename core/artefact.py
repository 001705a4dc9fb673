"""Artefact directories: complete, or not there.

`prlhf.json` lists every file with its size and hash and is written last, by a rename. An update writes new files beside
the old ones, renames `prlhf.json`, then the files; whatever moment a kill picks, loading finds the old state or
finishes the new one. Nothing in an artefact is ever unpickled.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MANIFEST = "prlhf.json"
NEW = ".new"
FORMAT = 1


class ArtefactError(ValueError):
    """An artefact directory that can't be used; the message names the file."""


def versions() -> dict[str, str]:
    """Versions of what made an artefact."""
    found = {}
    for name in ("prlhf", "torch", "transformers", "trl", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save(
    folder: Path,
    kind: str,
    facts: dict[str, Any],
    files: dict[str, Callable[[Path], Any]],
    keep: Sequence[str] = (),
) -> None:
    """Writes or updates an artefact.

    Args:
        kind: what it is, for instance `reward_model`.
        facts: resolved settings and figures, kept in `prlhf.json`.
        files: name of each file and the function that writes it to a path.
        keep: files of the artefact that stay as they are (large weights that an update leaves alone).

    Raises:
        OSError: nothing was changed, and the temporary files are gone.
    """
    with writing(folder):
        _finish_update(folder)
        foreign = [name for name in files if (folder / name).exists() and not (folder / MANIFEST).exists()]
        if foreign:
            raise ArtefactError(f"{folder / foreign[0]}: is there already and belongs to no run; give another folder")
        begun: list[Path] = []
        try:
            listed = _listed(folder, keep)
            for name, write in files.items():
                begun.append(folder / (name + NEW))
                write(begun[-1])
                listed[name] = _describe(begun[-1])
            manifest = {"format": FORMAT, "kind": kind, "versions": versions(), **facts, "files": listed}
            begun.append(folder / (MANIFEST + NEW))
            begun[-1].write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for path in begun:
                to_disk(path)
        except BaseException:
            for path in begun:
                path.unlink(missing_ok=True)
            raise
        os.replace(folder / (MANIFEST + NEW), folder / MANIFEST)  # from here on the new state counts
        for name in files:
            _put_in_place(folder / name)


def _listed(folder: Path, keep: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of files that an update leaves alone."""
    if not keep:
        return {}
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: listed[name] for name in keep}


def load(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a complete artefact; finishes an update that was cut off after its point of no return.

    Raises:
        ArtefactError: no artefact, another kind or format, or a file that is missing or not as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(
            f"{folder}: no {MANIFEST} in it, so it is no finished run; train one with `prlhf prm train` or "
            "`prlhf policy train`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (manifest["kind"], manifest["format"])
        listed = {name: {key: of[key] for key in ("bytes", "sha256")} for name, of in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArtefactError(f"{path}: damaged: not the JSON object that a run writes") from None
    if found != (kind, FORMAT):
        raise ArtefactError(f"{path}: holds a {found[0]} of format {found[1]}, wanted a {kind} of format {FORMAT}")
    for name, description in listed.items():
        _check_file(folder, name, description)
    return manifest


def kind_of(folder: Path) -> str:
    """What a run's folder says that it holds, "" where it says nothing; `load` tells what is wrong with it."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"])
    return ""


def _finish_update(folder: Path) -> None:
    """Moves what a killed update left to be moved, so that the next one starts from a whole state."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # `load` tells of these
        for name, description in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items():
            if Path(name).name == name and _describe_if_there(folder / (name + NEW)) == description:
                _put_in_place(folder / name)


def _put_in_place(path: Path) -> None:
    with suppress(FileNotFoundError):  # another process that loads the artefact has done it
        os.replace(path.with_name(path.name + NEW), path)


def _describe_if_there(path: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):  # moved by another process since it was looked for
        return _describe(path) if path.is_file() else None
    return None


def _check_file(folder: Path, name: str, description: dict[str, Any]) -> None:
    path, new = folder / name, folder / (name + NEW)
    if path.parent != folder:
        raise ArtefactError(f"{folder / MANIFEST}: lists {name!r}, which is not a file of this folder")
    if _describe_if_there(new) == description:
        _put_in_place(path)
    if not path.is_file():
        raise ArtefactError(f"{path}: missing; the run is not complete")
    seen = _describe(path)
    if seen != description:
        what = "cut or longer" if seen["bytes"] != description["bytes"] else "changed"
        raise ArtefactError(
            f"{path}: {what} since it was written ({seen['bytes']} bytes, expected {description['bytes']})"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds the right to write to a run's folder; the second process to want it is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    # A singleton, so that a verb may hold the folder for its whole run and save within it.
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtefactError(
            f"{folder}: another process is writing to it; wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what is written becomes `path` at the end, or nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + NEW)
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

"""Append-only JSONL store: records that cost something to make are kept, whatever interrupts their maker.

One record per line, each with a `key`. A torn last line (a kill in the middle of a write) is dropped with a notice and
cut off before the next append; a broken line elsewhere is an error. Any number of processes may append.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

_BEGIN = b'{"key": "'


class JsonlStore(Mapping[str, dict[str, Any]]):
    """Records by key, in a JSONL file.

    Raises:
        ValueError: a line other than the last is not a record; the message names file and line.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock")
        self._records: dict[str, dict[str, Any]] = {}
        self._read_to = 0  # byte up to which whole lines are read
        self._lines = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._read_new()
        if self._torn_tail():
            warnings.warn(f"{self.path}:{self._lines + 1}: the last line is torn and is dropped", stacklevel=2)

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def append(self, *records: dict[str, Any]) -> None:
        """Writes records that are not there yet, whole and on disk when this returns; the first of a key stays."""
        with self._lock:
            self._read_new()
            self._torn_tail()
            new = [record for record in records if record["key"] not in self._records]
            with self.path.open("ab") as file:
                file.truncate(self._read_to)
                file.write(b"".join(_line(record) for record in new))
                file.flush()
                os.fsync(file.fileno())
            self._read_new()

    def _torn_tail(self) -> bytes:
        """What stands behind the last whole line.

        Raises:
            ValueError: it is not the beginning of a record, so the file is somebody else's.
        """
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            tail = file.read()
        if not (tail.startswith(_BEGIN) or _BEGIN.startswith(tail)):
            raise ValueError(f"{self.path}:{self._lines + 1}: not a record; this file was not written by this command")
        return tail

    def _read_new(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._lines += 1
                self._read_to += len(line)
                if line.strip():
                    record = self._parse(line)
                    self._records.setdefault(record["key"], record)

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}:{self._lines}: not JSON ({error}); mend or remove the line") from None
        if not isinstance(record, dict) or not isinstance(record.get("key"), str):
            raise ValueError(f"{self.path}:{self._lines}: key: missing; this file was not written by this command")
        return record


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps({"key": record["key"], **record}, ensure_ascii=False).encode() + b"\n"

"""What was computed of token rows, kept on disk by their key: hidden states, scores, log-probabilities.

A cache is two append-only files of fixed-width records, `keys.bin` (16 bytes each) and `rows.f32`. Rows are written
before their keys; whatever a kill leaves behind them is cut off under the lock by the next writer.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from .token_rows import KEY_BYTES, batches
from .tokenize import TokenRow

LAYOUT = "v1"  # raise when the same tokens and weights would give other rows


class RowCache:
    """Append-only cache of (P, D) fp32 rows by key, for one backbone; any number of processes may share it.

    Args:
        folder: where the files lie; made when missing.
        width: D.
        parts: names of the P vectors of a row.
    """

    def __init__(self, folder: Path, width: int, parts: Sequence[str]):
        self.folder, self.width, self.parts = folder, width, tuple(parts)
        self.row_bytes = 4 * len(parts) * width
        folder.mkdir(parents=True, exist_ok=True)
        self._keys, self._rows = folder / "keys.bin", folder / "rows.f32"
        self._lock = FileLock(folder / "lock")
        self._index: dict[bytes, int] = {}
        self._known = 0
        self._read_new_keys()

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def positions(self, keys: Sequence[bytes]) -> np.ndarray:
        """Row numbers of keys that are all in the store."""
        return np.fromiter((self._index[key] for key in keys), dtype=np.int64, count=len(keys))

    def gather(self, positions: np.ndarray, part: str) -> Tensor:
        """Rows at `positions` of one part: (len(positions), D) fp32."""
        shape = (self._known, len(self.parts), self.width)
        table = np.memmap(self._rows, dtype=np.float32, mode="r", shape=shape)
        return torch.from_numpy(np.ascontiguousarray(table[positions, self.parts.index(part)]))

    def append(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        """Adds rows (len(keys), P, D); keys that another process added meanwhile are left alone."""
        with self._lock:
            self._read_new_keys()
            self._cut_torn_tail()
            new = [i for i, key in enumerate(keys) if key not in self._index]
            self._write(self._rows, np.ascontiguousarray(rows[new], dtype=np.float32).tobytes())
            self._write(self._keys, b"".join(keys[i] for i in new))
            self._read_new_keys()

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _complete(self) -> int:
        """Number of records of which both row and key are whole."""
        sizes = [path.stat().st_size if path.exists() else 0 for path in (self._keys, self._rows)]
        return min(sizes[0] // KEY_BYTES, sizes[1] // self.row_bytes)

    def _read_new_keys(self) -> None:
        complete = self._complete()
        if complete > self._known:
            with self._keys.open("rb") as file:
                file.seek(self._known * KEY_BYTES)
                data = file.read((complete - self._known) * KEY_BYTES)
            for i in range(complete - self._known):
                self._index[data[i * KEY_BYTES : (i + 1) * KEY_BYTES]] = self._known + i
            self._known = complete

    def _cut_torn_tail(self) -> None:
        for path, width in ((self._keys, KEY_BYTES), (self._rows, self.row_bytes)):
            if path.exists() and path.stat().st_size > self._known * width:
                os.truncate(path, self._known * width)


def fill(
    store: RowCache,
    keys: Sequence[bytes],
    rows: Sequence[TokenRow],
    compute: Callable[[list[int]], np.ndarray],
    shown_as: str,
    tokens: int | None = None,
) -> None:
    """Computes what the store lacks, batch by batch; every batch is on disk before the next begins.

    Args:
        compute: positions in `rows` -> their records.
        shown_as: name of the progress bar; none where it is empty.
        tokens: of a batch, padding included.
    """
    total = sum(map(len, rows))
    with tqdm(total=total, unit="tok", unit_scale=True, desc=shown_as, disable=not (shown_as and rows)) as bar:
        for batch in batches(rows, tokens):
            store.append([keys[i] for i in batch], compute(batch))
            bar.update(sum(len(rows[i]) for i in batch))

"""Hidden states of a frozen backbone: computed once per response, cached on disk, resumable.

The cache is two append-only files of fixed-width records, `keys.bin` (16 bytes each) and `rows.f32` (all poolings of
one response side by side, so that another pooling costs no forward pass). Rows are written before their keys; whatever
a kill leaves behind them is cut off under the lock by the next writer.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ..core.comparisons import Comparison, Prompt
from ..core.pretrained import Backbone, cache_dir
from ..core.scoring import ScoreRequest
from ..core.tokenize import RowTokenizer, TextLayout, TokenRow
from .pooling import POOLINGS, last_state, mean_state, row_inputs

LAYOUT = "v1"  # raise when the same tokens and weights would give other rows
KEY_BYTES = 16
TOKENS_PER_BATCH = 8192


def row_key(row: TokenRow) -> bytes:
    """Key of a row in the cache: its token ids and where the response begins."""
    ids = np.asarray([len(row.prompt_ids), *row.prompt_ids, *row.response_ids], dtype=np.int32)
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES).digest()


class FeatureStore:
    """Append-only cache of (P, D) fp32 rows by key, for one backbone; any number of processes may share it.

    Args:
        folder: where the files lie; made when missing.
        hidden_size: D.
        poolings: names of the P vectors of a row.
    """

    def __init__(self, folder: Path, hidden_size: int, poolings: Sequence[str] = POOLINGS):
        self.folder, self.hidden_size, self.poolings = folder, hidden_size, tuple(poolings)
        self.row_bytes = 4 * len(poolings) * hidden_size
        folder.mkdir(parents=True, exist_ok=True)
        self._keys, self._rows = folder / "keys.bin", folder / "rows.f32"
        self._lock = FileLock(folder / "lock")
        self._index: dict[bytes, int] = {}
        self._known = 0
        self._read_new_keys()

    @classmethod
    def of(cls, backbone: Backbone) -> "FeatureStore":
        """The store of a backbone, in the cache folder."""
        name = f"{LAYOUT}-{backbone.fingerprint}-{'+'.join(POOLINGS)}"
        return cls(cache_dir() / "features" / name, backbone.hidden_size)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def positions(self, keys: Sequence[bytes]) -> np.ndarray:
        """Row numbers of keys that are all in the store."""
        return np.fromiter((self._index[key] for key in keys), dtype=np.int64, count=len(keys))

    def gather(self, positions: np.ndarray, pooling: str) -> Tensor:
        """Rows at `positions` under one pooling: (len(positions), D) fp32."""
        shape = (self._known, len(self.poolings), self.hidden_size)
        table = np.memmap(self._rows, dtype=np.float32, mode="r", shape=shape)
        return torch.from_numpy(np.ascontiguousarray(table[positions, self.poolings.index(pooling)]))

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


def batches(rows: Sequence[TokenRow], tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Positions of rows in batches of like length, longest first, each at most `tokens` long with its padding."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        size = max(1, tokens // len(rows[order[start]]))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def hidden_states(backbone: Backbone, rows: Sequence[TokenRow]) -> Tensor:
    """Last layer's hidden state of each row under every pooling, (R, P, D) fp32.

    `last` is the state at the row's last token (what the paper and stock reward models read), `mean` the mean over the
    response's tokens, what closes its turn included. Rows are padded on the right, which a causal model can't see.
    """
    given = row_inputs(rows, next(backbone.model.parameters()).device)
    inside, mask = given.pop("completion_mask"), given["attention_mask"]  # each (R, T)
    states = backbone.model(**given, use_cache=False).last_hidden_state
    return torch.stack([last_state(states, mask), mean_state(states, inside)], dim=1).cpu()


def fill(
    store: FeatureStore,
    keys: Sequence[bytes],
    rows: Sequence[TokenRow],
    compute: Callable[[list[int]], np.ndarray],
    shown_as: str,
) -> None:
    """Computes what the store lacks, batch by batch; every batch is on disk before the next begins.

    Args:
        compute: positions in `rows` -> their records.
        shown_as: name of the progress bar; none where it is empty.
    """
    total = sum(map(len, rows))
    with tqdm(total=total, unit="tok", unit_scale=True, desc=shown_as, disable=not (shown_as and rows)) as bar:
        for batch in batches(rows):
            store.append([keys[i] for i in batch], compute(batch))
            bar.update(sum(len(rows[i]) for i in batch))


def extract(backbone: Backbone, rows: Sequence[TokenRow], store: FeatureStore, show: bool = True) -> np.ndarray:
    """Positions in the store of all rows' features, computing those that are missing."""
    keys = [row_key(row) for row in rows]
    missing = list({key: i for i, key in enumerate(keys) if key not in store}.values())
    todo = [rows[i] for i in missing]
    fill(
        store,
        [keys[i] for i in missing],
        todo,
        lambda batch: hidden_states(backbone, [todo[i] for i in batch]).numpy(),
        "features" if show else "",
    )
    return store.positions(keys)


Text = tuple[Prompt, str, str]
"""A prompt, the text about the user, and a response."""


class FeatureReader:
    """Features of texts under one backbone and layout; a text is tokenized once, a response run once."""

    def __init__(self, backbone: Backbone, layout: TextLayout):
        self.backbone, self.store = backbone, FeatureStore.of(backbone)
        self.tokenizer = RowTokenizer(backbone.tokenizer, layout)
        self.layout = self.tokenizer.layout
        self._seen: dict[tuple[str, str, str], tuple[bytes, int]] = {}  # text -> key in the store, tokens cut off

    def tokenize(self, texts: Sequence[Text]) -> list[TokenRow]:
        return self.tokenizer.rows([t[0] for t in texts], [t[2] for t in texts], [t[1] for t in texts])

    def cut(self, texts: Sequence[Text]) -> np.ndarray:
        """How many tokens the layout's `max_length` takes from each text, (len(texts),)."""
        return np.asarray([cut for _, cut in self._look_up(texts)], dtype=np.int64)

    def keys(self, texts: Sequence[Text]) -> list[bytes]:
        """The key of each text's token ids."""
        return [key for key, _ in self._look_up(texts)]

    def positions(self, texts: Sequence[Text], show: bool = False) -> np.ndarray:
        """Positions of the texts' features in the store, (len(texts),); computes what is missing."""
        keys = self.keys(texts)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.store}
        if missing:
            cached = len(set(keys)) - len(missing)
            if cached and show:
                print(f"features: {cached:,} of {len(set(keys)):,} responses are cached", file=sys.stderr)
            extract(self.backbone, self.tokenize(list(missing.values())), self.store, show)
        return self.store.positions(keys)

    def differences(self, rows: Sequence[Comparison], pooling: str, show: bool = False) -> Tensor:
        """h_chosen - h_rejected of comparisons, (B, D) fp32."""
        chosen, rejected = np.split(self.positions(texts_of(rows), show), 2)  # each (B,)
        return self.gather(chosen, pooling).sub_(self.gather(rejected, pooling))

    def over(self, rows: Sequence[Comparison]) -> np.ndarray:
        """By how many tokens the longer text of each comparison is over the layout's `max_length`, (B,)."""
        return self.cut(texts_of(rows)).reshape(2, len(rows)).max(0)

    def gather(self, positions: np.ndarray, pooling: str) -> Tensor:
        """Features at positions, (len(positions), D) fp32."""
        return self.store.gather(positions, pooling)

    def _look_up(self, texts: Sequence[Text]) -> list[tuple[bytes, int]]:
        names = [(str(prompt), about, response) for prompt, about, response in map(self._read, texts)]
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in self._seen}
        rows = self.tokenize(list(new.values()))
        self._seen.update({name: (row_key(row), row.cut) for name, row in zip(new, rows, strict=True)})
        return [self._seen[name] for name in names]

    def _read(self, text: Text) -> Text:
        return text if self.layout.user_text == "input" else (text[0], "", text[2])


def feature_reader(backbone: Backbone, layout: TextLayout) -> FeatureReader:
    """The reader of a backbone under a layout; the same one again for the same two, as long as the backbone lives."""
    if layout not in backbone.memo:
        backbone.memo[layout] = FeatureReader(backbone, layout)
    return backbone.memo[layout]


def over_long_by_user(rows: Sequence[Comparison], over: np.ndarray) -> dict[str, int]:
    """How many comparisons of each user ("" for rows without one) are over the length limit."""
    return dict(Counter(row.user.id or "" for row, tokens in zip(rows, over, strict=True) if tokens))


def over_long_notice(source: str, by_user: dict[str, int], layout: TextLayout, verb: str = "truncated") -> str:
    """One line for the terminal: how many rows the length policy met, and whose."""
    most = sorted(by_user.items(), key=lambda count: -count[1])[:5]
    top = ", ".join(f"{user or '(no user)'} {n}" for user, n in most)
    return f"{source}: {sum(by_user.values()):,} rows over {layout.max_length} tokens {verb} ({top})"


def texts_of(rows: Sequence[Comparison]) -> list[Text]:
    """Texts of comparisons: all chosen ones, then all rejected ones."""
    sides = [[row.chosen for row in rows], [row.rejected for row in rows]]
    return [(row.prompt, row.user.text, text) for side in sides for row, text in zip(rows, side, strict=True)]


def texts_of_requests(requests: Sequence[ScoreRequest]) -> list[Text]:
    """Texts of all responses of the requests, in their order."""
    return [(r.prompt, r.user.text, response) for r in requests for response in r.responses]

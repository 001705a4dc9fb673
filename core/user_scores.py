"""Scores of responses that depend on the user, each computed once per response and user, and kept on disk."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .row_cache import RowCache, fill
from .scoring import ScoreRequest
from .texts import TextReader, texts_of_requests
from .token_rows import KEY_BYTES
from .tokenize import TokenRow
from .users import UserIndex, UserModel

PART = "score"


def score_cache(folder: Path) -> RowCache:
    """A cache of one number per token row, and user."""
    return RowCache(folder, 1, (PART,))


def user_scores(
    reader: TextReader,
    requests: Sequence[ScoreRequest],
    index: UserIndex,
    store: RowCache,
    mark: Callable[[int], bytes],
    compute: Callable[[list[TokenRow], Tensor], Tensor],
    show: bool,
    tokens: int | None = None,
) -> list[Tensor]:
    """Scores (N,) of each request; every batch is on disk before the next begins, so a killed run goes on.

    Args:
        store: from `score_cache`.
        mark: row of a user -> what a score depends on beside the tokens and the model that the store is of.
        compute: token rows and their users' rows (R,) -> scores (R,).
        show: whether a bar shows the progress.
        tokens: of a batch, padding included.
    """
    texts = texts_of_requests(requests)
    users = [row for r in requests for row in [index.row(r.user.id)] * len(r.responses)]
    marks = {row: mark(row) for row in set(users)}
    keys = [_joined(key, marks[row]) for key, row in zip(reader.keys(texts), users, strict=True)]
    missing = list({key: i for i, key in enumerate(keys) if key not in store}.values())
    if missing and len(set(keys)) > len(missing) and show:
        print(f"scores: {len(set(keys)) - len(missing):,} of {len(set(keys)):,} are cached", file=sys.stderr)
    rows = reader.tokenize([texts[i] for i in missing])

    def computed(batch: list[int]) -> np.ndarray:
        ids = torch.tensor([users[missing[i]] for i in batch])
        return compute([rows[i] for i in batch], ids)[:, None, None].numpy()

    fill(store, [keys[i] for i in missing], rows, computed, "scores" if show else "", tokens)
    scores = store.gather(store.positions(keys), PART)[:, 0]
    return list(scores.split([len(r.responses) for r in requests]))


@torch.no_grad()
def mark_of(users: UserModel, row: int, *further: Tensor | str) -> bytes:
    """Hash of a user's vectors, and of whatever else a score depends on."""
    digest = hashlib.blake2b()
    for part in (users(torch.tensor([row], device=users.device))[0].cpu(), *further):
        digest.update(part.encode() if isinstance(part, str) else part.float().contiguous().numpy().tobytes())
    return digest.digest()


def _joined(key: bytes, mark: bytes) -> bytes:
    return hashlib.blake2b(key + mark, digest_size=KEY_BYTES).digest()

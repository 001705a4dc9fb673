"""Token rows as a model takes them: their keys in a cache, batches of like length, padded inputs."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .tokenize import TokenRow

KEY_BYTES = 16
TOKENS_PER_BATCH = 8192


def row_key(row: TokenRow) -> bytes:
    """Key of a row in the cache: its token ids and where the response begins."""
    ids = np.asarray([len(row.prompt_ids), *row.prompt_ids, *row.response_ids], dtype=np.int32)
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES).digest()


def batches(rows: Sequence[TokenRow], tokens: int | None = None) -> Iterator[list[int]]:
    """Positions of rows in batches of like length, longest first, each at most `tokens` long with its padding.

    Args:
        tokens: by default `TOKENS_PER_BATCH`.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start, room = 0, tokens or TOKENS_PER_BATCH
    while start < len(order):
        size = max(1, room // len(rows[order[start]]))
        yield order[start : start + size]
        start += size


def row_inputs(rows: Sequence[TokenRow], device: Any) -> dict[str, Tensor]:
    """Right-padded inputs (R, T) of token rows, with the mask of their responses."""
    ids = [torch.tensor(row.prompt_ids + row.response_ids) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(row.prompt_ids) for row in rows])[:, None]
    padded = pad_sequence(ids, batch_first=True)  # (R, T)
    places = torch.arange(padded.shape[1])
    masks = {"attention_mask": places < lengths, "completion_mask": (places >= starts) & (places < lengths)}
    return {"input_ids": padded.to(device), **{name: mask.long().to(device) for name, mask in masks.items()}}

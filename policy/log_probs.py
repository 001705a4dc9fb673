"""Log-probabilities of responses under a language model, summed over their tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.pretrained import cache_dir
from ..core.row_cache import LAYOUT, RowCache, fill
from ..core.token_rows import row_inputs
from ..core.tokenize import TokenRow
from ..core.user_scores import PART, score_cache

TOKENS_PER_BATCH = 2048  # logits of V numbers per token are in memory at once


def log_probs(model: Any, rows: Sequence[TokenRow], user_ids: Tensor | None = None) -> Tensor:
    """log pi(y|x, u) of each row's response, what closes its turn included, (R,) fp32.

    Args:
        model: a causal language model, personalized where users are given.
        user_ids: (R,) rows of the user model; None for the plain model, which reads no user.
    """
    device = next(model.parameters()).device
    given = row_inputs(rows, device)
    inside = given.pop("completion_mask")[:, 1:]  # (R, T - 1)
    start = min(len(row.prompt_ids) for row in rows)
    # Logits only from the first response on: the head is a large part of a small model's work.
    keep = torch.arange(max(start - 1, 0), inside.shape[1], device=device)
    users = {} if user_ids is None else {"user_ids": user_ids.to(device)}
    logits = model(**given, **users, use_cache=False, logits_to_keep=keep).logits.float()  # (R, n, V)
    targets = given["input_ids"][:, 1:][:, keep]  # (R, n)
    tokens = logits.gather(2, targets[:, :, None])[:, :, 0] - logits.logsumexp(2)
    return (tokens * inside[:, keep]).sum(1)


def log_prob_cache(fingerprint: str) -> RowCache:
    """The cache of a model's log-probabilities; the fingerprint tells weights and dtype."""
    return score_cache(cache_dir() / "features" / f"{LAYOUT}-{fingerprint}-logp")


def cached_log_probs(
    keys: Sequence[bytes],
    rows_at: Callable[[list[int]], list[TokenRow]],
    store: RowCache,
    compute: Callable[[list[TokenRow]], Tensor],
    shown_as: str = "",
) -> Tensor:
    """Log-probabilities (R,) fp32 of the rows of R keys; what the store lacks is computed, equal rows once.

    A row's value does not depend on what it was compared with, on the user, or on the loss, so other users, another
    alpha and another loss find it there.

    Args:
        keys: from `row_key`.
        rows_at: places in `keys` -> token rows; asked only for what the store lacks.
    """
    missing = list({key: i for i, key in enumerate(keys) if key not in store}.values())
    todo = rows_at(missing)

    @torch.inference_mode()
    def computed(batch: list[int]) -> np.ndarray:
        return compute([todo[i] for i in batch]).float().cpu()[:, None, None].numpy()

    fill(store, [keys[i] for i in missing], todo, computed, shown_as, TOKENS_PER_BATCH)
    return store.gather(store.positions(keys), PART)[:, 0]

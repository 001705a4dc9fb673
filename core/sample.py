"""Responses that are drawn once and kept: sampling that goes on where it was interrupted."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from .comparisons import User
from .generation import GenerateRequest, Generator
from .store import JsonlStore


def sample(
    generator: Generator,
    requests: Sequence[GenerateRequest],
    store: JsonlStore,
    model: str | Callable[[User], str],
    show: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """The n texts of each request; those in the store are not drawn again, and each is kept as soon as it is drawn.

    Args:
        model: tells models apart in the store, for instance a fingerprint; for a personalized one, what it is for a
            user, whose vectors may have changed.
        show: whether a bar shows the progress.
        facts: are written into each new line.
    """
    singles = [[replace(request, n=1, first=i) for i in request.indices] for request in requests]
    named = model if callable(model) else lambda _: model
    keys = [[_key(named(single.user), single) for single in mine] for mine in singles]
    missing = {
        key: single
        for mine, its in zip(singles, keys, strict=True)
        for single, key in zip(mine, its, strict=True)
        if key not in store
    }
    hidden = not (show and missing)
    drawn, tokens, begun = generator.generate(list(missing.values())), 0, time.monotonic()
    for candidate in (bar := tqdm(drawn, total=len(missing), unit="text", desc="responses", disable=hidden)):
        request = candidate.request
        tokens += candidate.tokens
        bar.set_postfix_str(f"{tokens / (time.monotonic() - begun):,.0f} tok/s", refresh=False)
        made = {"prompt": request.prompt, "user_id": request.user.id, "seed": request.seed, "index": candidate.index}
        drawn_as = {"sampling": asdict(request.sampling), "tokens": candidate.tokens, "ended": candidate.ended}
        if candidate.user_known is not None:
            drawn_as["user_known"] = candidate.user_known
        key = _key(named(request.user), request)
        store.append({"key": key, **made, **(facts or {}), **drawn_as, "text": candidate.text})
    return [[store[key]["text"] for key in its] for its in keys]


def _key(model: str, single: GenerateRequest) -> str:
    """The same model, request and index give the same key."""
    return hashlib.blake2b(repr((model, single)).encode(), digest_size=16).hexdigest()

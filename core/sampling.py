"""Tokens drawn from logits: temperature, top_p, top_k, and one uniform number per row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; names and meaning are those of transformers' `GenerationConfig`.

    Attributes:
        max_new_tokens: a response that has not ended by then is cut there (`Candidate.ended` is False).
        temperature: 0 takes the likeliest token.
        top_p: draws from the likeliest tokens that together have this probability.
        top_k: draws from this many of the likeliest tokens; 0 for no limit.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"temperature and top_k must not be negative and top_p be in (0, 1], found {self}")


def draw(logits: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> Tensor:
    """One token per row, (R,), by inverting the distribution function at a uniform number per row.

    Args:
        logits: (R, V) fp32.
        uniforms: R numbers in [0, 1).

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    largest = logits.amax(-1, keepdim=True)  # NaN where one of the row's is
    if not torch.isfinite(largest).all():
        raise ValueError("the model's logits are not numbers; try --dtype float32")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = ((logits - largest) / sampling.temperature).softmax(-1)
    kept, ids = _kept(probabilities, sampling)  # each (R, k)
    upto = kept.cumsum(-1)
    at = torch.tensor(uniforms, dtype=upto.dtype, device=upto.device)[:, None] * upto[:, -1:]
    # `right`: the first token whose share reaches beyond the number, so one of probability 0 is not drawn; in fp32
    # the number may be rounded up to the whole, which nothing reaches beyond.
    place = torch.searchsorted(upto, at, right=True).minimum((upto < upto[:, -1:]).sum(-1, keepdim=True))
    return (place if ids is None else ids.gather(1, place))[:, 0]


def _kept(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities that `top_k` and `top_p` leave, (R, k), and their token ids; ids None where all tokens stay.

    The likeliest few nearly always hold `top_p`, and picking them is an order of magnitude cheaper than sorting V.
    """
    size = probabilities.shape[1]
    limit = min(sampling.top_k or size, size)
    if limit == size and sampling.top_p == 1:
        return probabilities, None
    k = limit if sampling.top_k else min(256, size)
    while True:
        likeliest, ids = probabilities.topk(k, dim=-1)  # (R, k), in falling order
        whole = likeliest.sum(-1, keepdim=True) if sampling.top_k else probabilities.sum(-1, keepdim=True)
        before = likeliest.cumsum(-1) - likeliest
        if k == limit or bool((before[:, -1:] >= sampling.top_p * whole).all()):
            return likeliest.masked_fill(before >= sampling.top_p * whole, 0), ids
        k = min(4 * k, limit)

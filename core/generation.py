"""Responses sampled from a language model: prompts in, a stream of candidates out.

`Generator` is what best-of-n knows of any source of candidates; `LocalGenerator` is the one that runs a model here. It
runs a prompt through the model once for all of its responses in a batch, and draws every response with a random stream
of its own, so the texts do not depend on what else stands in the batch (in fp32; in bf16 the layout of a batch moves
the last digits, and with them a text now and then).
"""

import hashlib
import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from .comparisons import Prompt, User
from .pretrained import ModelSource, load_causal_model
from .tokenize import RowTokenizer, TextLayout

SEQUENCES_AT_ONCE = 64
NOBODY = User(None)


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


@dataclass(frozen=True)
class GenerateRequest:
    """Sample `n` responses to this prompt; the user's text, where there is one, is part of the input.

    Attributes:
        first: index of the first of them; what is drawn depends on the index, not on where a request begins.
        seed: the same request with the same seed gives the same texts. Samplings share their random numbers, so that
            two of them can be compared on the same draws.
    """

    prompt: Prompt
    n: int = 1
    first: int = 0
    user: User = NOBODY
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.first < 0:
            raise ValueError(f"n must be at least 1 and first at least 0, found {self.n} and {self.first}")

    @property
    def indices(self) -> range:
        return range(self.first, self.first + self.n)


@dataclass(frozen=True)
class Candidate:
    """One sampled response.

    Attributes:
        index: which of the request's `indices` it is.
        tokens: number of tokens drawn, the one that ends the response included.
        ended: whether the model ended it; False where `max_new_tokens` cut it.
    """

    request: GenerateRequest
    index: int
    text: str
    tokens: int
    ended: bool


class Generator(Protocol):
    """Gives the candidates of requests one by one, in whatever order they are done, so that each can be kept."""

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Candidate]: ...


class LocalGenerator:
    """Samples from a causal language model.

    Args:
        model: Hugging Face causal language model.
        tokenizer: puts prompts into the model's chat template.
        sequences: how many responses are drawn side by side.
    """

    def __init__(self, model: Any, tokenizer: RowTokenizer, sequences: int = SEQUENCES_AT_ONCE):
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, found {sequences}")
        self.model, self.tokenizer, self.sequences = model, tokenizer, sequences
        self.end_ids = _end_ids(model, tokenizer)

    @classmethod
    def from_source(cls, source: ModelSource, dtype: str = "auto", device: str | None = None) -> "LocalGenerator":
        """Loads model and tokenizer."""
        model, tokenizer = load_causal_model(source, dtype, device)
        return cls(model, RowTokenizer(tokenizer, TextLayout()))

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Candidate]:
        """Draws the candidates batch by batch, prompts of like length together."""
        by_sampling = sorted(requests, key=lambda request: (repr(request.sampling), len(self._prompt_ids(request))))
        for sampling, group in groupby(by_sampling, key=lambda request: request.sampling):
            for batch in self._batches(group):
                yield from self._sample(batch, sampling)

    def check(self, requests: Sequence[GenerateRequest]) -> None:
        """Refuses what `generate` would refuse, before any work.

        Raises:
            ValueError: a prompt and its new tokens are more than the model can hold.
        """
        for request in requests:
            self._prompt_ids(request)

    def _batches(self, requests: Iterable[GenerateRequest]) -> Iterator[list[tuple[GenerateRequest, int]]]:
        """Requests with the index of the response to draw, up to `sequences` of them at a time.

        A request is divided only where it alone is too large, so that its prompt is run once.
        """
        batch: list[tuple[GenerateRequest, int]] = []
        for request in requests:
            if batch and len(batch) + request.n > self.sequences:
                yield batch
                batch = []
            for index in request.indices:
                if len(batch) == self.sequences:
                    yield batch
                    batch = []
                batch.append((request, index))
        if batch:
            yield batch

    def _prompt_ids(self, request: GenerateRequest) -> tuple[int, ...]:
        ids = self.tokenizer.prompt_ids(request.prompt, request.user.text)
        room = int(getattr(self.model.config, "max_position_embeddings", 0) or sys.maxsize)
        if len(ids) + request.sampling.max_new_tokens > room:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {request.sampling.max_new_tokens} new ones are more than the "
                f"model's {room}: {str(request.prompt)[:60]!r}; lower max_new_tokens or shorten the prompt"
            )
        return ids

    @torch.inference_mode()
    def _sample(self, batch: Sequence[tuple[GenerateRequest, int]], sampling: Sampling) -> Iterator[Candidate]:
        prompts = {self._prompt_ids(request): None for request, _ in batch}
        place = {ids: i for i, ids in enumerate(prompts)}
        of_prompt = [place[self._prompt_ids(request)] for request, _ in batch]  # R entries
        logits, decoding = self._prefill(list(prompts))
        decoding = decoding.take(of_prompt)
        logits = logits[of_prompt]  # (P, V) -> (R, V)
        streams = [_stream(request, index) for request, index in batch]
        drawn: list[list[int]] = [[] for _ in batch]
        running = list(range(len(batch)))
        for length in range(1, sampling.max_new_tokens + 1):
            tokens = draw(logits, sampling, [streams[r].random() for r in running])
            for r, token in zip(running, tokens.tolist(), strict=True):
                drawn[r].append(token)
            last = length == sampling.max_new_tokens
            ended = [last or drawn[r][-1] in self.end_ids for r in running]
            yield from (self._candidate(batch[r], drawn[r]) for r, end in zip(running, ended, strict=True) if end)
            going = [i for i, end in enumerate(ended) if not end]
            if not going:
                return
            if len(going) < len(running):
                running = [running[i] for i in going]
                decoding, tokens = decoding.take(going), tokens[going]
            logits = decoding.step(self.model, tokens)

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, "_Decoding"]:
        """Runs P prompts, padded on the left, once; gives the next token's logits (P, V)."""
        device = next(self.model.parameters()).device
        longest = max(map(len, prompts))
        pads = [longest - len(ids) for ids in prompts]
        input_ids = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(pads, prompts, strict=True)], device=device)
        mask = torch.arange(longest, device=device) >= torch.tensor(pads, device=device)[:, None]  # (P, T)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # An index and not a count: the slice that a count takes makes the CPU copy the whole LM head once per prompt.
        keep = torch.tensor([longest - 1], device=device)
        out = self.model(
            input_ids=input_ids, attention_mask=mask.long(), position_ids=positions, use_cache=True, logits_to_keep=keep
        )
        return out.logits[:, -1].float(), _Decoding(out.past_key_values, mask.long(), positions[:, -1:])

    def _candidate(self, one: tuple[GenerateRequest, int], ids: Sequence[int]) -> Candidate:
        ended = ids[-1] in self.end_ids
        text = self.tokenizer.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        return Candidate(*one, text.strip(), len(ids), ended)


@dataclass
class _Decoding:
    """Where R responses stand: the cache of keys and values, the tokens' mask (R, T), the last position (R, 1)."""

    cache: Any
    mask: Tensor
    position: Tensor

    def take(self, rows: Sequence[int]) -> "_Decoding":
        """Goes on with these rows, in this order, a row as often as it is named."""
        chosen = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        return _Decoding(self.cache, self.mask[chosen], self.position[chosen])

    def step(self, model: Any, tokens: Tensor) -> Tensor:
        """Appends one token per row (R,); gives the logits of the next, (R, V) fp32."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.position = self.position + 1
        out = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1].float()


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


def _stream(request: GenerateRequest, index: int) -> random.Random:
    """The random numbers of one response, whatever is drawn beside it."""
    name = repr((request.seed, request.prompt, request.user, index))
    return random.Random(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "big"))


def _end_ids(model: Any, tokenizer: RowTokenizer) -> frozenset[int]:
    """Tokens that end a response: the model's own, and what the chat template closes a turn with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [own] if isinstance(own, int) else list(own or [])
    # Not simply the first: before the control token a template may write a space, which responses hold too.
    closing = next((i for i in tokenizer.closing_ids if i in tokenizer.control_ids), tokenizer.tokenizer.eos_token_id)
    return frozenset([*ids, *([] if closing is None else [closing])])


# A full stop behind a digit ends nothing: it may be that of a list's number, or of a number that was cut.
_SENTENCE_END = re.compile(r"(?:(?<!\d)\.|[!?…])[\"')\]*_”’]*(?=\s|$)")


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty where no sentence ends."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""

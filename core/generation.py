"""Responses sampled from a language model: prompts and users in, a stream of candidates out.

`Generator` is what best-of-n knows of any source of candidates; `LocalGenerator` is the one that runs a model here. It
runs a prompt through the model once for all of its responses in a batch, and draws every response with a random stream
of its own, so the texts do not depend on what else stands in the batch (in fp32; in bf16 the layout of a batch moves
the last digits, and with them a text now and then).
"""

import hashlib
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from .comparisons import Prompt, User
from .pretrained import ModelSource, load_causal_model
from .sampling import Sampling, draw
from .tokenize import RowTokenizer, TextLayout

SEQUENCES_AT_ONCE = 64
NOBODY = User(None)


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
        user_known: False where row 0, the unknown user, answered; None from a model that knows no users.
    """

    request: GenerateRequest
    index: int
    text: str
    tokens: int
    ended: bool
    user_known: bool | None = None


class Generator(Protocol):
    """Gives the candidates of requests one by one, in whatever order they are done, so that each can be kept."""

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Candidate]: ...


class LocalGenerator:
    """Samples from a causal language model.

    Args:
        model: Hugging Face causal language model.
        tokenizer: puts prompts into the model's chat template.
        sequences: how many responses are drawn side by side.
        row_of: of a personalized model, a user's row in its user model, 0 for the unknown user.
        strength: of personalization, w in the logits `row0 + w (user - row0)`: 0 is the unknown user, 1 the model as it
            is, more is stronger. Other values than these two run each text twice.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: RowTokenizer,
        sequences: int = SEQUENCES_AT_ONCE,
        row_of: Callable[[User], int] | None = None,
        strength: float = 1.0,
    ):
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, found {sequences}")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be at least 0, found {strength}")
        if strength != 1 and row_of is None:
            raise ValueError(f"strength {strength:g}: this model knows no users, so there is nothing to strengthen")
        self.model, self.tokenizer, self.sequences = model, tokenizer, sequences
        self.row_of, self.strength = row_of, strength
        self.user_tokens = model.base_model.user_model.shape[0] if row_of else 0
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
        room = int(getattr(self.model.config, "max_position_embeddings", 0) or sys.maxsize) - self.user_tokens
        if len(ids) + request.sampling.max_new_tokens > room:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {request.sampling.max_new_tokens} new ones are more than the "
                f"model's {room}: {str(request.prompt)[:60]!r}; lower max_new_tokens or shorten the prompt"
            )
        return ids

    @torch.inference_mode()
    def _sample(self, batch: Sequence[tuple[GenerateRequest, int]], sampling: Sampling) -> Iterator[Candidate]:
        inputs = [(self._prompt_ids(request), self._row(request)) for request, _ in batch]
        place = {given: i for i, given in enumerate(dict.fromkeys(inputs))}
        of_prompt = [place[given] for given in inputs]  # R entries
        logits, decoding = self._prefill(list(place))
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

    def _row(self, request: GenerateRequest) -> int:
        """The user's row; 0 also where nobody has one."""
        return self.row_of(request.user) if self.row_of and self.strength else 0

    def _prefill(self, inputs: Sequence[tuple[tuple[int, ...], int]]) -> tuple[Tensor, "_Decoding"]:
        """Runs P prompts for their users, padded on the left, once; gives the next token's logits (P, V)."""
        device = next(self.model.parameters()).device
        mixed = self.strength not in (0, 1)
        inputs = [*inputs, *((ids, 0) for ids, _ in inputs)] if mixed else inputs  # with users, then without
        longest = max(len(ids) for ids, _ in inputs)
        pads = [longest - len(ids) for ids, _ in inputs]
        padded = [[0] * pad + list(ids) for pad, (ids, _) in zip(pads, inputs, strict=True)]
        mask = torch.arange(longest, device=device) >= torch.tensor(pads, device=device)[:, None]  # (P, T)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        users = torch.tensor([row for _, row in inputs], device=device) if self.row_of else None
        # An index and not a count: the slice that a count takes makes the CPU copy the whole LM head once per prompt.
        keep = torch.tensor([longest - 1], device=device)
        out = self.model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
            **_users(users),
        )
        strength = self.strength if mixed else None
        decoding = _Decoding(out.past_key_values, mask.long(), positions[:, -1:], users, strength)
        return decoding.mixed(out.logits[:, -1].float()), decoding

    def _candidate(self, one: tuple[GenerateRequest, int], ids: Sequence[int]) -> Candidate:
        ended = ids[-1] in self.end_ids
        text = self.tokenizer.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        known = self.row_of(one[0].user) > 0 if self.row_of else None
        return Candidate(*one, text.strip(), len(ids), ended, known)


def _users(users: Tensor | None) -> dict[str, Tensor]:
    return {} if users is None else {"user_ids": users}


@dataclass
class _Decoding:
    """Where R responses stand: the cache of keys and values, the tokens' mask (R, T), the last position (R, 1).

    Attributes:
        users: (R,) rows of the user model; None for a model without.
        strength: where it is there, everything has 2R rows, the last R of them for the unknown user, and the logits
            of both are mixed.
    """

    cache: Any
    mask: Tensor
    position: Tensor
    users: Tensor | None
    strength: float | None

    def take(self, rows: Sequence[int]) -> "_Decoding":
        """Goes on with these of the R rows, in this order, a row as often as it is named."""
        chosen = torch.tensor(rows, device=self.mask.device)
        if self.strength is not None:
            chosen = torch.cat([chosen, chosen + len(self.mask) // 2])
        self.cache.batch_select_indices(chosen)
        users = None if self.users is None else self.users[chosen]
        return _Decoding(self.cache, self.mask[chosen], self.position[chosen], users, self.strength)

    def step(self, model: Any, tokens: Tensor) -> Tensor:
        """Appends one token per row (R,); gives the logits of the next, (R, V) fp32."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.position = self.position + 1
        out = model(
            input_ids=(tokens if self.strength is None else tokens.repeat(2))[:, None],
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            **_users(self.users),
        )
        return self.mixed(out.logits[:, -1].float())

    def mixed(self, logits: Tensor) -> Tensor:
        """`row0 + strength (user - row0)`: (2R, V) -> (R, V); logits without a strength are left alone."""
        if self.strength is None:
            return logits
        own, row0 = logits.chunk(2)
        return row0 + self.strength * (own - row0)


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

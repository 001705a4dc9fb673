"""Comparison -> token ids. No text of a row becomes a control token, and the user text has its one place.

A row is tokenized here and not by TRL, which lets a response that contains `<|im_end|>` close its own turn. Prompt and
response are encoded apart and joined as ids, so a prompt's ids are the same under every response.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal

from .comparisons import Message, Prompt

_PROBE = "prlhf probe text"
_BREAK = "\ufdd0"  # no character, by definition of Unicode; marks where a text is encoded in two pieces


@dataclass(frozen=True)
class TextLayout:
    """How text becomes token ids; recorded in the artefact, part of the key of cached features.

    Attributes:
        template: `chat` puts a plain prompt into one user turn of the tokenizer's chat template and a conversation
            into its turns; `none` joins the texts as they are (base models, TRL's plain format).
        user_text: `input` puts the user's text into the input, `ignore` leaves it out.
        max_length: longest row in tokens.
        over_long: what happens to a longer row: `truncate` cuts the response's end, and the prompt's beginning where
            the prompt alone takes more than half; `drop` leaves it out of training; `refuse` stops.
    """

    template: Literal["chat", "none"] = "chat"
    user_text: Literal["input", "ignore"] = "input"
    max_length: int = 2048
    over_long: Literal["truncate", "drop", "refuse"] = "truncate"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one prompt and one response.

    Attributes:
        prompt_ids: ids up to where the response begins, the generation prompt included.
        response_ids: ids of the response and of what closes its turn, so never empty.
        cut: number of tokens that `max_length` took away.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    cut: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class RowTokenizer:
    """Tokenizes prompts and responses under one layout.

    Raises:
        ValueError: the layout wants a chat template and the tokenizer has none that can hold the prompt.
    """

    def __init__(self, tokenizer: Any, layout: TextLayout | None = None):
        layout = layout or TextLayout()
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__}: only tokenizers with a tokenizer.json can be used (fast ones)"
            )
        if not tokenizer.chat_template and layout.template == "chat":
            layout = replace(layout, template="none")
        self.tokenizer = tokenizer
        self.layout = layout
        self.closing_ids = self._closing_ids()
        if layout.max_length < len(self.closing_ids):
            raise ValueError(f"--max-length {layout.max_length}: too short for any text")
        self.control_ids = self._find_control_ids()
        self._prompt_ids = lru_cache(maxsize=65536)(self._encode_prompt)

    @cached_property
    def has_system_turn(self) -> bool:
        """Whether the chat template writes the text of a system turn."""
        try:
            turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
            return _PROBE in self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # templates refuse a role by raising whatever they like
            return False

    def prompt_ids(self, prompt: Prompt, user_text: str = "") -> tuple[int, ...]:
        """Token ids of a prompt, with the user's text in its place, up to where the response begins."""
        turns = prompt if isinstance(prompt, str) else tuple((m["role"], m["content"]) for m in prompt)
        return self._prompt_ids(turns, user_text if self.layout.user_text == "input" else "")

    def response_ids(self, responses: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of responses, without what closes the turn."""
        if not responses:
            return []
        encoded = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        return [
            tuple(ids) if self.control_ids.isdisjoint(ids) else self._pieces_ids(self._broken_up(text))
            for text, ids in zip(responses, encoded, strict=True)
        ]

    def rows(self, prompts: Sequence[Prompt], responses: Sequence[str], user_texts: Sequence[str]) -> list[TokenRow]:
        """Tokenizes aligned prompts, responses and user texts; over-long rows are cut (see `TokenRow.cut`)."""
        encoded = self.response_ids(responses)
        return [
            self._fit(self.prompt_ids(prompt, text), ids)
            for prompt, text, ids in zip(prompts, user_texts, encoded, strict=True)
        ]

    def _fit(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> TokenRow:
        room = self.layout.max_length - len(self.closing_ids)
        cut = max(0, len(prompt) + len(response) - room)
        if cut:
            kept_prompt = min(len(prompt), max(room // 2, room - len(response)))
            prompt, response = prompt[len(prompt) - kept_prompt :], response[: room - kept_prompt]
        return TokenRow(prompt, response + self.closing_ids, cut)

    def _encode_prompt(self, prompt: str | tuple[tuple[str, str], ...], user_text: str) -> tuple[int, ...]:
        turns: list[Message] = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else [{"role": role, "content": content} for role, content in prompt]
        )
        if self.layout.template == "none":
            text = "\n".join([user_text] * bool(user_text) + [turn["content"] for turn in turns])
            return self._leading_ids() + self._pieces_ids(self._broken_up(text))
        placed: list[Message] = [
            {"role": self._broken_up(turn["role"]), "content": self._broken_up(turn["content"])}
            for turn in self._place_user_text(turns, user_text)
        ]
        try:
            written = self.tokenizer.apply_chat_template(placed, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates refuse by raising whatever they like
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(f"the chat template refuses a prompt with the roles {roles}: {error}") from None
        return self._pieces_ids(written)

    def _place_user_text(self, turns: list[Message], user_text: str) -> list[Message]:
        """The user's text goes to the system turn, or to the start of the first user turn where there is none."""
        if not user_text:
            return turns
        role = "system" if self.has_system_turn else "user"
        at = next((i for i, turn in enumerate(turns) if turn["role"] == role), None)
        if at is None and role == "system":
            return [{"role": "system", "content": user_text}, *turns]
        at = at or 0
        joined: Message = {"role": turns[at]["role"], "content": f"{user_text}\n\n{turns[at]['content']}"}
        return [*turns[:at], joined, *turns[at + 1 :]]

    def _pieces_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text whose pieces are encoded apart."""
        pieces = [piece for piece in text.split(_BREAK) if piece]
        return tuple(i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False))

    def _broken_up(self, text: str) -> str:
        """The text with a break after the first character of whatever would become a control token.

        The tokenizer says what would: it may normalise text into a control token, and some make one from plain text.
        """
        text = text.replace(_BREAK, "")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        cuts = [start + 1 for i, (start, end) in spans if i in self.control_ids and self._spells(i, text[start:end])]
        if not cuts:
            return text
        if len(text) == 1:
            raise ValueError(f"the tokenizer makes a control token of the character {text!r}, which a row holds")
        return _BREAK.join(self._broken_up(text[a:b]) for a, b in pairwise([0, *cuts, len(text)]))

    def _find_control_ids(self) -> frozenset[int]:
        """Special tokens, and added tokens that the chat template writes without their being special."""
        template = str(self.tokenizer.chat_template or "")
        found = {
            i
            for i, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in template and not token.content.isspace())
        }
        return frozenset(found)

    def _spells(self, token_id: int, text: str) -> bool:
        """Whether the text is a control token's name; an unknown character, which gives the unknown token, is not."""
        unknown = str(self.tokenizer.unk_token).strip().casefold()
        return token_id != self.tokenizer.unk_token_id or text.strip().casefold() == unknown

    def _leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before any text (a BOS token, or nothing)."""
        whole, bare = self.tokenizer.encode("a"), self.tokenizer.encode("a", add_special_tokens=False)
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return tuple(whole[: starts[0]]) if starts else ()

    def _closing_ids(self) -> tuple[int, ...]:
        """What the template writes after a response; without a template, the end-of-sequence token.

        All of it, the final line break of ChatML included, so that the last token is the one that a stock reward
        model reads.
        """
        if self.layout.template == "chat":
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            closing = tuple(self.tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False))
            if closing:
                return closing
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                "the tokenizer has neither a chat template nor an end-of-sequence token to close a response"
            )
        return (end,)

"""Texts of comparisons and requests, read under one layout, and what its length policy does to them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .comparisons import Comparison, Prompt
from .scoring import ScoreRequest
from .token_rows import row_key
from .tokenize import RowTokenizer, TextLayout, TokenRow

Text = tuple[Prompt, str, str]
"""A prompt, the text about the user, and a response."""


class TextReader:
    """Tokenizes texts under one layout, each of them once."""

    def __init__(self, tokenizer: Any, layout: TextLayout):
        self.tokenizer = RowTokenizer(tokenizer, layout)
        self.layout = self.tokenizer.layout
        self._seen: dict[tuple[str, str, str], tuple[bytes, int]] = {}  # text -> key of its row, tokens cut off

    def tokenize(self, texts: Sequence[Text]) -> list[TokenRow]:
        return self.tokenizer.rows([t[0] for t in texts], [t[2] for t in texts], [t[1] for t in texts])

    def cut(self, texts: Sequence[Text]) -> np.ndarray:
        """How many tokens the layout's `max_length` takes from each text, (len(texts),)."""
        return np.asarray([cut for _, cut in self._look_up(texts)], dtype=np.int64)

    def keys(self, texts: Sequence[Text]) -> list[bytes]:
        """The key of each text's token ids."""
        return [key for key, _ in self._look_up(texts)]

    def over(self, rows: Sequence[Comparison]) -> np.ndarray:
        """By how many tokens the longer text of each comparison is over the layout's `max_length`, (B,)."""
        return self.cut(texts_of(rows)).reshape(2, len(rows)).max(0)

    def _look_up(self, texts: Sequence[Text]) -> list[tuple[bytes, int]]:
        names = [(str(prompt), about, response) for prompt, about, response in map(self._read, texts)]
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in self._seen}
        rows = self.tokenize(list(new.values()))
        self._seen.update({name: (row_key(row), row.cut) for name, row in zip(new, rows, strict=True)})
        return [self._seen[name] for name in names]

    def _read(self, text: Text) -> Text:
        return text if self.layout.user_text == "input" else (text[0], "", text[2])


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

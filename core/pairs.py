"""Comparisons as pairs of token rows, what the length policy does to them, and the columns that trainers read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .comparisons import Comparison, Comparisons, DataError
from .tokenize import RowTokenizer, TextLayout, TokenRow

MARGIN = "margin"


@dataclass
class TokenPairs:
    """Comparisons that training keeps, as token ids.

    Attributes:
        over: (rows that were given,) by how many tokens the longer text of each comparison is over the limit.
    """

    rows: list[Comparison]
    chosen: list[TokenRow]
    rejected: list[TokenRow]
    over: np.ndarray


def token_pairs(rows: Comparisons, tokenizer: RowTokenizer) -> TokenPairs:
    """Tokenizes both responses of each comparison.

    Raises:
        DataError: a row is over the layout's `max_length` and the policy is to refuse it, or none is left.
    """
    prompts, texts = [row.prompt for row in rows], [row.user.text for row in rows]
    chosen = tokenizer.rows(prompts, [row.chosen for row in rows], texts)
    rejected = tokenizer.rows(prompts, [row.rejected for row in rows], texts)
    over = np.asarray([max(a.cut, b.cut) for a, b in zip(chosen, rejected, strict=True)], dtype=np.int64)
    kept = kept_rows(rows, over, tokenizer.layout)
    return TokenPairs([rows[i] for i in kept], [chosen[i] for i in kept], [rejected[i] for i in kept], over)


def kept_rows(rows: Comparisons, over: np.ndarray, layout: TextLayout) -> list[int]:
    """Positions of the rows that training keeps under the layout's policy for over-long ones.

    Args:
        over: (B,) by how many tokens each comparison is over `max_length`.

    Raises:
        DataError: see `token_pairs`.
    """
    if layout.over_long == "refuse" and over.any():
        first = int(np.flatnonzero(over)[0])
        raise DataError(
            f"{rows[first].place}: {layout.max_length + int(over[first])} tokens, more than --max-length "
            f"{layout.max_length}; raise it, or choose --over-long truncate or drop"
        )
    kept = [i for i, tokens in enumerate(over) if not tokens or layout.over_long != "drop"]
    if not kept:
        raise DataError(f"{rows.source}: no row is left under --max-length {layout.max_length}; raise it, or truncate")
    return kept


def margins_of(rows: Sequence[Comparison]) -> list[float] | None:
    """The column `margin`, how much better the chosen response is, where the data set has one.

    Raises:
        DataError: some rows have a margin and others have none, or one is not a finite number.
    """
    values = [row.extra.get(MARGIN) for row in rows]
    if all(value is None for value in values):
        return None
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise DataError(f"{row.place}: {MARGIN}: must be a number in every row that is trained on, found {value!r}")
    return [float(value) for value in values]  # type: ignore[arg-type]

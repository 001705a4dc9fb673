"""Options that several verbs share, and what they make."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .output import tell

if TYPE_CHECKING:
    from prlhf.core.comparisons import Comparisons

Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", help="field=column where a column has another name; may be given many times."),
]
MaxBadRows = Annotated[
    int,
    typer.Option("--max-bad-rows", min=0, help="Unusable rows that may be left out (counted) before it is an error."),
]
MissingUser = Annotated[
    Literal["refuse", "generic"],
    typer.Option("--missing-user", help="Rows without user id: `refuse`, or `generic` (the unknown user)."),
]
ModelPlace = Annotated[
    str | None, typer.Option("--model", help="Where the backbone is now, if not where training found it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def column_map(columns: list[str] | None) -> dict[str, str]:
    """`["user_id=worker"]` -> `{"user_id": "worker"}`.

    Raises:
        ValueError: an entry is not field=column.
    """
    pairs = [entry.partition("=") for part in columns or [] for entry in part.split(",")]
    for field, sign, column in pairs:
        if not (field and sign and column):
            raise ValueError(f"--columns {field}{sign}{column}: must read field=column, as in user_id=worker")
    return {field.strip(): column.strip() for field, _, column in pairs}


def load(
    source: str,
    columns: list[str] | None = None,
    max_bad_rows: int = 0,
    missing_user: Literal["refuse", "generic"] = "refuse",
    identical: Literal["drop", "keep"] = "drop",
    say: Callable[[str], None] = tell,
) -> "Comparisons":
    """Loads comparisons under the shared options and says on the terminal what was read and what was left out."""
    from prlhf.core.comparisons import RowPolicy
    from prlhf.core.sources import load_comparisons

    rows = load_comparisons(source, column_map(columns), RowPolicy(max_bad_rows, identical, missing_user))
    say(rows.notice())
    return rows

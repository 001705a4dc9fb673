"""Options that several verbs share, and what they make."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .output import tell

if TYPE_CHECKING:
    from prlhf.core.comparisons import Comparisons, User

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
Users = Annotated[
    list[str],
    typer.Option(help="Ids, comma-separated or repeated; `all`; or a .jsonl file with user_id and user_text."),
]


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


def asked_users(given: list[str], known: list[str]) -> "list[User]":
    """The users that `--users` names.

    Args:
        known: ids that the run knows.
    """
    from prlhf.core.comparisons import DataError, Problem, User, to_user
    from prlhf.core.sources import read_rows

    if given == ["all"]:
        if not known:
            raise ValueError("--users all: this run knows no user")
        return [User(user) for user in known]
    if len(given) == 1 and given[0].endswith(".jsonl"):
        found = [row if isinstance(row, Problem) else to_user(row, place) for place, row in read_rows(given[0])]
        for user in found:
            if isinstance(user, Problem):
                raise DataError(str(user))
        return [user for user in found if isinstance(user, User)]
    asked = [User(user.strip()) for part in given for user in part.split(",") if user.strip()]
    if not asked:
        raise ValueError(f"--users {' '.join(given)!r}: names nobody; give ids, all, or a .jsonl file")
    return asked

"""What the verbs print: JSON objects, tables, and text of rows that can't take over the terminal."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd


def plain(text: str, lines: bool = False) -> str:
    """Text without control characters (ANSI escapes begin with one); line breaks become spaces unless kept."""
    keep = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in keep else " " if c in "\n\t" else "\ufffd" for c in text)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def write_json(value: Any, path: Path) -> None:
    """Writes a JSON file; it is whole or not there."""
    from prlhf.core.artefact import whole_file

    with whole_file(path) as new:
        new.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_table(frame: "pd.DataFrame", path: Path) -> None:
    """Writes a table as .parquet or .jsonl, by the suffix that `check_table_path` allowed; it is whole or not there."""
    from prlhf.core.artefact import whole_file

    with whole_file(path) as new:
        if path.suffix == ".parquet":
            frame.to_parquet(new, index=False)
        else:
            frame.to_json(new, orient="records", lines=True, force_ascii=False)


def check_table_path(flag: str, path: Path) -> None:
    """Refuses a path that `write_table` could not write, before the work that fills it."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"{flag} {path}: must end in .parquet or .jsonl")


def check_not_read(flag: str, path: Path | None, source: str | Path) -> None:
    """Refuses to write over the file that is read, before any work."""
    if path and Path(source).exists() and path.exists() and path.samefile(source):
        raise ValueError(f"{flag} {path}: is the file that is read; give another")


def typed() -> str:
    """The command as it was typed."""
    return shlex.join(["prlhf", *sys.argv[1:]])


def tell(message: str) -> None:
    """One line about what is going on, on the error stream, so that output stays clean."""
    print(plain(message), file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table; cells are shown as they are, never as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*[Text(plain(str(cell))) for cell in row])
    Console().print(shown)


def percent(figure: dict[str, Any], signed: bool = False) -> str:
    """A figure as `87.1 % (85.9 to 88.3)`, or in points where it is a difference; `-` where there is nothing."""
    if figure["value"] is None:
        return "-"
    value, low, high = (f"{100 * figure[key]:{'+' if signed else ''}.1f}" for key in ("value", "low", "high"))
    return f"{value}{' points' if signed else ' %'} ({low} to {high})"

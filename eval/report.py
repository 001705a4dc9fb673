"""A report page: one HTML file that holds all it needs, asks the network for nothing, and shows any text as text.

`sections.py` builds the sections and `charts.py` their charts; `report.html.j2` lays them out.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..core.artefact import whole_file

UNKNOWN = "user unknown (row 0)"
NO_ID = "(no id)"
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Chart:
    """A plotly figure with its key.

    Attributes:
        label: what it shows.
        key: (glyph, CSS variable of its colour, name) of each series.
        data, layout: plotly's traces and layout; a colour is the name of a CSS variable, such as `--c0`.
        rows: rows of dots, by which the page sets the height; 0 where the layout has a height of its own.
    """

    kind: ClassVar[str] = "chart"
    label: str
    key: Sequence[tuple[str, str, str]]
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    rows: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names its row, the first `words` columns are text and the others numbers.

    Attributes:
        folded: what to click on to see the table; empty where it is open.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    folded: str = ""


@dataclass(frozen=True)
class Command:
    """What was typed."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Pick:
    """What one user gets for a prompt.

    Attributes:
        place: which of the candidates it is.
        chips: (a property as a person puts it, "most", "least" or "" among the picks) for each that differs.
        others: its rank for the other users.
    """

    user: str
    about: str
    known: bool
    place: str
    text: str
    chips: Sequence[tuple[str, str]]
    others: str


@dataclass(frozen=True)
class Picks:
    """A prompt with each user's pick; `alike` says in what the picks do not differ."""

    kind: ClassVar[str] = "picks"
    prompt: str
    picks: Sequence[Pick]
    alike: str
    candidates: Table
    open: bool


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `text` holds its paragraphs."""

    title: str
    text: Sequence[str]
    parts: Sequence[Chart | Table | Command | Picks]


def write_report(path: Path, title: str, lead: Sequence[str], sections: Sequence[Section | None]) -> None:
    """Writes the page; the file is whole or not there.

    Args:
        title, lead: heading and summary sentences, plain text.
        sections: in this order; None, which a builder gives where there is nothing to show, is passed over.

    Raises:
        OSError: the file can't be written.
    """
    there = [section for section in sections if section is not None]
    page = _template().render(title=title, lead=lead, sections=there, unknown=UNKNOWN, plotly=Markup(get_plotlyjs()))
    with whole_file(path) as new:
        new.write_text(page, encoding="utf-8", newline="\n")


def visible(text: str) -> str:
    """Text whose control characters, such as the one that begins an ANSI escape, are replaced by �."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n"))


def _template() -> Template:
    environment = Environment(
        autoescape=True, finalize=_finalize, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["script_hash"] = _script_hash
    return environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _script_hash(script: str) -> str:
    """What a Content-Security-Policy calls this script; no other script of the page runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"

"""Measurable properties of a response: what simulated users like or dislike, and what a report says differs.

Words are told apart by the spaces between them and the word lists are English; other scripts get numbers of less use.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_LIST_MARK = re.compile(r"^[^\S\n]*(?:[-*•–]|\d{1,2}[.)])\s+(?=\S)", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…]+(?=[\"')\]*_”’]*(?:\s|$))")
_WIDE = str.maketrans({"。": ". ", "！": "! ", "？": "? "})
_LONG = 8  # letters; about a fifth of the running words of English prose
_YOU = {"you", "your", "yours", "yourself", "you're", "you'll", "you've", "you'd"}


@dataclass(frozen=True)
class Property:
    """A number that a text has.

    Attributes:
        measure: text -> number; 0 for an empty text.
        more, less: what somebody who likes much, or little, of it would say they like.
        shown: text -> how a person would put the number.
        says: what the same two say after "I", beginning with `like` or `do not like`; no comma and no `and` in it.
    """

    name: str
    measure: Callable[[str], float]
    more: str
    less: str
    shown: Callable[[str], str]
    says: tuple[str, str]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.casefold() for word in _WORD.findall(text)]


def list_share(text: str) -> float:
    """Share of the lines that are items of a list."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(bool(_LIST_MARK.match(line)) for line in lines) / len(lines) if lines else 0.0


def _share_of_sentences(mark: str) -> Callable[[str], float]:
    def share(text: str) -> float:
        plain = _LIST_MARK.sub("", text.translate(_WIDE))  # the number of a list item ends no sentence
        ends = _SENTENCE_END.findall(plain)
        return sum(mark in end for end in ends) / max(1, len(ends))

    return share


def _percent(share: Callable[[str], float], of: str) -> Callable[[str], str]:
    return lambda text: f"{round(100 * share(text))} % {of}"


def _share_of_words(accept: Callable[[str], bool]) -> Callable[[str], float]:
    def share(text: str) -> float:
        found = words(text)
        return sum(map(accept, found)) / len(found) if found else 0.0

    return share


def _is_long(word: str) -> bool:
    return sum(map(str.isalpha, word)) >= _LONG


def _is_you(word: str) -> bool:
    return word.replace("’", "'") in _YOU


_long_share, _you_share = _share_of_words(_is_long), _share_of_words(_is_you)
_exclaimed, _asked = _share_of_sentences("!"), _share_of_sentences("?")

PROPERTIES = {
    made.name: made
    for made in (
        Property(
            "length",
            lambda text: math.log1p(len(words(text))),
            "detailed answers",
            "brief answers",
            lambda text: f"{len(words(text))} words",
            ("like long answers", "like short answers"),
        ),
        Property(
            "list",
            list_share,
            "lists",
            "running prose",
            _percent(list_share, "list lines"),
            ("like lists", "do not like lists"),
        ),
        Property(
            "exclamation",
            _exclaimed,
            "enthusiasm and exclamation marks",
            "a calm tone",
            _percent(_exclaimed, "end in !"),
            ("like exclamation marks", "do not like exclamation marks"),
        ),
        Property(
            "question",
            _asked,
            "being asked back",
            "answers without questions",
            _percent(_asked, "end in ?"),
            ("like being asked back", "do not like being asked back"),
        ),
        Property(
            "long_words",
            _long_share,
            "long, precise words",
            "short, plain words",
            _percent(_long_share, "long words"),
            ("like long words", "like short words"),
        ),
        Property(
            "you",
            _you_share,
            "being addressed in person",
            "an impersonal style",
            _percent(_you_share, "you, your"),
            ("like being addressed in person", "do not like being addressed in person"),
        ),
    )
}

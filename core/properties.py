"""Measurable properties of a response: what simulated users like or dislike, and what a report says differs."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_LIST_MARK = re.compile(r"^[^\S\n]*(?:[-*•–]|\d{1,2}[.)])\s+(?=\S)", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…]+(?=[\"')\]*_”’]*(?:\s|$))")
_LONG = 8  # letters; about a fifth of the running words of English prose
_YOU = {"you", "your", "yours", "yourself", "you're", "you'll", "you've", "you'd"}


@dataclass(frozen=True)
class Property:
    """A number that a text has.

    Attributes:
        measure: text -> number; 0 for an empty text.
        more, less: what somebody who likes much, or little, of it would say they like.
        shown: text -> how a person would put the number.
    """

    name: str
    measure: Callable[[str], float]
    more: str
    less: str
    shown: Callable[[str], str]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.casefold() for word in _WORD.findall(text)]


def list_share(text: str) -> float:
    """Share of the lines that are items of a list."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(bool(_LIST_MARK.match(line)) for line in lines) / len(lines) if lines else 0.0


def _sentences_with(mark: str, text: str) -> tuple[int, int]:
    """Sentences that end with the mark, and all sentences."""
    ends = _SENTENCE_END.findall(_LIST_MARK.sub("", text))  # the number of a list item ends no sentence
    return sum(mark in end for end in ends), max(1, len(ends))


def _share_of_sentences(mark: str) -> Callable[[str], float]:
    def share(text: str) -> float:
        marked, every = _sentences_with(mark, text)
        return marked / every

    return share


def _count(mark: str, name: str) -> Callable[[str], str]:
    def shown(text: str) -> str:
        marked, _ = _sentences_with(mark, text)
        return f"{marked} {name}{'s' * (marked != 1)}"

    return shown


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

PROPERTIES = {
    made.name: made
    for made in (
        Property(
            "length",
            lambda text: math.log1p(len(words(text))),
            "detailed answers",
            "brief answers",
            lambda text: f"{len(words(text))} words",
        ),
        Property(
            "list",
            list_share,
            "lists",
            "running prose",
            lambda text: f"{round(100 * list_share(text))} % list lines",
        ),
        Property(
            "exclamation",
            _share_of_sentences("!"),
            "enthusiasm and exclamation marks",
            "a calm tone",
            _count("!", "exclamation"),
        ),
        Property(
            "question",
            _share_of_sentences("?"),
            "being asked back",
            "answers without questions",
            _count("?", "question"),
        ),
        Property(
            "long_words",
            _long_share,
            "long, precise words",
            "short, plain words",
            lambda text: f"{round(100 * _long_share(text))} % long words",
        ),
        Property(
            "you",
            _you_share,
            "being addressed in person",
            "an impersonal style",
            lambda text: f"{round(100 * _you_share(text))} % you, your",
        ),
    )
}

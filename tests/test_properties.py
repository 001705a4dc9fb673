"""Properties of texts whose numbers can be counted by hand."""

import math

import pytest

from prlhf.core.manners import MANNERS, QUESTIONS, Manner
from prlhf.core.properties import PROPERTIES, words

LIST = "Do this:\n- Wash it.\n- Dry it.\n"


def measure(name: str, text: str) -> float:
    return PROPERTIES[name].measure(text)


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\t"])
@pytest.mark.parametrize("name", PROPERTIES)
def test_an_empty_text_has_nothing_of_anything(name: str, text: str) -> None:
    assert measure(name, text) == 0


def test_words() -> None:
    found = words("Don't stop; it's the well-known 3.5 km run!")
    assert found == ["don't", "stop", "it's", "the", "well-known", "km", "run"]
    assert words("Über Äpfel, naïve café, Привет мир, 東京") == [
        "über",
        "äpfel",
        "naïve",
        "café",
        "привет",
        "мир",
        "東京",
    ]
    assert words("snake_case x2 -- ' -") == ["snake", "case", "x"]


@pytest.mark.parametrize(("text", "count"), [("One.", 1), ("You’re 1 of us", 3), ("Привет, мир!", 2), ("1 2 3", 0)])
def test_length_is_the_logarithm_of_the_words(text: str, count: int) -> None:
    assert measure("length", text) == pytest.approx(math.log(1 + count))
    assert PROPERTIES["length"].shown(text) == f"{count} words"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (LIST, 2 / 3),
        ("- a\n- b", 1),
        ("* a\n* b\nend", 2 / 3),
        ("1. a\n2. b\n3) c\n10. d", 1),
        ("• a\n– b", 1),
        ("   - indented\n\n\nprose", 1 / 2),
        ("Prose - with a dash. 1. And a number.", 0),
        ("-5 degrees\n**Bold** text\n*slanted* text\n3.5 litres\n-\n1984. A novel", 0),
    ],
)
def test_list_is_the_share_of_lines(text: str, share: float) -> None:
    assert measure("list", text) == pytest.approx(share)
    assert PROPERTIES["list"].shown(text) == f"{round(100 * share)} % list lines"


@pytest.mark.parametrize(
    ("text", "exclamation", "question"),
    [
        ("Yes. No.", 0, 0),
        ("Yes! No. Why? So!", 1 / 2, 1 / 4),
        ("Yes!!! No...", 1 / 2, 0),
        ("What?! Oh", 1, 1),
        ('He said "go!" and "why?" then left.', 1 / 3, 1 / 3),
        ("It is 3.5 or 42! Is it 7?", 1 / 2, 1 / 2),
        ("1. Wash it!\n2. Dry it!", 1, 0),
        ("a!b a?b !important", 0, 0),
        ("no mark at all", 0, 0),
        ("好的！为什么？", 1 / 2, 1 / 2),
    ],
)
def test_marks_are_shares_of_sentences(text: str, exclamation: float, question: float) -> None:
    for name, share, mark in (("exclamation", exclamation, "!"), ("question", question, "?")):
        assert measure(name, text) == pytest.approx(share)
        assert PROPERTIES[name].shown(text) == f"{round(100 * share)} % end in {mark}"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("It is particularly appropriate.", 1 / 2),
        ("seventy-two letters eightlet", 2 / 3),  # 10, 7 and 8 letters
        ("wouldn't couldn’t", 0),  # 7 letters each
        ("Лаборатория мир", 1 / 2),
        ("123456789 12345678", 0),
    ],
)
def test_long_words_have_eight_letters(text: str, share: float) -> None:
    assert measure("long_words", text) == pytest.approx(share)
    assert PROPERTIES["long_words"].shown(text) == f"{round(100 * share)} % long words"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("You and your dog.", 1 / 2),
        ("You're sure, you’ve time, YOU'LL see", 1 / 2),
        ("Young youth in Yourkshire", 0),
        ("Do it yourself", 1 / 3),
    ],
)
def test_you_in_all_its_forms(text: str, share: float) -> None:
    assert measure("you", text) == pytest.approx(share)
    assert PROPERTIES["you"].shown(text) == f"{round(100 * share)} % you, your"


def test_everything_that_can_be_liked_has_its_own_words() -> None:
    said = [words for made in PROPERTIES.values() for words in (made.more, made.less)]
    assert len(set(said)) == 2 * len(PROPERTIES)
    assert all(name == made.name for name, made in PROPERTIES.items())


def test_a_manner_shows_what_it_asks_for() -> None:
    """Each example answer holds the manner's mark, and has more of its property than the examples of other manners."""
    wants = {
        "list": ("list", 1),
        "excited": ("exclamation", 1),
        "asking": ("question", 1),
        "scholarly": ("long_words", 1),
    }
    wants |= {"brief": ("length", -1), "plain": ("long_words", -1)}
    examples = {manner.name: manner.examples for manner in MANNERS if manner.examples}
    assert set(examples) == set(wants)
    for manner in MANNERS:
        assert all(manner.mark in answer for answer in manner.examples)
    for name, (what, sign) in wants.items():
        others = [measure(what, text) for other, texts in examples.items() if other != name for text in texts]
        assert all(sign * measure(what, text) >= max(sign * value for value in others) for text in examples[name])


@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: manner.name)
def test_a_manner_asks_in_turns_that_end_with_the_prompt(manner: Manner) -> None:
    turns = manner.ask("Why is the sky blue?")
    assert turns[-1] == {"role": "user", "content": "Why is the sky blue?"}
    roles = [turn["role"] for turn in turns]
    system = ["system"] * bool(manner.system)
    assert roles == [*system, *(["user", "assistant"] * len(manner.examples)), "user"]
    assert [t["content"] for t in turns[len(system) : -1 : 2]] == list(QUESTIONS[: len(manner.examples)])

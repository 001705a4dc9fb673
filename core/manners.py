"""Manners: ways of asking that make the responses to one prompt differ in what people can like.

Samples of one model to one prompt are much alike, so there is little to choose from. A manner is a system turn and two
worked examples in front of the prompt; the responses are then ranked as answers to the bare prompt.
"""

import re
from dataclasses import dataclass

from .comparisons import Prompt

QUESTIONS = ("How do I keep my bicycle from rusting?", "What should I read on holiday?")


@dataclass(frozen=True)
class Manner:
    """How a response is asked for: a system turn, and an answer to each of `QUESTIONS` as an example.

    Attributes:
        mark: what a response in this manner has in it; "" where nothing tells it by its characters.
    """

    name: str
    system: str = ""
    examples: tuple[str, ...] = ()
    mark: str = ""

    def ask(self, prompt: str) -> Prompt:
        """The conversation that asks for a response to the prompt in this manner."""
        turns = [("system", self.system)] * bool(self.system)
        for question, answer in zip(QUESTIONS, self.examples, strict=False):
            turns += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in [*turns, ("user", prompt)]]


MANNERS = (
    Manner("free"),
    Manner("free"),
    Manner(
        "brief",
        "Answer in one short sentence.",
        ("Keep it dry and oil the chain every few weeks.", "A light novel fits into any bag."),
    ),
    Manner(
        "list",
        "Answer with a list.",
        (
            "- Store it in a dry place.\n- Wipe off water and salt after each ride.\n- Oil the chain every few weeks.",
            "- A novel that is set where you travel.\n- A book of short stories.\n- A magazine about your hobby.",
        ),
        mark="- ",
    ),
    Manner(
        "excited",
        "You are full of enthusiasm. Use exclamation marks!",
        (
            "Oh, I love this one! Wipe it dry after every ride! A drop of oil on the chain works wonders!",
            "Holidays are made for reading! Take a big, thick adventure novel with you! You will love it!",
        ),
        mark="!",
    ),
    Manner(
        "asking",
        "Answer, then ask the user a question back.",
        (
            "Keep it dry and oil the chain every few weeks. Do you park it outside at night?",
            "A novel that is set where you travel is hard to beat. Where are you going?",
        ),
        mark="?",
    ),
    Manner(
        "plain",
        "Use short, plain words, as for a child.",
        (
            "Rust likes wet things. So keep your bike dry. Put some oil on the chain now and then.",
            "Take a book that makes you laugh. It should fit in your bag. A book with short tales is nice too.",
        ),
    ),
    Manner(
        "scholarly",
        "Answer like a scholar, in formal language with precise technical terms.",
        (
            "Oxidation of ferrous components is mitigated by minimising exposure to moisture and electrolytes. "
            "Periodic lubrication of the drivetrain establishes a hydrophobic barrier.",
            "Contemporary literature concerning the destination's cultural history is particularly appropriate. "
            "Anthologies of short fiction accommodate intermittent concentration.",
        ),
    ),
)


def repeats(text: str, manner: Manner) -> bool:
    """Whether a text says something twice or repeats an example, which small models fall into."""
    own, examples = _sentences(text), _sentences("\n".join(manner.examples))
    return len(set(own)) < len(own) or not set(own).isdisjoint(examples)


def _sentences(text: str) -> list[str]:
    return [part.strip().casefold() for part in re.split(r"[.!?\n]+", text) if part.strip()]

"""Candidates whose properties differ, made of a handful of words."""

import json
import random
from pathlib import Path

from prlhf.core.candidates import Candidates

WORDS = ("it", "rains", "today", "you", "your", "boots", "are", "particularly", "appropriate", "for", "precipitation")


def response(draws: random.Random) -> str:
    """One to four sentences or list items, with any mark at the end."""
    mark = draws.choice(["", "", "- "])
    sentences = []
    for _ in range(draws.randint(1, 4)):
        said = " ".join(draws.choices(WORDS, k=draws.randint(2, 9)))
        sentences.append(f"{mark}{said.capitalize()}{draws.choice('..!?')}")
    return ("\n" if mark else " ").join(sentences)


def small_pool(prompts: int = 40, responses: int = 6, seed: int = 0) -> list[Candidates]:
    draws = random.Random(seed)
    made = []
    for i in range(prompts):
        texts = dict.fromkeys(response(draws) for _ in range(2 * responses))
        made.append(Candidates(f"What of {i}?", tuple(texts)[:responses], f"pool:{i + 1}"))
    return made


def write_pool(path: Path, pool: list[Candidates]) -> Path:
    rows = [{"prompt": c.prompt, "responses": c.responses} for c in pool]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

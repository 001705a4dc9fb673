"""Samples the pool of the simulated users: everyday prompts with 8 responses each, every one asked for in its manner.

    python recipes/sample_pool.py --out core/sources/everyday.jsonl

The manners are those of `core/manners.py`; they stay out of the pool's prompts. A text is cut after its last whole
sentence and kept if that leaves 8 to 96 tokens, shows the manner's mark and says nothing twice; else it is drawn again
with another seed. What was drawn is kept in `--drawn`, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import re
from pathlib import Path

from tqdm import tqdm

from prlhf.core.generation import GenerateRequest, LocalGenerator, Sampling, whole_sentences
from prlhf.core.manners import MANNERS, Manner
from prlhf.core.pretrained import EXAMPLE_MODEL, cache_dir, find_model
from prlhf.core.store import JsonlStore

PROMPTS = Path(__file__).with_name("everyday_prompts.txt")
SHORTEST, LONGEST = 8, 96
ATTEMPTS = 60
BUDGETS = (24, 48, 96, 64)
TEMPERATURES = (0.5, 0.7, 0.9)


def request(prompt: str, number: int, slot: int, attempt: int) -> GenerateRequest:
    """Budget and temperature turn with prompt and slot, so that no manner always means a long text."""
    budget = LONGEST if MANNERS[slot].name == "list" else BUDGETS[(number + slot + attempt) % len(BUDGETS)]
    temperature = TEMPERATURES[(number + 2 * slot) % len(TEMPERATURES)]
    seed = attempt * len(MANNERS) + slot
    return GenerateRequest(MANNERS[slot].ask(prompt), sampling=Sampling(budget, temperature, top_p=0.95), seed=seed)


def pick(store: JsonlStore, number: int, slot: int, taken: set[str], generator: LocalGenerator) -> str | None:
    """The first drawn text that fits and is not yet taken for this prompt."""
    for attempt in range(ATTEMPTS):
        record = store.get(f"{number}/{slot}/{attempt}")
        text = whole_sentences(record["text"]) if record else ""
        if text and text not in taken and fits(text, MANNERS[slot], generator):
            return text
    return None


def fits(text: str, manner: Manner, generator: LocalGenerator) -> bool:
    if manner.mark not in text or repeats(text, manner):
        return False
    return SHORTEST <= len(generator.tokenizer.response_ids([text])[0]) <= LONGEST


def repeats(text: str, manner: Manner) -> bool:
    """Whether the text says something twice or repeats an example, which small models fall into."""
    own, examples = sentences(text), sentences("\n".join(manner.examples))
    return len(set(own)) < len(own) or not set(own).isdisjoint(examples)


def sentences(text: str) -> list[str]:
    return [part.strip().casefold() for part in re.split(r"[.!?\n]+", text) if part.strip()]


def responses(store: JsonlStore, number: int, generator: LocalGenerator) -> list[str | None]:
    """The prompt's response of each slot, None where none fits yet."""
    taken: set[str] = set()
    found = []
    for slot in range(len(MANNERS)):
        text = pick(store, number, slot, taken, generator)
        found.append(text)
        taken.add(text or "")
    return found


def draw(generator: LocalGenerator, store: JsonlStore, prompts: list[str], attempt: int) -> int:
    """Draws once more for every slot that has no response yet; gives how many were drawn."""
    todo = {}
    for number, prompt in enumerate(prompts):
        for slot, text in enumerate(responses(store, number, generator)):
            key = f"{number}/{slot}/{attempt}"
            if text is None and key not in store:
                made = request(prompt, number, slot, attempt)
                todo[repr(made)] = (key, made)
    with tqdm(total=len(todo), unit="response", desc=f"attempt {attempt + 1}") as bar:
        for candidate in generator.generate([made for _, made in todo.values()]):
            store.append({"key": todo[repr(candidate.request)][0], "text": candidate.text, "ended": candidate.ended})
            bar.update()
    return len(todo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EXAMPLE_MODEL)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drawn", type=Path, default=cache_dir() / "pool" / "drawn.jsonl")
    arguments = parser.parse_args()
    source = find_model(arguments.model)
    generator, store = LocalGenerator.from_source(source), JsonlStore(arguments.drawn)
    prompts = PROMPTS.read_text().splitlines()
    for attempt in range(ATTEMPTS):
        draw(generator, store, prompts, attempt)
    with arguments.out.open("w") as file:
        for number, prompt in enumerate(prompts):
            texts = responses(store, number, generator)
            if not all(texts):
                print(f"left out, not every manner got its response: {prompt}")
                continue
            manners = [manner.name for manner in MANNERS]
            row = {"prompt": prompt, "responses": texts, "manners": manners, "model": source.label}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

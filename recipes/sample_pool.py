"""Samples the pool of the simulated users: everyday prompts with 8 responses each, every one asked for in its manner.

    python recipes/sample_pool.py --out core/sources/everyday.jsonl

The manners are those of `core/manners.py`; they stay out of the pool's prompts. A text is cut after its last whole
sentence and kept if that leaves 8 to 96 tokens, shows the manner's mark and says nothing twice; else it is drawn again
with another seed. What was drawn is kept in `--drawn`, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import sys
from pathlib import Path

from prlhf.core.artefact import whole_file
from prlhf.core.generation import GenerateRequest, LocalGenerator, Sampling, whole_sentences
from prlhf.core.manners import MANNERS, Manner, repeats
from prlhf.core.pretrained import EXAMPLE_MODEL, cache_dir, find_model
from prlhf.core.sample import sample
from prlhf.core.store import JsonlStore

PROMPTS = Path(__file__).with_name("everyday_prompts.txt")
SHORTEST, LONGEST = 8, 96
ATTEMPTS = 20
BUDGETS = (24, 48, 96, 64)
TEMPERATURES = (0.5, 0.7, 0.9)


def request(prompt: str, number: int, slot: int, attempt: int) -> GenerateRequest:
    """Budget and temperature turn with prompt and slot, so that no manner always means a long text."""
    budget = LONGEST if MANNERS[slot].name == "list" else BUDGETS[(number + slot + attempt) % len(BUDGETS)]
    temperature = TEMPERATURES[(number + 2 * slot) % len(TEMPERATURES)]
    seed = attempt * len(MANNERS) + slot
    return GenerateRequest(MANNERS[slot].ask(prompt), sampling=Sampling(budget, temperature, top_p=0.95), seed=seed)


def fits(text: str, manner: Manner, generator: LocalGenerator) -> bool:
    """Whether a text can go into the pool."""
    if not text or manner.mark not in text or repeats(text, manner):
        return False
    return SHORTEST <= len(generator.tokenizer.response_ids([text])[0]) <= LONGEST


def fill(generator: LocalGenerator, store: JsonlStore, prompts: list[str], model: str) -> list[list[str]]:
    """A text for each prompt and manner, "" where none was found; draws until all are there or attempts run out."""
    filled = [[""] * len(MANNERS) for _ in prompts]
    for attempt in range(ATTEMPTS):
        todo = [(n, slot) for n, texts in enumerate(filled) for slot, text in enumerate(texts) if not text]
        if not todo:
            break
        print(f"attempt {attempt + 1}: {len(todo)} responses to find", file=sys.stderr)
        requests = [request(prompts[n], n, slot, attempt) for n, slot in todo]
        for (n, slot), (drawn,) in zip(todo, sample(generator, requests, store, model, show=True), strict=True):
            text = whole_sentences(drawn)
            if text not in filled[n] and fits(text, MANNERS[slot], generator):
                filled[n][slot] = text
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EXAMPLE_MODEL)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drawn", type=Path, default=cache_dir() / "pool" / "drawn.jsonl")
    arguments = parser.parse_args()
    source = find_model(arguments.model)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    filled = fill(LocalGenerator.from_source(source), JsonlStore(arguments.drawn), prompts, source.label)
    with whole_file(arguments.out) as new, new.open("w", encoding="utf-8") as file:
        for prompt, texts in zip(prompts, filled, strict=True):
            if not all(texts):
                print(f"left out, no response in every manner: {prompt}", file=sys.stderr)
                continue
            row = {"prompt": prompt, "responses": texts, "manners": [m.name for m in MANNERS], "model": source.label}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

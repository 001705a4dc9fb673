"""Recorded candidates: prompts with the responses that were sampled for each, as JSONL."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comparisons import DataError, Problem, Prompt, response_text, to_prompt
from .sources.files import jsonl_objects, read_rows


@dataclass(frozen=True)
class Candidates:
    """A prompt and its N recorded responses."""

    prompt: Prompt
    responses: tuple[str, ...]
    place: str = ""


def read_candidates(path: Path) -> list[Candidates]:
    """Reads `{"prompt": ..., "responses": [...]}` lines.

    Raises:
        DataError: names file, line and field of what is wrong.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; candidates are read from JSONL")
    read = [_candidates(row, place) for place, row in jsonl_objects(path)]
    problems = [found for found in read if isinstance(found, Problem)]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        raise DataError(f"{path}: {len(problems)} of {len(read)} lines can't be used:\n{shown}")
    if not read:
        raise DataError(f"{path}: no candidates in it")
    return [found for found in read if isinstance(found, Candidates)]


def read_prompts(source: str) -> list[Prompt]:
    """The distinct prompts of a file of prompts, candidates or comparisons, in their order.

    Args:
        source: anything that `load_comparisons` reads; only `prompt` is looked at.

    Raises:
        DataError: names file, line and field of what is wrong.
    """
    found: dict[str, Prompt] = {}
    for place, row in read_rows(source):
        prompt = row if isinstance(row, Problem) else to_prompt(row.get("prompt"), place)
        if isinstance(prompt, Problem):
            raise DataError(str(prompt))
        found.setdefault(str(prompt), prompt)
    if not found:
        raise DataError(f"{source}: no prompts in it")
    return list(found.values())


def _candidates(row: Mapping[str, Any] | Problem, place: str) -> Candidates | Problem:
    if isinstance(row, Problem):
        return row
    prompt = to_prompt(row.get("prompt"), place)
    responses = row.get("responses")
    if isinstance(prompt, Problem):
        return prompt
    if not isinstance(responses, list) or not responses:
        return Problem(place, "responses", "must be a list of at least one response")
    texts = [response_text(response, place, f"responses[{i}]") for i, response in enumerate(responses)]
    problem = next((text for text in texts if isinstance(text, Problem)), None)
    return problem or Candidates(prompt, tuple(map(str, texts)), place)

"""Candidates: prompts with the responses that were sampled for each, recorded by somebody or kept as they are drawn."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .comparisons import DataError, Problem, Prompt, response_text, to_prompt
from .generation import GenerateRequest, Generator
from .sources.files import jsonl_objects
from .store import JsonlStore


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


def sample(
    generator: Generator, requests: Sequence[GenerateRequest], store: JsonlStore, model: str, show: bool = False
) -> list[list[str]]:
    """The n texts of each request; those in the store are not drawn again, and each is kept as soon as it is drawn.

    Args:
        model: tells models apart in the store, for instance a fingerprint.
        show: whether a bar shows the progress.
    """
    keys = [[_key(model, request, i) for i in range(request.n)] for request in requests]
    missing = [request for request, mine in zip(requests, keys, strict=True) if not set(mine) <= set(store)]
    total, hidden = sum(request.n for request in missing), not (show and missing)
    for candidate in tqdm(generator.generate(missing), total=total, unit="text", desc="responses", disable=hidden):
        request = candidate.request
        made = {"prompt": request.prompt, "user_id": request.user.id, "seed": request.seed, "index": candidate.index}
        facts = {"sampling": asdict(request.sampling), "tokens": candidate.tokens, "ended": candidate.ended}
        store.append({"key": _key(model, request, candidate.index), **made, **facts, "text": candidate.text})
    return [[store[key]["text"] for key in mine] for mine in keys]


def _key(model: str, request: GenerateRequest, index: int) -> str:
    """The same model, request and index give the same key; how many more are asked for does not matter."""
    return hashlib.blake2b(repr((model, replace(request, n=1), index)).encode(), digest_size=16).hexdigest()

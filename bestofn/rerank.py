"""Scores and rankings of recorded candidates for many users, by any scorer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.comparisons import DataError, Problem, Prompt, User, response_text, to_prompt
from ..core.scoring import Ranking, Scorer, ScoreRequest, ranking
from ..core.sources.files import jsonl_objects

PROMPTS_AT_ONCE = 64


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
        raise DataError(f"--candidates {path}: no such file")
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


def rerank(
    scorer: Scorer, candidates: Sequence[Candidates], users: Sequence[User], knows: Callable[[User], bool]
) -> Iterator[Ranking]:
    """One ranking per prompt and user, prompt by prompt; all users of a prompt are scored together."""
    for start in range(0, len(candidates), PROMPTS_AT_ONCE):
        some = candidates[start : start + PROMPTS_AT_ONCE]
        requests = [ScoreRequest(user, c.prompt, c.responses) for c in some for user in users]
        for request, scores in zip(requests, scorer(requests), strict=True):
            yield ranking(request, scores, knows(request.user))


def record_key(run: str, user: User, prompt: Prompt, responses: Sequence[str]) -> str:
    """Key of a score record: the same run, user, prompt and responses give the same key."""
    return hashlib.blake2b(repr((run, user, prompt, tuple(responses))).encode(), digest_size=16).hexdigest()

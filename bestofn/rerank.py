"""Scores and rankings of recorded candidates for many users, by any scorer."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

from ..core.candidates import Candidates
from ..core.comparisons import Prompt, User
from ..core.scoring import Ranking, Scorer, ScoreRequest, ranking

PROMPTS_AT_ONCE = 64


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

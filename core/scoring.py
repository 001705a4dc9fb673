"""What ranks responses for a user: the one thing that best-of-n and evaluation know of a model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .comparisons import Prompt, User


@dataclass(frozen=True)
class ScoreRequest:
    """Score these N responses to this prompt for this user."""

    user: User
    prompt: Prompt
    responses: Sequence[str]


Scorer = Callable[[Sequence[ScoreRequest]], list[Tensor]]
"""Requests -> one (N,) fp32 tensor each; higher is better. Batching is the scorer's business."""


def each(function: Callable[[User, Prompt, str], float]) -> Scorer:
    """A scorer from a plain function of one response."""

    def score(requests: Sequence[ScoreRequest]) -> list[Tensor]:
        return [
            torch.tensor([function(r.user, r.prompt, response) for response in r.responses], dtype=torch.float32)
            for r in requests
        ]

    return score


@dataclass(frozen=True)
class Ranking:
    """Responses of one prompt in the order that one user likes them.

    Attributes:
        user_known: False when the order is the unknown user's, row 0.
        order: positions of the responses, best first; equal scores keep their order, NaN comes last.
        scores: score of each response, in the order they were given.
    """

    user: User
    user_known: bool
    prompt: Prompt
    responses: Sequence[str]
    scores: Sequence[float]
    order: Sequence[int]

    @property
    def best(self) -> str:
        return self.responses[self.order[0]]


def ranking(request: ScoreRequest, scores: Tensor, user_known: bool) -> Ranking:
    """Orders the responses of a request.

    Raises:
        ValueError: no response, or every score is NaN.
    """
    values = scores.tolist()
    if not values or all(map(math.isnan, values)):
        raise ValueError(f"user {request.user.id!r}: no response with a score that is a number, so none can be picked")
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i]))
    return Ranking(request.user, user_known, request.prompt, request.responses, values, order)

"""The implicit reward `beta log pi(y|x, u) / pi_ref(y|x)` (section 4.4 of the paper): a policy that ranks responses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..core.backbone import unwrapped
from ..core.comparisons import Comparison
from ..core.scoring import ScoreRequest
from ..core.soft_user import fit_soft_user
from ..core.texts import Text, texts_of, texts_of_requests
from ..core.tokenize import TokenRow
from ..core.user_scores import mark_of, user_scores
from .log_probs import TOKENS_PER_BATCH, cached_log_probs, log_prob_cache, log_probs

if TYPE_CHECKING:
    from .policy import PersonalizedPolicy


def implicit_rewards(policy: "PersonalizedPolicy", requests: Sequence[ScoreRequest]) -> list[Tensor]:
    """Rewards (N,) of each request's responses; what was computed once is on disk, batch by batch."""
    module = unwrapped(policy.module)

    @torch.inference_mode()
    def own(rows: list[TokenRow], users: Tensor) -> Tensor:
        return log_probs(module, rows, users).cpu()

    with_users = user_scores(
        policy.reader,
        requests,
        policy.users,
        log_prob_cache(policy.backbone.fingerprint),
        lambda row: mark_of(policy.user_model, row, policy.settings["user_place"]),
        own,
        policy.show,
        TOKENS_PER_BATCH,
    )
    reference = reference_log_probs(policy, texts_of_requests(requests)).split([len(r.responses) for r in requests])
    return [policy.beta * (a - b) for a, b in zip(with_users, reference, strict=True)]


def reference_log_probs(policy: "PersonalizedPolicy", texts: Sequence[Text]) -> Tensor:
    """log pi_ref of each text's response, (R,), from the disk where it is there."""
    store = log_prob_cache(policy.settings["reference"]["fingerprint"])

    def compute(some: list[TokenRow]) -> Tensor:
        with policy.as_reference() as model:
            return log_probs(model, some)

    def rows_at(places: list[int]) -> list[TokenRow]:
        return policy.reader.tokenize([texts[i] for i in places])

    return cached_log_probs(policy.reader.keys(texts), rows_at, store, compute, "reference" if policy.show else "")


def fit_policy_user(
    policy: "PersonalizedPolicy", rows: Sequence[Comparison], parts: np.ndarray
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A new user's own part by gradient on the logistic loss of implicit rewards, everything else frozen.

    Args:
        parts: (k,) fold of each comparison.

    Returns:
        see `fit_soft_user`.
    """
    sides, module = policy.reader.tokenize(texts_of(rows)), unwrapped(policy.module)
    reference = reference_log_probs(policy, texts_of(rows))

    def margins(which: Sequence[int]) -> Tensor:
        at = [*which, *(len(rows) + i for i in which)]
        nobody = torch.zeros(len(at), dtype=torch.int64)
        ratios = log_probs(module, [sides[i] for i in at], nobody)
        return policy.beta * torch.sub(*(ratios - reference[at].to(ratios.device)).chunk(2))

    return fit_soft_user(module, policy.user_model, margins, parts, policy.settings["user_learning_rate"], policy.show)

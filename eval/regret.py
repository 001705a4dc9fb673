"""What users lose by a pick, where their true utility is known: the test of best-of-n that no accuracy replaces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..core.candidates import Candidates
from ..core.comparisons import User
from ..core.figures import Figure
from ..core.scoring import Scorer, ScoreRequest, ranking
from ..core.splits import prompt_text
from .metrics import clustered_mean, resampling_units

RANDOM, ORACLE = "random", "oracle"


@dataclass(frozen=True)
class Regret:
    """Regret of each arm: true utility of the best candidate less that of the pick.

    The unit is the user's within-prompt spread: the standard deviation of their true utility over the candidates of a
    prompt, pooled over the prompts.

    Attributes:
        figures: arm -> mean over all prompts and users; `random` is the expectation of a blind pick, `oracle` is 0.
        users: one row per user: `user_id`, regret of every arm, `n` prompts.
        unit: what the intervals' bootstrap draws, `user` or `prompt`.
    """

    figures: dict[str, Figure]
    users: pd.DataFrame
    unit: str


def regret(gold: Scorer, arms: Mapping[str, Scorer], users: Sequence[User], candidates: Sequence[Candidates]) -> Regret:
    """Regret of the picks that each arm's scorer makes, on the prompts that have two responses or more.

    Args:
        gold: the users' true utility.
        arms: name -> what ranks the candidates.

    Raises:
        ValueError: nobody to ask or nothing to pick from, or an arm is called `random` or `oracle`.
    """
    candidates = [c for c in candidates if len(c.responses) > 1]
    if not users or not candidates:
        raise ValueError("regret needs at least one user and one prompt with two responses to pick from")
    if taken := {RANDOM, ORACLE} & set(arms):
        raise ValueError(f"arm {taken.pop()!r}: this name is for the baseline that is always there")
    requests = [ScoreRequest(user, c.prompt, c.responses) for user in users for c in candidates]
    utilities = [np.asarray(values, dtype=np.float64) for values in gold(requests)]
    spreads = _spreads(utilities, len(users))  # (users,)
    units = np.repeat(spreads, len(candidates))
    lost = {RANDOM: np.asarray([(u.max() - u.mean()) for u in utilities]) / units}
    for name, scorer in arms.items():
        picks = [ranking(r, s, True).order[0] for r, s in zip(requests, scorer(requests), strict=True)]
        lost[name] = np.asarray([u.max() - u[pick] for u, pick in zip(utilities, picks, strict=True)]) / units
    ids = [r.user.id for r in requests]
    unit, clusters = resampling_units(ids, [prompt_text(r.prompt) for r in requests])
    figures = {name: clustered_mean(values, clusters, bounds=(0.0, None)) for name, values in lost.items()}
    figures[ORACLE] = {"value": 0.0, "low": 0.0, "high": 0.0, "n": len(requests)}  # by definition, not by sampling
    table = pd.DataFrame({"user_id": ids, **lost, ORACLE: 0.0}).groupby("user_id", sort=True).mean()
    return Regret(figures, table.assign(n=len(candidates)).reset_index(), unit)


def _spreads(utilities: Sequence[np.ndarray], users: int) -> np.ndarray:
    """Pooled within-prompt standard deviation of each user's utilities, (users,); requests stand user by user."""
    per_user = np.array_split(np.asarray([u.var() for u in utilities]), users)
    return np.sqrt([max(variances.mean(), 1e-24) for variances in per_user])

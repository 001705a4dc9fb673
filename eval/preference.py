"""Preference accuracy of a scorer on held-out comparisons, as the paper defines it (C.3), with its baselines beside it.

One schema for all figures: `accuracy.<model>.{top, top_row0, generic, average.{all, <group>}, average_row0}`, each leaf
`{"value", "low", "high", "n"}`. On rows of simulated users `ceiling` is the accuracy of their true utility, which no
model can beat but by luck, since choices are noisy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..core.comparisons import Comparison, User
from ..core.figures import NOTHING, Figure, wilson
from ..core.scoring import Scorer, ScoreRequest
from ..core.sources.simulated import true_margins
from ..core.splits import prompt_text
from .baselines import always_longer, length_rule, shuffled_users
from .metrics import (
    accuracies,
    clustered_mean,
    log_losses,
    mean_over_users,
    paired_difference,
    per_user,
    resampling_units,
)

SHUFFLES = 5
OF_ROW0 = "_row0"  # ends the name of what a model says when it does not know the user
WORDS = {
    "row0": "row 0: user unknown",
    "uniform": "uniform model",
    "longer": "always the longer one",
    "length_rule": "length rule per user",
    "shuffled_users": "somebody else's id",
    "ceiling": "ceiling: true utility",
}
MEANINGS = {
    "individualized": "each user has a vector of their own",
    "cluster": "each user is a mixture of a few vectors that all share",
    "row0": "the same model, told nothing about the user",
    "uniform": "one model for everybody, trained on the same comparisons",
    "longer": "no model: the longer response",
    "length_rule": "no model: longer or shorter, whichever fitted the user's training comparisons",
    "shuffled_users": "control: the same model under the ids of other users",
    "ceiling": "the utility from which simulated users chose; choices are noisy, so it is not right always",
}


@dataclass
class Evaluation:
    """Figures of one evaluation.

    Attributes:
        figures: the JSON object that `prlhf eval preference` prints.
        users: one row per user: `user_id`, `known`, `n`, accuracy of every model, Wilson interval of the first.
        correct: model -> (B,) 1, 0.5 or 0 per comparison, in the order of the rows; `row0` and `<model>_row0` are what
            the models say when they do not know the user.
        seen: (B,) whether the comparison's user was seen in training.
        clusters: (B,) what a bootstrap draws.
    """

    figures: dict[str, Any]
    users: pd.DataFrame
    correct: dict[str, np.ndarray] = field(repr=False)
    seen: np.ndarray = field(repr=False)
    clusters: np.ndarray = field(repr=False)


def is_model(column: str) -> bool:
    """Whether a column of `Evaluation.correct` is a model, and not what a model says when it does not know the user."""
    return column != "row0" and not column.endswith(OF_ROW0)


def units_of(rows: Sequence[Comparison]) -> tuple[str, Sequence[Any]]:
    """What a bootstrap over comparisons draws, `user` or `prompt`, and that of each row (B,)."""
    return resampling_units([row.user.id for row in rows], [prompt_text(row.prompt) for row in rows])


def margins(scorer: Scorer, rows: Sequence[Comparison], users: Sequence[User]) -> np.ndarray:
    """score(chosen) - score(rejected) of each comparison for the given users, (B,)."""
    requests = [ScoreRequest(u, row.prompt, [row.chosen, row.rejected]) for u, row in zip(users, rows, strict=True)]
    return np.asarray([float(s[0] - s[1]) for s in scorer(requests)], dtype=np.float64)


def evaluate(
    name: str,
    scorer: Scorer,
    rows: Sequence[Comparison],
    knows: Callable[[User], bool],
    baselines: Mapping[str, Scorer],
    directions: Mapping[str | None, int],
    group_column: str | None = None,
    shuffles: int = SHUFFLES,
) -> Evaluation:
    """Evaluates a scorer on comparisons that it was not trained on.

    Args:
        name: of the scorer in the figures, for instance its user model.
        knows: whether the scorer was trained on a user; other users count for Accuracy-generic, by row 0.
        baselines: further scorers, the uniform model for one.
        directions: the best fixed length direction per user, from training rows (see `length_directions`).
        group_column: column of the rows by which Accuracy-average is also given, for instance majority / minority.
        shuffles: how many times ids are shuffled for the control, each costing one more scoring of all rows where
            scores are not shared by users; 0 for no control.

    Raises:
        ValueError: no rows, or a row lacks the group column; names it.
    """
    if not rows:
        raise ValueError("no comparisons to evaluate on")
    users = [row.user for row in rows]
    seen = np.asarray([knows(user) for user in users])
    known = sorted({user.id for user in users if user.id is not None and knows(user)})
    by_model = _all_margins(name, scorer, rows, users, known, baselines, directions, shuffles)
    correct = {model: np.mean([accuracies(m) for m in each], axis=0) for model, each in by_model.items()}
    table = _user_table(name, users, seen, correct, _groups(rows, group_column))
    unit, drawn = units_of(rows)
    clusters = np.asarray(drawn, dtype=object)
    figures = {
        "rows": len(rows),
        "users": {"seen": len(known), "unseen": len({u.id for u in users} - {None, *known})},
        "interval": f"95 %, bootstrap over {unit}s; average: Student's t over users",
        "accuracy": _accuracy(name, correct, seen, clusters, table),
        "log_loss": {
            model: clustered_mean(log_losses(by_model[model][0]), clusters, bounds=(0.0, None))
            for model in (name, "row0")
        },
        "difference": _differences(name, correct, seen, clusters),
        "ties": int((by_model[name][0] == 0).sum()),
    }
    return Evaluation(figures, table, correct, seen, clusters)


def _all_margins(
    name: str,
    scorer: Scorer,
    rows: Sequence[Comparison],
    users: Sequence[User],
    known: Sequence[str],
    baselines: Mapping[str, Scorer],
    directions: Mapping[str | None, int],
    shuffles: int,
) -> dict[str, list[np.ndarray]]:
    """Model -> margins (B,), several of them where the model is a random control."""
    nobody = [User(None, user.text) for user in users]
    others = [shuffled_users(users, known, seed) for seed in range(shuffles)]
    # One call for all variants of the scorer, row by row: it runs each response through its backbone once.
    variants = [users, nobody, *others]
    repeated = [row for row in rows for _ in variants]
    every = margins(scorer, repeated, [user for same_row in zip(*variants, strict=True) for user in same_row])
    own, row0, *shuffled = every.reshape(len(rows), len(variants)).T
    result = {name: [own], "row0": [row0]}
    for other, baseline in {**baselines, "length_rule": length_rule(directions)}.items():
        if other != name:
            result |= {other: [margins(baseline, rows, users)], other + OF_ROW0: [margins(baseline, rows, nobody)]}
    result["longer"] = [margins(always_longer(), rows, users)]
    if shuffled and len(known) > 1:  # with one user there is nobody else's id
        result["shuffled_users"] = shuffled
    truth = true_margins(rows)
    return result if truth is None else result | {"ceiling": [truth]}


def _accuracy(
    name: str, correct: dict[str, np.ndarray], seen: np.ndarray, clusters: np.ndarray, table: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    own_row0 = {name: "row0", "shuffled_users": "row0", "longer": "longer"}
    for model, values in correct.items():
        if not is_model(model):
            continue
        row0 = own_row0.get(model, model + OF_ROW0)
        there = row0 in correct  # a true utility is somebody's: it has no row 0
        figures[model] = {
            "top": clustered_mean(values[seen], clusters[seen]),
            "top_row0": clustered_mean(correct[row0][seen], clusters[seen]) if there else dict(NOTHING),
            "average_row0": _averages(table, row0) if there else {},
            "generic": clustered_mean(values[~seen], clusters[~seen]),
            "average": _averages(table, model),
        }
    return figures


def _differences(
    name: str, correct: dict[str, np.ndarray], seen: np.ndarray, clusters: np.ndarray
) -> dict[str, Figure]:
    """The scorer's accuracy minus each other model's, on the rows of seen users."""
    others = [model for model in correct if model == "row0" or (model != name and is_model(model))]
    return {m: paired_difference(correct[name][seen], correct[m][seen], clusters[seen]) for m in others}


def _averages(table: pd.DataFrame, model: str) -> dict[str, Figure]:
    seen = table[table["known"]]
    groups = {str(group): part for group, part in seen.groupby("group")} if "group" in table else {}
    return {name: mean_over_users(part[model].to_numpy()) for name, part in {"all": seen, **groups}.items()}


def _groups(rows: Sequence[Comparison], column: str | None) -> dict[str, str]:
    """User -> group; a user belongs to the group of their first row."""
    if column is None:
        return {}
    groups: dict[str, str] = {}
    for row in rows:
        if column not in row.extra:
            columns = ", ".join(row.extra) or "none"
            raise ValueError(f"--group {column}: no such column in {row.place}; columns are {columns}")
        groups.setdefault(row.user.id or "", str(row.extra[column]))
    return groups


def _user_table(
    name: str, users: Sequence[User], seen: np.ndarray, correct: dict[str, np.ndarray], groups: Mapping[str, str]
) -> pd.DataFrame:
    table = per_user([user.id for user in users], {"known": seen.astype(float), **correct})
    table["known"] = table["known"] > 0
    intervals = [wilson(share * n, n) for share, n in zip(table[name], table["n"], strict=True)]
    table["low"], table["high"] = [i["low"] for i in intervals], [i["high"] for i in intervals]
    if groups:
        table["group"] = table["user_id"].map(groups)
    return table

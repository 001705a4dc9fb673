"""The pages that verbs write: which sections they have, and the audit that stands in each."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from prlhf.core.comparisons import Comparison, Comparisons
from prlhf.core.figures import wilson
from prlhf.core.splits import group_key
from prlhf.eval.charts import shown
from prlhf.eval.preference import Evaluation
from prlhf.eval.report import Section, write_report
from prlhf.eval.sections import (
    accuracy_section,
    audit_section,
    groups_section,
    made_section,
    map_section,
    users_section,
)
from prlhf.prm.reward_model import PersonalizedRewardModel

PERSONAL_DATA = (
    "Each user's vector less that of the unknown user, in the two directions in which users differ most. Close "
    "together means that the model takes them to like the same. User vectors are personal data."
)


def evaluation_page(
    path: Path, run: Path, model: PersonalizedRewardModel, rows: Comparisons, found: Evaluation, seconds: float
) -> None:
    """The page of `prlhf eval preference`."""
    command = shlex.join(["prlhf", "eval", "preference", str(run), "--data", rows.source])
    accuracy = found.figures["accuracy"]
    name = next(iter(accuracy))
    lead = [
        f"Of the choices of users seen in training, this model predicts {shown(accuracy[name]['top'])}; without "
        f"knowing the user it predicts {shown(accuracy[name]['top_row0'])}, and one model for everybody "
        f"{shown(accuracy['uniform']['top'])}.",
        f"Comparisons: {rows.source}. Run: {run}.",
    ]
    sections = [
        *evaluation_sections(found, model),
        audit_section([*audit_of_training(model), *audit({"evaluated": rows}, model)]),
        made_section(command, facts_of(model), {"evaluation": seconds}),
    ]
    write_report(path, "What personalization is worth", lead, sections)


def evaluation_sections(
    found: Evaluation, model: PersonalizedRewardModel, groups: Mapping[str, str] | None = None
) -> list[Section | None]:
    """Accuracy, users, groups and the map; `groups` names a group for the map for each user."""
    ids = list(model.users.ids)
    with torch.no_grad():
        vectors = model.user_model(torch.arange(len(model.users))).numpy()
    grouped = None if groups is None else [groups.get(user, "") for user in ids]
    drawn = map_section(vectors, ids, grouped, PERSONAL_DATA)
    return [accuracy_section(found), users_section(found), groups_section(found), drawn]


def facts_of(model: PersonalizedRewardModel) -> dict[str, str]:
    """How a model was trained, for the end of a page."""
    made = model.settings
    return {
        "model": f"{made['model']['label']}, {made['model']['dtype']}, weights {made['model']['fingerprint']}",
        "user model": f"{made['user_model']}, {made['aggregator']}, {made['pooling']} pooling",
        "trained on": f"{model.figures['rows']['train']:,} comparisons, hash {made['data']['hash']}",
        "chosen on": f"{model.figures['rows']['validation']:,} validation comparisons",
    }


Line = tuple[str, str, str]


def audit_of_training(model: PersonalizedRewardModel) -> list[Line]:
    """What the run says of the rows that it was trained on."""
    return [
        (f"{part}: rows left out", _left_out(counts), "rows that could not be used, or whose two responses are equal")
        for part, counts in model.figures["left_out"].items()
    ] + [
        (f"{part}: rows over {model.layout.max_length} tokens", f"{n:,}", f"policy: {model.layout.over_long}")
        for part, n in model.figures["over_long"].items()
    ]


def audit(parts: Mapping[str, Comparisons], model: PersonalizedRewardModel) -> list[Line]:
    """Rows of each part, every row that was left out, and what they have in common with the part before."""
    lines: list[Line] = []
    for name, rows in parts.items():
        users = {row.user.id for row in rows}
        known = sum(model.knows(user) for user in {row.user for row in rows})
        lines.append((f"{name}: comparisons", f"{len(rows):,}", f"{len(users):,} users, {known:,} of them known"))
        lines.append((f"{name}: rows left out", _left_out(rows.dropped_counts), "unusable rows, and equal responses"))
        over = sum(model.over_long_by_user(list(rows)).values())
        lines.append((f"{name}: rows over {model.layout.max_length} tokens", f"{over:,}", "truncated where scored"))
        lines.append((f"{name}: the longer response was chosen", _longer(rows), "near 50 %: length explains little"))
    if {"train", "test"} <= set(parts):
        shared = _keys(parts["train"]) & _keys(parts["test"])
        lines.append(("prompts in both train and test", f"{len(shared):,}", "must be 0: tests are on new prompts"))
    return lines


def _keys(rows: Sequence[Comparison]) -> set[str]:
    return {group_key(row, "prompt") for row in rows}


def _longer(rows: Sequence[Comparison]) -> str:
    return shown(wilson(sum(len(row.chosen) > len(row.rejected) for row in rows), len(rows)))


def _left_out(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {kind}" for kind, n in counts.items()) or "0"

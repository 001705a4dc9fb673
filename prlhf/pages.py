"""The pages that verbs write: which sections they have, and the audit that stands in each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.core.comparisons import Comparisons
from prlhf.core.figures import Figure
from prlhf.core.personal import PersonalizedModel
from prlhf.core.splits import group_key
from prlhf.eval.charts import POINTS, shown
from prlhf.eval.metrics import clustered_mean
from prlhf.eval.preference import Evaluation, units_of
from prlhf.eval.report import Section, write_report
from prlhf.eval.sections import (
    accuracy_section,
    audit_section,
    bars_section,
    groups_section,
    made_section,
    map_section,
    users_section,
)

PERSONAL_DATA = (
    "Each user's vector less that of the unknown user, in the two directions in which users differ most. Close "
    "together means that the model takes them to like the same. User vectors are personal data."
)


def evaluation_page(
    path: Path,
    command: str,
    seconds: float,
    model: PersonalizedModel,
    rows: Comparisons,
    found: Evaluation,
    against: Mapping[str, Any] | None = None,
) -> None:
    """The page of `prlhf eval preference`; `against` holds another run and the difference to it."""
    bars = {f"this run minus {against['run']}": against["difference"]} if against else {}
    accuracy, *others = evaluation_sections(found, model)
    text = ["Paired difference in accuracy on the same comparisons of users that this run has seen."]
    sections = [
        accuracy,
        bars_section("Against another run", text, bars, "difference in points", POINTS) if bars else None,
        *others,
        audit_section([*audit_of_training(model), *audit({"evaluated": rows}, model)]),
        made_section(command, facts_of(model), {"evaluation": seconds}),
    ]
    write_report(path, "What personalization is worth", _lead(rows.source, found), sections)


def _lead(source: str, found: Evaluation) -> list[str]:
    """What came out, as far as there were such users and such models."""
    accuracy = found.figures["accuracy"]
    name = next(iter(accuracy))
    own = accuracy[name]
    lead = [f"Evaluated on {len(found.correct[name]):,} comparisons of {source}."]
    if own["top"]["value"] is not None and name == "uniform":
        lead.append(f"One model for everybody, it predicts {shown(own['top'])} of the choices.")
    elif own["top"]["value"] is not None:
        everybody = f", one model for everybody {shown(accuracy['uniform']['top'])}" if "uniform" in accuracy else ""
        lead.append(
            f"Of the choices of users seen in training, this model predicts {shown(own['top'])}; without knowing the "
            f"user it predicts {shown(own['top_row0'])}{everybody}, "
            f"and the best length rule of each user {shown(accuracy['length_rule']['top'])}."
        )
    if own["generic"]["value"] is not None:
        lead.append(f"Of the choices of users it has never seen, ranked by row 0, it predicts {shown(own['generic'])}.")
    return lead


def evaluation_sections(
    found: Evaluation, model: PersonalizedModel, groups: Mapping[str, str] | None = None
) -> list[Section | None]:
    """Accuracy, users, groups and the map; `groups` names a group for the map for each user."""
    ids = list(model.users.ids)
    vectors = model.user_model.vectors().numpy()
    grouped = None if groups is None else [groups.get(user, "") for user in ids]
    drawn = map_section(vectors, ids, grouped, PERSONAL_DATA)
    return [accuracy_section(found), users_section(found), groups_section(found), drawn]


def facts_of(model: PersonalizedModel) -> dict[str, str]:
    """How a model was trained, for the end of a page."""
    made = model.settings
    return {
        "model": f"{made['model']['label']}, {made['model']['dtype']}, weights {made['model']['fingerprint']}",
        "user model": f"{made['user_model']}, {_how(made)}",
        "trained on": f"{model.figures['rows']['train']:,} comparisons, hash {made['data']['hash']}",
        "chosen on": f"{model.figures['rows']['validation']:,} validation comparisons",
    }


def _how(made: dict[str, Any]) -> str:
    """How user and response meet, or by which losses a policy was trained."""
    if "aggregator" in made:
        return f"{made['aggregator']}, {made['pooling']} pooling"
    return f"policy trained by {' + '.join(made['loss_type'])}, beta {made['beta']:g}; scores are implicit rewards"


Line = tuple[str, str, str]
LONGER = "over all users; what length explains of each one is the length rule's accuracy"


def audit_of_training(model: PersonalizedModel) -> list[Line]:
    """What the run says of the rows that it was trained on, and that chose for it."""
    lines: list[Line] = []
    for part in ("train", "validation"):
        left, over = model.figures["left_out"][part], model.figures["over_long"][part]
        lines.append((f"{part}: comparisons", f"{model.figures['rows'][part]:,}", "what the run was made with"))
        lines.append((f"{part}: rows left out", _left_out(left), "unusable rows, and rows with two equal responses"))
        what = f"{part}: rows over {model.layout.max_length} tokens"
        lines.append((what, f"{over:,}", f"policy: {model.layout.over_long}"))
    return lines


def audit(parts: Mapping[str, Comparisons], model: PersonalizedModel) -> list[Line]:
    """Users of each part, every row that was left out of it, and how far length alone explains the choices."""
    lines: list[Line] = []
    for name, rows in parts.items():
        users = {row.user for row in rows}
        known = sum(model.knows(user) for user in users)
        lines.append((f"{name}: comparisons", f"{len(rows):,}", f"{len(users):,} users, {known:,} of them known"))
        lines.append((f"{name}: rows left out", _left_out(rows.dropped_counts), "rows that could not be used"))
        over = sum(model.over_long_by_user(list(rows)).values())
        lines.append((f"{name}: rows over {model.layout.max_length} tokens", f"{over:,}", "truncated where scored"))
        lines.append((f"{name}: the longer response was chosen", shown(_longer(rows)), LONGER))
    return lines


def prompts_in_common(first: Comparisons, second: Comparisons) -> Line:
    """Whether a prompt stands on both sides of a split."""
    shared = {group_key(row, "prompt") for row in first} & {group_key(row, "prompt") for row in second}
    return ("prompts in both train and test", f"{len(shared):,}", "must be 0: tests are on new prompts")


def _longer(rows: Comparisons) -> Figure:
    values = np.asarray([len(row.chosen) > len(row.rejected) for row in rows], dtype=np.float64)
    return clustered_mean(values, units_of(rows)[1])


def _left_out(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {kind}" for kind, n in counts.items()) or "0"

"""The sections of a report page, each from figures that a verb has at hand; None where there is nothing to show."""

import platform
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..core.artefact import versions
from ..core.figures import NOTHING, Figure, figure
from ..core.scoring import Ranking
from ..core.splits import prompt_text
from .charts import PERCENT, POINTS, Series, Sign, Unit, dots, histogram, scatter, shown, sign
from .picks import side_by_side
from .preference import MEANINGS, WORDS, Evaluation, is_model
from .report import NO_ID, UNKNOWN, Chart, Command, Section, Table

EVERYBODY_AT_ONCE = 60  # users in one chart of dots
LOWEST = 30
TABLE_ROWS = 5000
_SIGNS = {
    "row0": Sign("--c1", "circle-open", "○"),
    "uniform": Sign("--c2", "x-thin-open", "✕"),
    "length_rule": Sign("--c3", "triangle-up-open", "△"),
    "ceiling": Sign("--ink", "line-ns-open", "│"),
    UNKNOWN: Sign("--c1", "diamond-open", "◇"),
    "generic": Sign("--muted", "diamond-open", "◇"),
}
_NOT_MODELS = {"user_id", "known", "n", "low", "high", "group"}


def accuracy_section(evaluation: Evaluation) -> Section:
    """Accuracy of every model on seen and on unseen users, and paired differences."""
    figures = evaluation.figures
    accuracy, users = figures["accuracy"], figures["users"]
    name = next(iter(accuracy))
    text = [
        "Share of the comparisons in which the response that the person chose scores higher than the one they "
        "rejected; a tie counts half, so a coin is right half the time.",
        f"{figures['rows']:,} comparisons, of {users['seen']:,} users seen in training "
        f"and {users['unseen']:,} not. Interval: {figures['interval']}.",
    ]
    lines = _accuracies(accuracy)
    rows = [[_words(m, name), shown(top), shown(generic)] for m, (top, generic) in lines.items()]
    table = Table("Accuracy", ["model", "seen users", "users not seen in training"], rows)
    meanings = [[_words(m, name), MEANINGS[m]] for m in lines if m in MEANINGS]
    named = Table("What the models are", ["model", "what it is"], meanings, words=2, folded="What these models are")
    differences = _differences(name, figures["difference"], list(lines))
    return Section("Accuracy", text, [_accuracy_dots(lines, name), table, named, *differences])


def _words(model: str, name: str) -> str:
    return model if model == name else WORDS.get(model, model)


def _accuracies(accuracy: Mapping[str, Mapping[str, Figure]]) -> dict[str, tuple[Figure, Figure]]:
    """Model -> figures on seen and unseen users: the evaluated model, its row 0, then the others from high to low."""
    name, *others = accuracy
    mine = accuracy[name]
    row0 = {} if name == "uniform" else {"row0": (mine["top_row0"], mine["generic"])}
    others.sort(key=lambda model: (model == "ceiling", -(accuracy[model]["top"]["value"] or 0)))
    rest = {m: (accuracy[m]["top"], accuracy[m]["generic"]) for m in others}
    return {name: (mine["top"], mine["generic"]), **row0, **rest}


def _accuracy_dots(lines: Mapping[str, tuple[Figure, Figure]], name: str) -> Chart:
    drawn = {_words(m, name): pair for m, pair in lines.items() if m != "ceiling"}
    seen, unseen = ([pair[i] for pair in drawn.values()] for i in (0, 1))
    series = [Series("seen users", seen, sign(0))]
    if any(found["value"] is not None for found in unseen):
        series.append(Series("users not seen in training", unseen, _SIGNS["generic"]))
    across = {"coin": {**NOTHING, "value": 0.5}, "ceiling": lines.get("ceiling", (NOTHING,))[0]}
    return dots("Accuracy of each model, with 95 % intervals", list(drawn), series, "accuracy", lines=across)


def _differences(name: str, differences: Mapping[str, Figure], order: Sequence[str]) -> list[Chart | Table]:
    listed = {m: differences[m] for m in (*order, *differences) if m in differences}
    there = {_words(m, name): f for m, f in listed.items() if f["value"] is not None}
    caption = f"{name} minus each other model, on the same comparisons of seen users"
    return _bars(caption, there, "difference in points", POINTS) if there else []


def _bars(caption: str, bars: Mapping[str, Figure], axis: str, unit: Unit) -> list[Chart | Table]:
    zero = {"no difference": {**NOTHING, "value": 0.0}} if unit.signed else {}
    chart = dots(caption, list(bars), [Series(axis, list(bars.values()), sign(0))], axis, unit, zero)
    rows = [[name, shown(found, unit), f"{found['n']:,}"] for name, found in bars.items()]
    return [chart, Table(caption, ["", axis, "n"], rows)]


def bars_section(
    title: str, text: Sequence[str], bars: Mapping[str, Figure], axis: str, unit: Unit = PERCENT
) -> Section | None:
    """Named figures as dots with intervals and as a table: the regret of each arm, the accuracy of later users."""
    if all(found["value"] is None for found in bars.values()):
        return None
    return Section(title, text, _bars(title, bars, axis, unit))


def users_section(evaluation: Evaluation) -> Section:
    """Accuracy of every user; of many users the lowest, and how the gains over row 0 are spread."""
    name = next(iter(evaluation.figures["accuracy"]))
    users = evaluation.users.sort_values(["known", name, "user_id"], ascending=[False, False, True])
    said = "" if name == "uniform" else f"{_gains_in_words(users, name)} "
    text = [f"{said}Each interval is a 95 % one (Wilson); where intervals overlap, the order of the users says little."]
    parts: list[Chart | Table] = []
    if len(users) <= EVERYBODY_AT_ONCE:
        parts.append(_user_dots(users, name, "Accuracy per user"))
    else:
        known = users[users["known"]]
        gains = (known[name] - known["row0"]).to_numpy(dtype=np.float64)
        if len(gains):
            parts.append(histogram("Gain over row 0, all users seen in training", gains, "gain in points", "users"))
        some, which = (known, "seen in training") if len(known) else (users, "not seen in training")
        label = f"The {LOWEST} users with the lowest accuracy, of {len(some):,} {which}"
        parts.append(_user_dots(some.sort_values([name, "user_id"]).head(LOWEST), name, label))
    return Section("Accuracy per user", text, [*parts, _user_table(users, name)])


def _gains_in_words(users: pd.DataFrame, name: str) -> str:
    known = users[users["known"]]
    more, less = (known[name] > known["row0"]).sum(), (known[name] < known["row0"]).sum()
    rest = len(users) - len(known)
    words = [
        f"Knowing the user, accuracy is above row 0 for {more:,} of {len(known):,} users and below for {less:,}.",
        f"Not seen in training and marked “{UNKNOWN}”: {rest:,}.",
    ]
    return " ".join(sentence for sentence, there in zip(words, (len(known), rest), strict=True) if there)


def _user_dots(users: pd.DataFrame, name: str, label: str) -> Chart:
    columns = zip(users[name], users["low"], users["high"], users["n"], strict=True)
    figures = [figure(*numbers) for numbers in columns]
    known = users["known"].tolist()
    series = [Series(name, [f if k else NOTHING for f, k in zip(figures, known, strict=True)], sign(0))]
    if not all(known):
        rest = [NOTHING if k else f for f, k in zip(figures, known, strict=True)]
        series.append(Series(f"{UNKNOWN}, not seen in training", rest, _SIGNS[UNKNOWN]))
    for model in ("row0", "uniform", "length_rule", "ceiling"):
        if model in users and model != name:
            at = users[model].where(users["known"] | (model != "row0"), np.nan)  # of an unknown user both are one
            marks = [{**NOTHING, "value": value} for value in at.tolist()]
            series.append(Series(WORDS[model], marks, _SIGNS[model]))
    return dots(label, [user_id or NO_ID for user_id in users["user_id"]], series, "accuracy")


def _user_table(users: pd.DataFrame, name: str) -> Table:
    models = [m for m in users.columns if m == "row0" or (m not in {name, *_NOT_MODELS} and is_model(m))]
    groups = ["group"] * ("group" in users)
    rows = []
    for user in users.head(TABLE_ROWS).to_dict("records"):
        mine = {"value": user[name], "low": user["low"], "high": user["high"]}
        gain = shown(user[name] - user["row0"] if user["known"] else None, POINTS)
        who = [user["user_id"] or NO_ID, "yes" if user["known"] else UNKNOWN, *(str(user[g]) for g in groups)]
        rows.append([*who, f"{user['n']:,}", shown(mine), gain, *(shown(user[m]) for m in models)])
    head = ["user", "known", *groups, "comparisons", name, "gain over row 0", *(WORDS.get(m, m) for m in models)]
    count = f"{len(rows):,}" if len(rows) == len(users) else f"{len(rows):,} of {len(users):,}"
    return Table("Accuracy per user", head, rows, words=2 + len(groups), folded=f"Figures of {count} users")


def groups_section(evaluation: Evaluation) -> Section | None:
    """Accuracy-average of each group beside row 0 and the baselines; None without groups."""
    accuracy = evaluation.figures["accuracy"]
    name = next(iter(accuracy))
    groups = list(accuracy[name]["average"])
    if len(groups) < 2:
        return None
    means = {name: accuracy[name]["average"]}
    if name != "uniform":
        means["row0"] = accuracy[name]["average_row0"]
    means |= {m: accuracy[m]["average"] for m in ("uniform", "length_rule", "ceiling") if m in accuracy and m != name}
    signs = {**_SIGNS, name: sign(0)}
    series = [Series(_words(m, name), [each.get(g, NOTHING) for g in groups], signs[m]) for m, each in means.items()]
    sizes = [means[name][group]["n"] for group in groups]
    rows = [f"{group} ({n:,} user{'s' * (n != 1)})" for group, n in zip(groups, sizes, strict=True)]
    table = [[row, *(shown(s.figures[i]) for s in series)] for i, row in enumerate(rows)]
    text = (
        "Mean over the users who were seen in training of each one's accuracy. Interval: 95 %, Student's t over users."
    )
    chart = dots("Accuracy per group of users", rows, series, "mean accuracy over users")
    return Section("Groups", [text], [chart, Table("Accuracy per group", ["group", *(s.name for s in series)], table)])


def picks_section(rankings: Sequence[Ranking], about: Mapping[str, str]) -> Section | None:
    """Each prompt with every user's pick side by side, and what differs between the picks.

    Args:
        rankings: of any number of prompts and users.
        about: what a reader is told of a user, by id; ids may be missing.
    """
    by_prompt: dict[tuple[str, ...], list[Ranking]] = {}
    for ranking in rankings:
        by_prompt.setdefault((prompt_text(ranking.prompt), *ranking.responses), []).append(ranking)
    if not by_prompt:
        return None
    text = "The same candidates, ranked for each user: the one that comes first. Most and least are among these picks."
    parts = [side_by_side(some, about, is_open=i == 0) for i, some in enumerate(by_prompt.values())]
    return Section("Who gets which response", [text], parts)


def map_section(vectors: np.ndarray, names: Sequence[str], groups: Sequence[str] | None, note: str) -> Section | None:
    """Users' vectors less row 0, in the two directions in which they differ most from it.

    Args:
        vectors: (U, D), row 0 being the unknown user.
        names, groups: one for each of the U - 1 users after row 0.
        note: what a reader must know, for instance that user vectors are personal data.

    Raises:
        ValueError: not one name, or not one group, for each user.
    """
    offsets = np.asarray(vectors, dtype=np.float64)[1:] - np.asarray(vectors, dtype=np.float64)[0]
    labels = ["users"] * len(names) if groups is None else list(groups)
    if not len(offsets) == len(names) == len(labels):
        raise ValueError(f"{len(offsets)} users after row 0, but {len(names)} names and {len(labels)} groups")
    if len(offsets) < 2 or not offsets.any():
        return None
    places, shares = _two_directions(offsets)
    series = []
    for i, group in enumerate(sorted(set(labels))):
        there = [j for j, label in enumerate(labels) if label == group]
        series.append((group, places[there], [names[j] for j in there], sign(i)))
    series.append((WORDS["row0"], np.zeros((1, 2)), [WORDS["row0"]], Sign("--ink", "cross-thin-open", "✚")))
    axes = [f"direction {i + 1}: {100 * share:.0f} % of the difference" for i, share in enumerate(shares)]
    rows = [[n, g, f"{x:.3g}", f"{y:.3g}"] for n, g, (x, y) in zip(names, labels, places, strict=True)][:TABLE_ROWS]
    head = ["user", "group", "direction 1", "direction 2"]
    table = Table("Users on the map", head, rows, words=2, folded=f"Places of {len(rows):,} users")
    return Section("Map of the users", [note], [scatter("Users' vectors less row 0", series, axes), table])


def _two_directions(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components about row 0, not about the mean: places (n, 2) and the share of each direction (2,)."""
    left, sizes, right = np.linalg.svd(offsets, full_matrices=False)
    places = np.zeros((len(offsets), 2))
    shares = np.zeros(2)
    for i in range(min(2, len(sizes))):
        way = np.sign(right[i, np.abs(right[i]).argmax()]) or 1.0  # the sign of a component is arbitrary; fix it
        places[:, i], shares[i] = way * left[:, i] * sizes[i], sizes[i] ** 2 / (sizes**2).sum()
    return places, shares


def audit_section(lines: Sequence[tuple[str, str, str]]) -> Section | None:
    """What was looked at, what was found, and what that means."""
    if not lines:
        return None
    title = "Audit of the data"
    text = "What the data can bear. Rows that were left out are counted here; nothing is left out in silence."
    return Section(title, [text], [Table(title, ["what", "found", "meaning"], lines, words=3)])


def made_section(command: str, facts: Mapping[str, str], seconds: Mapping[str, float]) -> Section:
    """How the page was made; versions and the machine are added to the facts."""
    made = {**facts, **versions(), "python": platform.python_version(), "platform": platform.platform()}
    parts: list[Command | Table] = [Command(command)]
    parts.append(Table("Made with", ["what", "value"], list(made.items()), words=2))
    if seconds:
        spent = {**seconds, "total": sum(seconds.values())}
        rows = [[step, f"{took:,.1f}"] for step, took in spent.items()]
        parts.append(Table("Seconds", ["step", "seconds"], rows))
    return Section("How this was made", [], parts)

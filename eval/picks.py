"""What users get for one prompt, side by side, and in what their picks differ."""

from collections.abc import Mapping, Sequence

from ..core.properties import PROPERTIES
from ..core.scoring import Ranking
from ..core.splits import prompt_text
from .report import NO_ID, Pick, Picks, Table

OTHERS_ON_A_CARD = 6


def side_by_side(rankings: Sequence[Ranking], about: Mapping[str, str], is_open: bool) -> Picks:
    """The picks of one prompt's rankings, which share their N responses.

    Args:
        about: what a reader is told of a user, by id; ids may be missing.
        is_open: whether they show at once, or on a click on the prompt.
    """
    names = [r.user.id or NO_ID for r in rankings]
    ranks = [{response: rank for rank, response in enumerate(r.order, 1)} for r in rankings]
    chips, alike = _chips([r.best for r in rankings])
    picks = [
        Pick(
            names[i],
            about.get(r.user.id or "", ""),
            r.user_known,
            f"response {r.order[0] + 1} of {len(r.responses)}",
            r.best,
            chips[i],
            _others(names, ranks, i, r.order[0]),
        )
        for i, r in enumerate(rankings)
    ]
    responses = rankings[0].responses
    rows = [[f"response {i + 1}", text, *(str(of[i]) for of in ranks)] for i, text in enumerate(responses)]
    folded = f"All {len(responses)} candidates and their rank for each user"
    table = Table("Rank of each candidate; 1 is the pick", ["", "text", *names], rows, words=2, folded=folded)
    return Picks(prompt_text(rankings[0].prompt), picks, alike, table, is_open)


def _others(names: Sequence[str], ranks: Sequence[Mapping[int, int]], mine: int, response: int) -> str:
    """The rank of a response for everybody else, where they are few."""
    if not 1 < len(names) <= OTHERS_ON_A_CARD + 1:
        return ""
    return f"Rank {', '.join(f'{ranks[i][response]} for {name}' for i, name in enumerate(names) if i != mine)}."


def _chips(texts: Sequence[str]) -> tuple[list[list[tuple[str, str]]], str]:
    """Of each text (words, "most", "least" or "") by properties that differ; then the words of those that do not."""
    chips: list[list[tuple[str, str]]] = [[] for _ in texts]
    alike = []
    for p in PROPERTIES.values():
        words, values = [p.shown(text) for text in texts], [p.measure(text) for text in texts]
        if len(set(words)) == 1 and len(texts) > 1:
            alike.append(words[0])
            continue
        extremes = {max(values): "most", min(values): "least"} if len(set(values)) > 1 else {}
        for i, value in enumerate(values):
            alone = len({text for text, other in zip(texts, values, strict=True) if other == value}) == 1
            chips[i].append((words[i], extremes.get(value, "") if alone else ""))
    return chips, ", ".join(alike)

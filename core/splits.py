"""Splitting comparisons so that nothing of a test row is seen in training, and writing them."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .artefact import whole_file
from .comparisons import Comparison, Comparisons, DataError, Prompt

PARTS = ("train", "validation", "test", "onboarding")


@dataclass(frozen=True)
class SplitPlan:
    """How to split.

    Attributes:
        by: what stays together: `prompt`, `pair` (prompt and both responses, in either order), or the name of a column.
        validation, test: shares of the rows.
        unseen_users: share of the users who are kept out of training and validation. Their rows go to `test` where
            the group falls there, else to `onboarding`: rows to give such a user later, with `prlhf users add`.
        fold, folds: with folds, `test` is the fold-th of that many equal parts, in place of a share.
    """

    by: str = "prompt"
    validation: float = 0.1
    test: float = 0.2
    unseen_users: float = 0.0
    seed: int = 0
    fold: int = 0
    folds: int = 0

    def __post_init__(self) -> None:
        for name in ("validation", "test", "unseen_users"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), found {getattr(self, name)}")
        if self.validation + self.test_share >= 1:
            raise ValueError(
                f"validation and test together leave nothing to train on ({self.validation} + {self.test_share})"
            )
        if self.folds and not 1 <= self.fold <= self.folds:
            raise ValueError(f"fold must lie between 1 and {self.folds}, found {self.fold}")

    @property
    def test_share(self) -> float:
        return 1 / self.folds if self.folds else self.test


def split(rows: Comparisons, plan: SplitPlan) -> dict[str, list[Comparison]]:
    """Parts of the rows by name; each row is in exactly one, and no group in two of train, validation and test.

    Raises:
        DataError: `plan.by` names no column, or a part that was asked for would be empty.
    """
    if plan.by == "prompt":
        _refuse_inferred_prompts(rows)
    groups = [group_key(row, plan.by) for row in rows]
    part_of = _assign_groups(Counter(groups), plan)
    unseen = _unseen_users(rows, plan)
    parts: dict[str, list[Comparison]] = {name: [] for name in PARTS}
    for row, group in zip(rows, groups, strict=True):
        part = part_of[group]
        parts["onboarding" if row.user.id in unseen and part != "test" else part].append(row)
    wanted = [("train", 1.0), ("validation", plan.validation), ("test", plan.test_share)]
    for name, share in wanted:
        if share and not parts[name]:
            raise DataError(f"{rows.source}: no row is left for {name}; {len(part_of)} groups by {plan.by} are too few")
    return parts


def _refuse_inferred_prompts(rows: Comparisons) -> None:
    inferred = next((row for row in rows if row.inferred_prompt), None)
    if inferred:
        raise DataError(
            f"{inferred.place}: has no prompt of its own, only what its two texts have in common, so rows of one "
            "question can't be kept together; add a prompt column, or split --by pair or by a column"
        )


def group_key(row: Comparison, by: str) -> str:
    """What must not be on both sides of a split: the normalised prompt, the pair, or a column's value."""
    if by == "prompt":
        return _normal(prompt_text(row.prompt))
    if by == "pair":
        return "\x1f".join([_normal(prompt_text(row.prompt)), *sorted([_normal(row.chosen), _normal(row.rejected)])])
    if by == "user_id":
        return row.user.id or ""
    if by not in row.extra:
        raise DataError(f"--by {by}: no such column in {row.place}; columns are {', '.join(row.extra) or 'none'}")
    return str(row.extra[by])


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, whichever form it has."""
    if not isinstance(prompt, str) and len(prompt) == 1:
        prompt = prompt[0]["content"]  # the same question, whichever form it has
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _lot(seed: int, what: str, key: str) -> bytes:
    """A number drawn for a key; it depends on no other row, so neither does the order of groups."""
    return hashlib.blake2b(f"{seed}\x1f{what}\x1f{key}".encode(), digest_size=8).digest()


def _assign_groups(sizes: Counter[str], plan: SplitPlan) -> dict[str, str]:
    """Group -> part: groups in drawn order fill the test part, then validation, then train."""
    order = sorted(sizes, key=lambda group: _lot(plan.seed, "group", group))
    total, seen, parts = sum(sizes.values()), 0, {}
    first, test = Fraction(0), Fraction(plan.test)  # exact, so that no group is in two folds or in none
    if plan.folds:
        first, test = Fraction(plan.fold - 1, plan.folds), Fraction(1, plan.folds)
    for group in order:
        # The group's middle decides, and the circle is turned so that fold after fold comes first.
        at = (Fraction(2 * seen + sizes[group], 2 * total) - first) % 1
        seen += sizes[group]
        parts[group] = "test" if at < test else "validation" if at < test + plan.validation else "train"
    return parts


def _unseen_users(rows: Comparisons, plan: SplitPlan) -> set[str]:
    users = sorted({user for user in rows.user_ids if user is not None}, key=lambda u: _lot(plan.seed, "user", u))
    return set(users[: round(plan.unseen_users * len(users))])


def write_parts(parts: Mapping[str, Sequence[Comparison]], out: Path, mark: str) -> dict[str, dict[str, Any]]:
    """Writes each part that has rows, removes what an earlier split left of the others, and gives their sizes.

    Args:
        mark: the file by which a folder of such parts is known; who calls this writes it too.

    Raises:
        DataError: the folder holds a part and no mark, so the part is somebody else's; nothing is written.
    """
    foreign = [name for name in parts if (out / f"{name}.parquet").exists() and not (out / mark).exists()]
    if foreign:
        raise DataError(
            f"{out / foreign[0]}.parquet: is there already and not from this command ({mark} is missing); "
            "give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / mark).touch()  # so that parts that an interrupted run leaves are known as its own
    sizes = {}
    for name, part in parts.items():
        if not part:
            (out / f"{name}.parquet").unlink(missing_ok=True)
            continue
        write_parquet(part, out / f"{name}.parquet")
        users = len({row.user.id for row in part} - {None})
        sizes[name] = {"rows": len(part), "users": users, "hash": data_hash(part)}
    return sizes


def to_records(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Rows as the format that they are read from; all conversational where one prompt is a conversation."""
    conversational = any(not isinstance(row.prompt, str) for row in rows)
    with_text = any(row.user.text for row in rows)

    def response(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if conversational else text

    def record(row: Comparison) -> dict[str, Any]:
        single = isinstance(row.prompt, str) and conversational
        return {
            "user_id": row.user.id,
            **({"user_text": row.user.text} if with_text else {}),
            "prompt": [{"role": "user", "content": row.prompt}] if single else row.prompt,
            "chosen": response(row.chosen),
            "rejected": response(row.rejected),
            **row.extra,
        }

    return [record(row) for row in rows]


def write_parquet(rows: Sequence[Comparison], path: Path) -> None:
    """Writes rows as Parquet; the file is whole or not there."""
    import pyarrow.parquet as pq

    with whole_file(path) as new:
        pq.write_table(_table(to_records(rows), path), new)


def _table(records: list[dict[str, Any]], path: Path) -> Any:
    """Records as an Arrow table with every column that one of them has.

    Raises:
        DataError: a column's values can't be one Parquet column; names it.
    """
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for record in records for name in record):
        try:
            columns[name] = pa.array([record.get(name) for record in records])
            if pa.types.is_struct(columns[name].type) and not columns[name].type.num_fields:
                raise ValueError("objects without any entry")
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{path}: column {name!r} can't be written as Parquet: {error}") from None
    return pa.table(columns)


def data_hash(rows: Sequence[Comparison]) -> str:
    """Hash of what was learned from: users, texts and order, 16 hex digits."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.user.id, row.user.text, row.prompt, row.chosen, row.rejected)).encode())
    return digest.hexdigest()[:16]

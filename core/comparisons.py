"""Comparisons with user ids: what a row must hold, and what happens to a row that does not hold it.

The row format is TRL's preference format (`prompt`, `chosen`, `rejected`, plain or conversational, the prompt explicit
or contained in both responses) plus `user_id` and, where there is one, `user_text`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = ("user_id", "user_text", "prompt", "chosen", "rejected")


class Message(TypedDict):
    role: str
    content: str


Prompt = str | list[Message]


class DataError(ValueError):
    """Rows that can't be used; the message names file, line and field of each."""


class TooManyBadRows(DataError):
    """More rows can't be used than were allowed."""


@dataclass(frozen=True)
class User:
    """A user: an id, or None for nobody in particular, and optional text about the user."""

    id: str | None
    text: str = ""


@dataclass(frozen=True)
class Comparison:
    """One person's choice between two responses to a prompt.

    Attributes:
        place: file and line it came from, for messages.
        inferred_prompt: the prompt is what two texts have in common, so it may hold the first words of the answers.
        extra: further columns of the row (groups, true utilities), which no trainer reads.
    """

    user: User
    prompt: Prompt
    chosen: str
    rejected: str
    place: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    inferred_prompt: bool = False


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row."""

    place: str
    field: str
    what: str
    kind: Literal["bad", "identical"] = "bad"

    def __str__(self) -> str:
        return f"{self.place}: {self.field}: {self.what}"


@dataclass(frozen=True)
class RowPolicy:
    """What to do with rows that are not plain good comparisons.

    Attributes:
        max_bad_rows: rows that can't be read or used and are left out, and counted, before reading stops with an
            error; 0 refuses the first one.
        identical: rows whose two responses are equal: `drop` (counted; nothing to learn) or `keep` (a tie, which
            evaluation counts as 0.5).
        missing_user: a row without user id: `refuse`, or `generic`, which gives it to the unknown user.
    """

    max_bad_rows: int = 0
    identical: Literal["drop", "keep"] = "drop"
    missing_user: Literal["refuse", "generic"] = "refuse"


@dataclass
class Comparisons(Sequence[Comparison]):
    """Comparisons of one source, with everything that was left out of it."""

    rows: list[Comparison]
    source: str = ""
    dropped: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.rows)

    @property
    def user_ids(self) -> list[str | None]:
        return [row.user.id for row in self.rows]

    @property
    def dropped_counts(self) -> dict[str, int]:
        return dict(Counter(problem.kind for problem in self.dropped))

    def subset(self, rows: list[Comparison]) -> "Comparisons":
        """The same source with other rows; what was left out of the source stays told."""
        return Comparisons(rows, self.source, self.dropped)

    def notice(self) -> str:
        """One line for the terminal: rows, users, and what was left out."""
        users = len({user for user in self.user_ids if user is not None})
        left_out = "".join(f", {n} {_KIND_WORDS[kind]} left out" for kind, n in self.dropped_counts.items())
        return f"{self.source}: {len(self):,} comparisons of {users:,} users{left_out}"


_KIND_WORDS = {"bad": "unusable rows", "identical": "rows with two equal responses"}


def check(rows: Iterable[tuple[str, Mapping[str, Any] | Problem]], source: str, policy: RowPolicy) -> Comparisons:
    """Turns raw rows into comparisons.

    Args:
        rows: (place, row) pairs; a `Problem` in place of the row is one that the reader already found.

    Raises:
        TooManyBadRows: more rows are unusable than `policy.max_bad_rows`; names the first ten.
        DataError: no usable row is left.
    """
    found = sort_out(rows, source, policy)
    bad = [problem for problem in found.dropped if problem.kind == "bad"]
    if len(bad) > policy.max_bad_rows:
        shown = "\n".join(f"  {problem}" for problem in bad[:10])
        more = f"\n  and {len(bad) - 10:,} more" if len(bad) > 10 else ""
        raise TooManyBadRows(
            f"{source}: {len(bad):,} of {len(found) + len(found.dropped):,} rows can't be used:\n{shown}{more}\n"
            f"Mend them, or leave them out with --max-bad-rows {len(bad)}"
        )
    if not len(found):
        raise DataError(f"{source}: no usable comparison in it")
    return found


def sort_out(rows: Iterable[tuple[str, Mapping[str, Any] | Problem]], source: str, policy: RowPolicy) -> Comparisons:
    """Like `check`, but however many rows can't be used, they are listed and nothing is raised."""
    good: list[Comparison] = []
    dropped: list[Problem] = []
    for place, row in rows:
        made = row if isinstance(row, Problem) else comparison(row, place, policy)
        (dropped if isinstance(made, Problem) else good).append(made)  # type: ignore[arg-type]
    return Comparisons(good, source, dropped)


def comparison(row: Mapping[str, Any], place: str, policy: RowPolicy) -> Comparison | Problem:
    """One raw row as a comparison, or what is wrong with it."""
    try:
        user = User(_user_id(row, policy), _optional_text(row, "user_text"))
        prompt, chosen, rejected = _split_prompt(row)
        texts = {"chosen": _response(chosen, "chosen"), "rejected": _response(rejected, "rejected")}
        parsed = _prompt(prompt)
    except _FieldError as error:
        return Problem(place, error.field, error.what, error.kind)
    if texts["chosen"] == texts["rejected"] and policy.identical == "drop":
        return Problem(place, "rejected", "equal to chosen", "identical")
    extra = {key: value for key, value in row.items() if key not in FIELDS}
    inferred = is_missing(row.get("prompt")) and isinstance(parsed, str)
    return Comparison(user, parsed, texts["chosen"], texts["rejected"], place, extra, inferred)


def to_user(row: Mapping[str, Any], place: str) -> User | Problem:
    """A user by itself: `user_id` and optional `user_text`."""
    try:
        return User(_user_id(row, RowPolicy()), _optional_text(row, "user_text"))
    except _FieldError as error:
        return Problem(place, error.field, error.what)


def to_prompt(value: Any, place: str) -> Prompt | Problem:
    """A prompt field by itself: text, or a conversation that ends with the user's turn."""
    try:
        return _prompt(value)
    except _FieldError as error:
        return Problem(place, error.field, error.what)


def response_text(value: Any, place: str, name: str) -> str | Problem:
    """A candidate response; unlike one in a comparison it may be empty, since a generator may give nothing."""
    try:
        return _text(value, name)
    except _FieldError as error:
        return Problem(place, error.field, error.what)


class _FieldError(Exception):
    def __init__(self, field_name: str, what: str, kind: Literal["bad", "identical"] = "bad"):
        super().__init__(what)
        self.field, self.what, self.kind = field_name, what, kind


def is_missing(value: Any) -> bool:
    """None or a float NaN, which is how CSV and Parquet readers write an absent value."""
    return value is None or (isinstance(value, float) and value != value)


def _user_id(row: Mapping[str, Any], policy: RowPolicy) -> str | None:
    value = row.get("user_id")
    if is_missing(value) or value == "":
        if policy.missing_user == "generic":
            return None
        raise _FieldError("user_id", "missing; add it, or give such rows to the unknown user (--missing-user generic)")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _FieldError("user_id", f"must be a string or an integer, found {_shown(value)}")
    return _text(str(value), "user_id")  # 1 and "1" are the same user


def _optional_text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if is_missing(value) else _text(value, name)


def _text(value: Any, name: str) -> str:
    """The value if it is text that a tokenizer, a file and a terminal can hold."""
    if is_missing(value):
        raise _FieldError(name, "missing")
    if not isinstance(value, str):
        raise _FieldError(name, f"must be text, found {_shown(value)}")
    if "\x00" in value:
        raise _FieldError(name, f"holds a NUL character at position {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _FieldError(name, f"holds half of a surrogate pair at position {error.start}") from None
    return value


def _filled(value: Any, name: str) -> str:
    if not _text(value, name).strip():
        raise _FieldError(name, "empty")
    return str(value)


def _messages(value: Any, name: str) -> list[Message]:
    found = list(value)
    if not found:
        raise _FieldError(name, "empty conversation")
    for i, message in enumerate(found):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise _FieldError(f"{name}[{i}]", f"must be a message with role and content, found {_shown(message)}")
        if message["role"] not in ROLES:  # a template may build a control token from the role
            raise _FieldError(
                f"{name}[{i}].role", f"must be one of {', '.join(ROLES)}, found {_shown(message['role'])}"
            )
    return [{"role": m["role"], "content": _text(m["content"], f"{name}[{i}].content")} for i, m in enumerate(found)]


def is_conversation(value: Any) -> bool:
    """Whether a field holds messages (a list or an array of them) and not plain text."""
    return not isinstance(value, (str, bytes, Mapping)) and isinstance(value, Iterable)


def _prompt(value: Any) -> Prompt:
    if not is_conversation(value):
        return _filled(value, "prompt")
    messages = _messages(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise _FieldError("prompt", "ends with an assistant message; its last message must be the user's")
    return messages


def _response(value: Any, name: str) -> str:
    if not is_conversation(value):
        return _filled(value, name)
    messages = _messages(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise _FieldError(name, f"must be one assistant message after the prompt, found roles {roles}")
    return _filled(messages[0]["content"], f"{name}[0].content")


def _split_prompt(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; an implicit prompt is what both responses begin with, as in TRL."""
    for name in ("chosen", "rejected"):
        if is_missing(row.get(name)):
            raise _FieldError(name, "missing")
    chosen, rejected = row["chosen"], row["rejected"]
    if not is_missing(row.get("prompt")):
        return row["prompt"], chosen, rejected
    if not is_conversation(chosen) and not is_conversation(rejected):
        return _common_text(_text(chosen, "chosen"), _text(rejected, "rejected"))
    if not is_conversation(chosen) or not is_conversation(rejected):
        raise _FieldError("rejected", "chosen and rejected must both be text or both be conversations")
    ours, theirs = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    shared = 0
    while shared < min(len(ours), len(theirs)) - 1 and ours[shared] == theirs[shared]:
        shared += 1
    return ours[:shared], ours[shared:], theirs[shared:]


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The beginning that two texts share, without the space before they part (TRL's rule), and the two rests."""
    if chosen == rejected and chosen.strip():  # no end of the prompt can be told
        raise _FieldError("rejected", "equal to chosen", "identical")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    shared -= chosen[shared - 1] == " " if shared else 0
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"

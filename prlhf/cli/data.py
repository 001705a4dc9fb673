"""`prlhf data check|stats|split|simulate`: looking at comparisons before anything is learned from them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Columns, Json, MaxBadRows, MissingUser, column_map, load
from .output import percent, plain, print_json, table, tell, write_json
from .simulate import simulate

app = typer.Typer(help="Check, describe, split and simulate comparisons.", no_args_is_help=True)
app.command()(simulate)
Source = Annotated[str, typer.Argument(help="JSONL, CSV or Parquet file, saved datasets folder, or hub name[:split].")]


@app.command()
def check(
    source: Source,
    columns: Columns = None,
    missing_user: MissingUser = "refuse",
    max_bad_rows: MaxBadRows = 0,
    json: Json = False,
) -> None:
    """Read every row, and name file, line and field of each one that can't be used."""
    from prlhf.core.comparisons import RowPolicy, TooManyBadRows, sort_out
    from prlhf.core.sources import read_rows

    rows = sort_out(read_rows(source, column_map(columns)), source, RowPolicy(missing_user=missing_user))
    if json:
        listed = [{"place": p.place, "field": p.field, "what": p.what, "kind": p.kind} for p in rows.dropped]
        print_json({"rows": len(rows), "users": len(set(rows.user_ids) - {None}), "left_out": listed})
    else:
        for problem in rows.dropped:
            typer.echo(plain(str(problem)))
        typer.echo(plain(rows.notice()))
    bad = rows.dropped_counts.get("bad", 0)
    if bad > max_bad_rows or not len(rows):
        raise TooManyBadRows(
            f"{source}: {bad:,} rows can't be used, and {max_bad_rows:,} may be left out (--max-bad-rows)"
        )


@app.command()
def stats(
    source: Source,
    columns: Columns = None,
    missing_user: MissingUser = "refuse",
    max_bad_rows: MaxBadRows = 0,
    json: Json = False,
) -> None:
    """Rows, users, rows per user, lengths, and how far length alone explains the choices."""
    figures = _stats(load(source, columns, max_bad_rows, missing_user))
    if json:
        print_json(figures)
        return
    per_user = figures["rows_per_user"]
    words = figures["words"]
    lines = [
        ("comparisons", f"{figures['rows']:,}"),
        ("users", f"{figures['users']:,}"),
        ("rows per user: min, median, max", " / ".join(f"{per_user[k]:,.0f}" for k in ("min", "median", "max"))),
        ("distinct prompts", f"{figures['prompts']:,}"),
        ("prompts that several users judged", f"{figures['shared_prompts']:,}"),
        (
            "words: prompt, chosen, rejected (mean)",
            " / ".join(f"{words[k]:.0f}" for k in ("prompt", "chosen", "rejected")),
        ),
        ("chosen is the longer one", percent(figures["longer_chosen"])),
        ("users with a text about them", f"{figures['users_with_text']:,}"),
    ]
    table(source, ["", "value"], lines)
    ends = figures["longer_chosen_by_user"]
    rows = [(user, f"{f['value']:.2f}", f"{f['low']:.2f} to {f['high']:.2f}", f["n"]) for user, f in ends.items()]
    table("Share of rows in which a user chose the longer response", ["user", "share", "95 %", "rows"], rows)


def _stats(rows: Any) -> dict[str, Any]:
    from statistics import median

    from prlhf.core.figures import wilson
    from prlhf.core.splits import group_key, prompt_text

    counts: dict[str, int] = {}
    longer: dict[str, int] = {}
    judges: dict[str, set[str]] = {}
    for row in rows:
        user = row.user.id or "(no user)"
        counts[user] = counts.get(user, 0) + 1
        longer[user] = longer.get(user, 0) + (len(row.chosen) > len(row.rejected))
        judges.setdefault(group_key(row, "prompt"), set()).add(user)
    texts = {"prompt": [prompt_text(r.prompt) for r in rows], "chosen": [r.chosen for r in rows]}
    texts["rejected"] = [r.rejected for r in rows]
    shares = {user: wilson(longer[user], counts[user]) for user in counts}
    ends = sorted(shares, key=lambda user: (-counts[user], user))[:20]
    return {
        "rows": len(rows),
        "users": len(set(rows.user_ids) - {None}),
        "rows_per_user": {"min": min(counts.values()), "median": median(counts.values()), "max": max(counts.values())},
        "prompts": len(judges),
        "shared_prompts": sum(len(users) > 1 for users in judges.values()),
        "words": {name: sum(len(t.split()) for t in column) / len(rows) for name, column in texts.items()},
        "longer_chosen": wilson(sum(longer.values()), len(rows)),
        "longer_chosen_by_user": {user: shares[user] for user in sorted(ends, key=lambda u: shares[u]["value"])},
        "users_with_text": len({row.user.id for row in rows if row.user.text}),
        "left_out": rows.dropped_counts,
    }


@app.command()
def split(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for train, validation and test.parquet and split.json.")],
    by: Annotated[str, typer.Option(help="What stays together: prompt, pair, or a column.")] = "prompt",
    validation: Annotated[float, typer.Option(help="Share of the rows.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the rows.")] = 0.2,
    unseen_users: Annotated[float, typer.Option(help="Share of users kept out of train and validation.")] = 0.0,
    seed: int = 0,
    fold: Annotated[
        str, typer.Option(help="K/N: the test part is the K-th of N equal parts (in place of --test).")
    ] = "",
    columns: Columns = None,
    missing_user: MissingUser = "refuse",
    max_bad_rows: MaxBadRows = 0,
    json: Json = False,
) -> None:
    """Split so that no prompt (or pair, or group) of a test row is seen in training.

    Rows of unseen users that do not fall into the test part go to onboarding.parquet: comparisons to give such a user
    later, with `prlhf users add`.
    """
    from prlhf.core.splits import SplitPlan, write_parts
    from prlhf.core.splits import split as split_rows

    k, n = _fold(fold)
    rows = load(source, columns, max_bad_rows, missing_user)
    parts = split_rows(rows, SplitPlan(by, validation, test, unseen_users, seed, k, n))
    sizes = write_parts(parts, out, "split.json")
    made = {"source": source, "by": by, "seed": seed, "fold": fold, "left_out": rows.dropped_counts, "parts": sizes}
    write_json(made, out / "split.json")
    if json:
        print_json(made)
    else:
        table(
            f"{out} (by {by}, seed {seed})",
            ["part", "rows", "users"],
            [(p, s["rows"], s["users"]) for p, s in sizes.items()],
        )
    if "onboarding" in sizes:
        tell(f"{out / 'onboarding.parquet'}: rows of unseen users on training prompts, for `prlhf users add`")


def _fold(fold: str) -> tuple[int, int]:
    k, sign, n = fold.partition("/")
    if not fold:
        return 0, 0
    if not (sign and k.isdigit() and n.isdigit() and int(n) > 1):
        raise ValueError(f"--fold {fold}: must read K/N, as in 1/5")
    return int(k), int(n)

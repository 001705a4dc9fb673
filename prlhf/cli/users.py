"""`prlhf users add|list|export`: the users of a run."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Columns, Json, MaxBadRows, ModelPlace, load
from .output import check_table_path, percent, print_json, table, tell, write_table

app = typer.Typer(help="The users of a run.", no_args_is_help=True)
RunOption = Annotated[Path, typer.Option("--run", help="Folder of a run.")]


@app.command()
def add(
    user_id: Annotated[str, typer.Argument(help="Id of the new user.")],
    run: RunOption,
    data: Annotated[str, typer.Option(help="Their comparisons; rows of other users in it are left alone.")],
    replace: Annotated[bool, typer.Option("--replace", help="Fit a user anew who is in the run already.")] = False,
    base: ModelPlace = None,
    columns: Columns = None,
    max_bad_rows: MaxBadRows = 0,
    json: Json = False,
) -> None:
    """Give a new user a vector of their own: a convex fit on their comparisons, everything else frozen."""
    from prlhf.core.artefact import writing
    from prlhf.core.texts import over_long_notice
    from prlhf.runs import load_run

    rows = load(data, columns, max_bad_rows, missing_user="generic")
    theirs = [row for row in rows if row.user.id in (None, user_id)]
    if len(theirs) < len(rows):
        tell(f"{len(rows) - len(theirs):,} rows of other users are left alone")
    if not theirs:
        raise ValueError(f"--data {data}: no row of user {user_id!r}")
    with writing(run) if run.is_dir() else nullcontext():  # so that two users added at once are both kept
        model = load_run(run, show=True, model=base)
        trained = model.users.facts.get(user_id, {}).get("origin") == "trained"
        added = model.add_user(user_id, theirs, replace)
        model.save_pretrained(run)
    if trained:
        tell(f"{user_id} was in training, so row 0 has seen what they like; the gain below is not a new user's")
    truncated = model.over_long_by_user(theirs)
    if truncated:
        tell(over_long_notice(data, truncated, model.layout))
    figures = _gain(added, theirs)
    if json:
        print_json(figures)
    else:
        _show_gain(figures, run)


def _show_gain(figures: dict[str, Any], run: Path) -> None:
    title = f"user {figures['user_id']} added to {run}: {figures['comparisons']} comparisons"
    table(
        f"{title}, fitted in {figures['milliseconds']:.1f} ms",
        ["each comparison judged by a fit that did not see it", ""],
        [
            ("accuracy", percent(figures["accuracy"])),
            ("accuracy of row 0", percent(figures["accuracy_row0"])),
            ("gain over row 0", percent(figures["gain"], signed=True)),
        ],
    )


def _gain(added: Any, rows: list[Any]) -> dict[str, Any]:
    from prlhf.core.figures import wilson
    from prlhf.core.splits import prompt_text
    from prlhf.eval.metrics import accuracies, paired_difference

    own, row0 = accuracies(added.margins), accuracies(added.row0_margins)
    return {
        "user_id": added.user_id,
        "comparisons": added.comparisons,
        "milliseconds": 1000 * added.seconds,
        "accuracy": wilson(own.sum(), len(own)),
        "accuracy_row0": wilson(row0.sum(), len(row0)),
        "gain": paired_difference(own, row0, [prompt_text(row.prompt) for row in rows]),
    }


@app.command("list")
def list_users(run: RunOption, json: Json = False) -> None:
    """The users of a run, how many comparisons each gave, and how far each is from row 0."""
    from prlhf.runs import load_run

    model = load_run(run)
    spread = model.user_model.spread().tolist()
    facts = [model.users.facts.get(user, {}) for user in model.users.ids]
    users = [
        {
            "user_id": user,
            "comparisons": f.get("comparisons", 0),
            "origin": f.get("origin", ""),
            "distance_from_row0": d,
            **({"validation": f["validation"]} if "validation" in f else {}),
        }
        for user, f, d in zip(model.users.ids, facts, spread[1:], strict=True)
    ]
    if json:
        print_json({"run": str(run), "users": users})
        return
    columns = ["user", "comparisons", "origin", "distance from row 0"]
    cells = [(u["user_id"], f"{u['comparisons']:,}", u["origin"], f"{u['distance_from_row0']:.2f}") for u in users]
    if any("validation" in u for u in users):
        columns += ["validation rows", "accuracy", "of row 0"]
        cells = [(*cell, *_on_validation(u)) for cell, u in zip(cells, users, strict=True)]
    table(f"{run}: {len(users):,} users", columns, cells)


def _on_validation(user: dict[str, Any]) -> tuple[str, ...]:
    """What training measured of one user on validation rows, where there were any."""
    seen = user.get("validation")
    return (f"{seen['n']:,}", f"{100 * seen['personal']:.1f} %", f"{100 * seen['row0']:.1f} %") if seen else ("-",) * 3


@app.command()
def export(
    run: RunOption,
    out: Annotated[Path, typer.Option(help=".parquet or .jsonl: user_id and vector, row 0 first (null).")],
) -> None:
    """Write every user's vector: a head in units of hidden states, or a soft prompt, vector after vector.

    The vectors are personal data.
    """
    check_table_path("--out", out)
    import pandas as pd

    from prlhf.runs import load_run

    model = load_run(run)
    vectors = model.user_model.vectors().numpy()
    frame = pd.DataFrame({"user_id": [None, *model.users.ids], "vector": list(vectors)})
    write_table(frame, out)
    tell(f"{out}: {len(frame) - 1:,} users and row 0, {' x '.join(map(str, model.user_model.shape))} numbers each")

"""`prlhf eval preference`: how often a run agrees with people's choices, and whether personalization helped."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Columns, Json, MaxBadRows, MissingUser, ModelPlace, load
from .output import check_not_read, check_table_path, percent, print_json, table, tell, typed, write_json, write_table

if TYPE_CHECKING:
    from prlhf.core.comparisons import Comparisons
    from prlhf.core.personal import PersonalizedModel
    from prlhf.eval.preference import Evaluation

app = typer.Typer(help="Evaluate runs.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `preference` a verb of its own while it is the only one."""


@app.command()
def preference(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data: Annotated[str, typer.Option(help="Comparisons that chose nothing in training.")],
    against: Annotated[Path | None, typer.Option(help="Another run: paired difference on the same rows.")] = None,
    group: Annotated[str | None, typer.Option(help="Column by which Accuracy-average is given too.")] = None,
    shuffles: Annotated[
        int,
        typer.Option(min=0, help="Shuffled-user controls; each scores all rows once more where users change states."),
    ] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    per_user: Annotated[
        Path | None, typer.Option(help="Write the per-user table to this .parquet or .jsonl file.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a page to look at, one .html file.")] = None,
    model: ModelPlace = None,
    columns: Columns = None,
    missing_user: MissingUser = "refuse",
    max_bad_rows: MaxBadRows = 0,
    json: Json = False,
) -> None:
    """Accuracy with and without the user, beside the uniform model, length rules and a shuffled-user control."""
    _check_outputs(data, out, per_user, report)
    begun = time.perf_counter()
    rows = load(data, columns, max_bad_rows, missing_user, identical="keep")
    evaluated, result = _evaluate(run, rows, group, model, shuffles)
    figures = {"run": str(run), "data": data, "left_out": rows.dropped_counts, **result.figures}
    if against:
        figures["against"] = _compare(result, _evaluate(against, rows, group, model, shuffles)[1], against)
    if out:
        write_json(figures, out)
    if per_user:
        write_table(result.users, per_user)
    if report:
        from prlhf.pages import evaluation_page

        evaluation_page(report, typed(), time.perf_counter() - begun, evaluated, rows, result, figures.get("against"))
        tell(f"report: {report}")
    if json:
        print_json(figures)
    else:
        _show(figures, result)


def _check_outputs(data: str, out: Path | None, per_user: Path | None, report: Path | None) -> None:
    """Refuses what could not be written in the end, before the work begins."""
    for flag, path in (("--out", out), ("--per-user", per_user), ("--report", report)):
        check_not_read(flag, path, data)
    if per_user:
        check_table_path("--per-user", per_user)
    if report and report.suffix != ".html":
        raise ValueError(f"--report {report}: must end in .html")


def _compare(result: "Evaluation", other: "Evaluation", run: Path) -> dict[str, Any]:
    """The other run's accuracy, and this run's minus it on the rows of users that this run has seen."""
    from prlhf.eval.metrics import paired_difference

    mine, theirs = (next(iter(r.figures["accuracy"])) for r in (result, other))
    seen = result.seen
    difference = paired_difference(result.correct[mine][seen], other.correct[theirs][seen], result.clusters[seen])
    return {"run": str(run), "difference": difference, "accuracy": other.figures["accuracy"][theirs]}


def _evaluate(
    run: Path, rows: "Comparisons", group: str | None, place: str | None, shuffles: int
) -> "tuple[PersonalizedModel, Evaluation]":
    from prlhf.core.splits import data_hash
    from prlhf.core.texts import over_long_notice
    from prlhf.evaluation import evaluate_model
    from prlhf.runs import load_run

    model = load_run(run, show=True, model=place)
    if data_hash(list(rows)) == model.settings["data"]["hash"]:
        tell(f"warning: {rows.source} holds the rows that {run} was trained on; its figures flatter the run")
    result = evaluate_model(model, list(rows), model.settings["user_model"], group, shuffles=shuffles)
    result.figures["truncated"] = model.over_long_by_user(list(rows))
    if result.figures["truncated"]:
        tell(over_long_notice(rows.source, result.figures["truncated"], model.layout))
    return model, result


def _show_groups(accuracy: dict[str, Any], name: str) -> None:
    from prlhf.eval.preference import WORDS

    shown = [model for model in ("uniform", "length_rule") if model in accuracy and model != name]
    models: dict[str, str] = {name: name, **{model: str(WORDS[model]) for model in shown}}
    rows = [(g, *(percent(accuracy[m]["average"][g]) for m in models)) for g in accuracy[name]["average"]]
    table("Mean over the seen users of each one's accuracy", ["group", *models.values()], rows)


def _show(figures: dict[str, Any], result: "Evaluation") -> None:
    from prlhf.eval.preference import WORDS

    accuracy = figures["accuracy"]
    name = next(iter(accuracy))
    users = figures["users"]
    seen = f"{users['seen']:,} users seen in training, {users['unseen']:,} not"
    title = f"{figures['run']} on {figures['data']}: {figures['rows']:,} rows, {seen}"
    lines = [(f"{name} (this run)", percent(accuracy[name]["top"]), percent(accuracy[name]["generic"]))]
    if name != "uniform":
        lines.append((WORDS["row0"], percent(accuracy[name]["top_row0"]), percent(accuracy[name]["generic"])))
    lines += [(WORDS[m], percent(f["top"]), percent(f["generic"])) for m, f in accuracy.items() if m != name]
    table(title, ["accuracy", "seen users", "unseen users"], lines)
    if len(accuracy[name]["average"]) > 1:
        _show_groups(accuracy, name)
    gains = [(WORDS[m], percent(f, signed=True)) for m, f in figures["difference"].items()]
    if "against" in figures:
        gains.append((figures["against"]["run"], percent(figures["against"]["difference"], signed=True)))
    table("Paired difference on the same rows: this run minus ...", ["", "points"], gains)
    shown = result.users.sort_values(name).head(20)
    cells = [
        (u.user_id or "(no user)", f"{getattr(u, name):.3f}", f"{u.low:.2f} to {u.high:.2f}", f"{u.row0:.3f}", u.n)
        for u in shown.itertuples()
    ]
    table(
        f"Per user{' (the 20 lowest; --per-user writes all)' if len(result.users) > 20 else ''}",
        ["user", "accuracy", "95 %", "row 0", "rows"],
        cells,
    )
    tell(f"intervals: {figures['interval']}; {figures['ties']} ties, each counted as half")

"""`prlhf demo`: from nothing to a page that shows what personalization is worth."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json
from .output import percent, print_json, table, tell, typed, write_json

if TYPE_CHECKING:
    from prlhf.demo import Outcome

EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
RESULTS = ("results.json", "report.html")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs, results.json and report.html.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="Folder or hub name of a decoder that follows instructions.")] = EXAMPLE,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Simulated users, a reward model that learns their tastes, and a page about what that is worth to them."""
    from prlhf.core.artefact import writing
    from prlhf.demo import run
    from prlhf.demo_page import demo_page

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    with writing(out):
        for name in RESULTS:  # of an earlier demo; they must not stand beside the data of this one
            (out / name).unlink(missing_ok=True)
        found = run(out, model, seed)
        results = found.results()
        write_json(results, out / "results.json")
        demo_page(out / "report.html", typed(), found)
    if json:
        print_json(results)
    else:
        _show(found, results, out)


def _show(found: "Outcome", results: dict[str, Any], out: Path) -> None:
    accuracy = results["accuracy"]
    own = accuracy["individualized"]
    lines = [
        ("personalized, user known", percent(own["top"])),
        ("the same, user unknown (row 0)", percent(own["top_row0"])),
        ("one model for everybody", percent(accuracy["uniform"]["top"])),
        ("best fixed length rule per user", percent(results["length_rule"])),
        ("ceiling: the users' true utility", percent(results["ceiling"])),
        ("personalized minus length rule, taste not length", percent(results["beyond_length"]["length_rule"], True)),
    ]
    users = f"{results['users']['seen']} users seen in training"
    table(f"Choices predicted on new prompts, {users}", ["", "accuracy"], lines)
    picks = [(name, _spreads(results["regret"][name])) for name in ("random", "row0", "personal", "oracle")]
    title = f"True utility lost by the pick among 8 responses, in spreads, {users}"
    table(title, ["picked by", "regret"], picks)
    tell(f"{results['seconds']['total']:.0f} seconds; everything measured is in {out / 'results.json'}")
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo("next, with comparisons of your own in prefs.jsonl:")
    name = "prlhf" if shutil.which("prlhf") else sys.argv[0]
    for command in NEXT:
        typer.echo(f"  {name} {command}")


NEXT = (
    "data check prefs.jsonl",
    "data split prefs.jsonl --by prompt --out D",
    f"prm train --data D/train.parquet --eval-data D/validation.parquet --model {EXAMPLE} --output-dir runs/mine",
)


def _spreads(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"

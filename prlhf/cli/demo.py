"""`prlhf demo`: from nothing to a page that shows what personalization is worth."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json
from .output import percent, print_json, table, tell, write_json

if TYPE_CHECKING:
    from prlhf.demo import Outcome

EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"


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

    with writing(out):
        found = run(out, model, seed)
        results = found.results()
        write_json(results, out / "results.json")
        demo_page(out / "report.html", shlex.join(["prlhf", "demo", "--out", str(out), "--seed", str(seed)]), found)
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
    ]
    table("Choices predicted on prompts that nobody was trained on", ["", "accuracy"], lines)
    picks = [(name, _spreads(results["regret"][name])) for name in ("random", "row0", "personal", "oracle")]
    title = "Utility lost by the pick among 8 responses, in the user's own spread"
    table(title, ["picked by", "regret"], picks)
    tell(f"{results['seconds']['total']:.0f} seconds; everything measured is in {out / 'results.json'}")
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo("next, with comparisons of your own in prefs.jsonl:")
    for command in NEXT:
        typer.echo(f"  {command}")


NEXT = (
    "prlhf data check prefs.jsonl",
    "prlhf data split prefs.jsonl --by prompt --out D",
    f"prlhf prm train --data D/train.parquet --eval-data D/validation.parquet --model {EXAMPLE} --output-dir runs/mine",
)


def _spreads(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"

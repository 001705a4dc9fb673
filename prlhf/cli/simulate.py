"""`prlhf data simulate`: comparisons of users whose true taste is known."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json
from .output import percent, print_json, table, write_json

Majority = Annotated[
    float, typer.Option(help="Share of the users who like more of it; with --mirrored, of the first of each pair.")
]
Stated = Annotated[
    bool,
    typer.Option("--stated", help="Each user comes with a text in plain words: I like ... I do not like ..."),
]
Mirrored = Annotated[
    bool,
    typer.Option("--mirrored", help="Users come in pairs of opposite tastes, asked about the same pairs of responses."),
]
UnseenUsers = Annotated[
    float, typer.Option(help="Share of users kept out of train and validation; with --mirrored, of pairs of users.")
]


def simulate(
    out: Annotated[Path, typer.Option(help="Folder for world.json and the parts that `data split` writes.")],
    pool: Annotated[
        Path | None, typer.Option(help='JSONL: {"prompt": ..., "responses": [...]}; by default the everyday pool.')
    ] = None,
    users: Annotated[int, typer.Option(help="Number of users.")] = 40,
    comparisons: Annotated[int, typer.Option(help="Comparisons of each user.")] = 200,
    properties: Annotated[str, typer.Option(help="What users can like, comma-separated; empty: all there are.")] = "",
    conflict: Annotated[str, typer.Option(help="The property on which majority and minority differ.")] = "length",
    majority: Majority = 0.7,
    strength: Annotated[
        float, typer.Option(help="Spread of a user's utility within a prompt, in logits: how sure choices are.")
    ] = 3.0,
    user_text: Annotated[bool, typer.Option("--user-text", help="Each user comes with a text that states it.")] = False,
    stated: Stated = False,
    mirrored: Mirrored = False,
    unseen_users: UnseenUsers = 0.2,
    validation: Annotated[float, typer.Option(help="Share of the rows, by prompt.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the rows, by prompt.")] = 0.25,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Simulated users with a known utility choose between responses of a pool; the parts are split by prompt.

    Each row keeps its true utilities in columns that no trainer reads, so `eval preference` can show the ceiling: the
    accuracy of the true utility on the same noisy rows. world.json holds everybody's taste.
    """
    from prlhf.core.sources.simulated import SimulationPlan
    from prlhf.core.splits import SplitPlan

    liked = {"properties": tuple(name.strip() for name in properties.split(","))} if properties else {}
    who = {"users": users, "comparisons": comparisons, "majority": majority, "strength": strength}
    how = {"user_text": user_text, "stated": stated, "mirrored": mirrored}
    plan = SimulationPlan(**who, **liked, **how, conflict=conflict, seed=seed)  # type: ignore[arg-type]
    figures = _simulate(pool, plan, SplitPlan("prompt", validation, test, unseen_users, seed), out)
    if json:
        print_json(figures)
        return
    cells = [(part, f"{s['rows']:,}", s["users"], percent(s["ceiling"])) for part, s in figures["parts"].items()]
    table(f"{out}: {figures['pool']}, seed {seed}", ["part", "rows", "users", "ceiling of the accuracy"], cells)


def _simulate(pool: Path | None, plan: Any, split_plan: Any, out: Path) -> dict[str, Any]:
    from prlhf.core.sources.simulated import POOL, simulated_parts, true_margins
    from prlhf.core.splits import write_parts
    from prlhf.eval.metrics import accuracies, clustered_mean
    from prlhf.eval.preference import units_of

    world, parts = simulated_parts(pool or POOL, plan, split_plan)
    sizes = write_parts(parts, out, "world.json")
    world.save(out / "world.json")
    for name, size in sizes.items():
        right = accuracies(true_margins(parts[name]))  # type: ignore[arg-type]  # every simulated row has both
        size["ceiling"] = clustered_mean(right, units_of(parts[name])[1])
    figures = {"pool": str(pool or POOL.name), "by": split_plan.by, "plan": plan.facts(), "parts": sizes}
    write_json(figures, out / "split.json")
    return figures

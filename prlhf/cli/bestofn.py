"""`prlhf bestofn score|rerank`: recorded candidates, scored and ranked per user."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, ModelPlace, Users, asked_users
from .output import check_not_read, plain, print_json, table, tell

if TYPE_CHECKING:
    from prlhf.core.candidates import Candidates
    from prlhf.core.comparisons import User
    from prlhf.core.personal import PersonalizedModel
    from prlhf.core.scoring import Ranking

app = typer.Typer(help="Best-of-n per user.", no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="Folder of a reward model, or of a policy: its implicit reward ranks.")]
CandidateFile = Annotated[Path, typer.Option("--candidates", help='JSONL: {"prompt": ..., "responses": [...]}.')]


@app.command()
def score(
    run: Run,
    candidates: CandidateFile,
    users: Users,
    out: Annotated[Path, typer.Option(help="JSONL: one line per prompt and user, with scores in the given order.")],
    base: ModelPlace = None,
) -> None:
    """Score every candidate for every user. What is in --out already is kept and not computed again."""
    from prlhf.bestofn.rerank import PROMPTS_AT_ONCE, record_key
    from prlhf.core.store import JsonlStore

    model, prompts, asked = _open(run, candidates, users, base)
    identity = _identity(run)
    keys = [[record_key(identity, user, c.prompt, c.responses) for user in asked] for c in prompts]
    store = JsonlStore(out)
    strangers = set(store).difference(*keys)
    if strangers:
        whose = "another run, other users or other candidates"
        raise ValueError(f"--out {out}: holds {len(strangers)} lines of {whose}; give another file")
    done = len(store)
    todo = [i for i, of_prompt in enumerate(keys) if any(key not in store for key in of_prompt)]
    for start in range(0, len(todo), PROMPTS_AT_ONCE):
        some = todo[start : start + PROMPTS_AT_ONCE]
        rankings = _rank(model, [prompts[i] for i in some], asked)  # prompt by prompt, like the keys
        of_some = [key for i in some for key in keys[i]]
        store.append(*[{"key": key, **_record(r)} for key, r in zip(of_some, rankings, strict=True)])
    tell(f"{out}: {len(store):,} lines, {len(store) - done:,} of them new")


@app.command()
def rerank(
    run: Run,
    candidates: CandidateFile,
    users: Users,
    out: Annotated[Path | None, typer.Option(help="JSONL: one line per prompt and user, best response first.")] = None,
    base: ModelPlace = None,
    json: Json = False,
) -> None:
    """Order the candidates for every user, best first."""
    import json as codec

    from prlhf.core.artefact import whole_file

    check_not_read("--out", out, candidates)
    model, prompts, asked = _open(run, candidates, users, base)
    records = [{**_record(r), "order": list(r.order), "best": r.best} for r in _rank(model, prompts, asked)]
    if out:
        with whole_file(out) as new:
            new.write_text("".join(codec.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        tell(f"{out}: {len(records):,} lines")
    if json:
        print_json({"run": str(run), "rankings": records})
    elif not out:
        _show(records)


def _open(
    run: Path, candidates: Path, users: list[str], base: str | None
) -> "tuple[PersonalizedModel, list[Candidates], list[User]]":
    from prlhf.core.candidates import read_candidates
    from prlhf.core.scoring import ScoreRequest
    from prlhf.runs import load_run

    prompts = read_candidates(candidates)
    model = load_run(run, show=True, model=base)
    asked = asked_users(users, model.users.ids)
    unknown = [user.id or "(none)" for user in asked if not model.knows(user)]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        tell(f"not in {run}, ranked as the unknown user (row 0): {', '.join(unknown[:5])}{more}")
    texts = sum(bool(user.text) for user in asked)
    if model.settings["reads_user_text"] and texts < len(asked):
        tell("this run was trained with texts about users, and some users here have none; give them in a .jsonl file")
    if model.layout.user_text == "input" and texts:
        tell("the users' texts are part of the input, so each user costs a pass of their own")
    requests = [ScoreRequest(user, c.prompt, c.responses) for c in prompts for user in asked]
    model.prepare(requests)
    over = model.over_long(requests)
    if over:
        tell(f"{over:,} responses over the run's {model.layout.max_length} tokens are truncated")
    return model, prompts, asked


def _rank(model: "PersonalizedModel", prompts: "list[Candidates]", users: "list[User]") -> "list[Ranking]":
    from prlhf.bestofn.rerank import rerank as rank

    return list(rank(model.score, prompts, users, model.knows))


def _record(ranking: "Ranking") -> dict[str, Any]:
    """Scores that are no numbers become null, which JSON can hold."""
    return {
        "prompt": ranking.prompt,
        "user_id": ranking.user.id,
        "user_known": ranking.user_known,
        "scores": [value if value == value else None for value in ranking.scores],
    }


def _identity(run: Path) -> str:
    from prlhf.core.artefact import MANIFEST

    return (run / MANIFEST).read_text(encoding="utf-8")


def _show(records: list[dict[str, Any]]) -> None:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_prompt.setdefault(str(record["prompt"]), []).append(record)
    for prompt, group in by_prompt.items():
        rows = [
            (
                r["user_id"] + ("" if r["user_known"] else " (unknown: row 0)"),
                f"{r['order'][0] + 1} of {len(r['order'])}",
                " > ".join(str(i + 1) for i in r["order"]),
                _excerpt(r["best"]),
            )
            for r in group
        ]
        table(_excerpt(prompt, 100), ["user", "pick", "order", "text"], rows)


def _excerpt(text: str, length: int = 60) -> str:
    flat = plain(" ".join(text.split()))
    return flat if len(flat) <= length else flat[: length - 1] + "…"

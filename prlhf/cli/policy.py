"""`prlhf policy train|generate|export|push`: a personalized policy from comparisons, and what it writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ModelPlace, Users, asked_users
from .output import percent, table, tell
from .training import RunArgument, TrainVerb, load_base, push_run, resume, train_and_save, training_data

if TYPE_CHECKING:
    from prlhf.core.comparisons import User
    from prlhf.core.generation import LocalGenerator
    from prlhf.policy.arguments import PolicyArguments
    from prlhf.policy.policy import PersonalizedPolicy
    from prlhf.policy.trainer import PersonalizedDPOConfig

app = typer.Typer(help="Personalized policy (P-DPO, P-IPO and TRL's other preference losses).", no_args_is_help=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Train a personalized policy by any preference loss of TRL's DPO trainer (--loss-type), or by ipo_sum. "
    "Takes every flag of that trainer; every flag may also stand in a --config FILE.yaml.",
)
def train(context: typer.Context) -> None:
    train_and_save(_verb(), context.args, _fit, _show)


def _verb() -> TrainVerb:
    from trl import DPOConfig

    from prlhf.policy.arguments import PolicyArguments, refuse_idle_flags
    from prlhf.policy.trainer import PersonalizedDPOConfig

    shown = ("loss_type", "loss_weights", "beta", "precompute_ref_log_probs")
    return TrainVerb("policy train", PolicyArguments, PersonalizedDPOConfig, DPOConfig, shown, refuse_idle_flags)


def _fit(arguments: "PolicyArguments", config: "PersonalizedDPOConfig", say: Any) -> "PersonalizedPolicy":
    from prlhf.core.pretrained import find_model, load_language_model
    from prlhf.policy.train import train_policy

    rows = training_data(arguments, config, say)
    base = load_base(arguments, config, load_language_model, say)
    reference = None
    if arguments.ref_model:
        try:
            source = find_model(arguments.ref_model)
        except ValueError as error:
            raise ValueError(str(error).replace("--model", "--ref-model")) from None
        say(f"reference: {source.origin}")
        dtype = str(base.dtype).removeprefix("torch.")
        reference = load_language_model(source, dtype, "cpu" if config.use_cpu else None)
    layout, show = arguments.layout(config), not config.disable_tqdm
    weights = base.fingerprint + base.text_hash + (reference.fingerprint if reference else "")
    resume(arguments, config, (*rows, weights), say)
    return train_policy(*rows, base, layout, config, arguments.tuning, arguments.lora(), reference, show)


def _show(policy: Any, out: Path) -> None:
    figures, made = policy.figures, policy.settings
    losses, by = figures["validation_log_loss"], " + ".join(made["loss_type"])
    table(
        f"{out}: {made['user_model']} users, {by}, {made['tuning']}, {made['model']['label']}",
        [f"on validation rows, which chose step {figures['best_step']} of {figures['steps']}", "log loss", "accuracy"],
        [(k, f"{losses[k]:.4f}", percent(figures["validation_accuracy"][k])) for k in losses],
    )
    tell(f"next: prlhf eval preference {out} --data TEST   (rows that chose nothing)")
    tell(f"      prlhf policy generate {out} --prompts TEST --users all --out texts.jsonl   (accuracy hides texts)")


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="Folder of a policy's run; or a language model, which knows no users.")],
    prompts: Annotated[str, typer.Option(help="Prompts, candidates or comparisons; distinct prompts are read.")],
    out: Annotated[Path, typer.Option(help="JSONL: one line per prompt, user and sample; what is there is kept.")],
    users: Users | None = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Responses per prompt and user.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts, from the first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="A response that has not ended by then is cut.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts.")] = 0,
    strength: Annotated[
        float, typer.Option(min=0, help="Of personalization: 0 the unknown user, 1 as trained, above 1 stronger.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses drawn side by side.")] = 64,
    base: ModelPlace = None,
) -> None:
    """Write responses for users: prompts x users x n. Run the same command again to go on where it stopped."""
    from prlhf.core.candidates import read_prompts
    from prlhf.core.generation import GenerateRequest, Sampling
    from prlhf.core.sample import sample
    from prlhf.core.store import JsonlStore

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k)
    asked = read_prompts(prompts)[:limit]
    generator, known, name = _generator(run, strength, batch_size, base)
    people = _people(users, known)
    requests = [
        GenerateRequest(prompt, n, user=user, sampling=sampling, seed=seed) for prompt in asked for user in people
    ]
    generator.check(requests)
    store = JsonlStore(out)
    done, facts = len(store), {"model": run, "strength": strength}
    sample(generator, requests, store, name, show=True, facts=facts)
    tell(f"{out}: {len(store):,} lines, {len(store) - done:,} of them new")
    _show_texts([record for record in store.values() if record.items() >= facts.items()], people, run, strength)


def _generator(run: str, strength: float, sequences: int, base: str | None) -> tuple["LocalGenerator", list[str], Any]:
    """What writes, the users that it knows, and what tells its texts apart from other models'."""
    from prlhf.core.artefact import MANIFEST

    if not (Path(run) / MANIFEST).exists():
        from prlhf.core.generation import LocalGenerator
        from prlhf.core.pretrained import find_model, load_language_model
        from prlhf.core.tokenize import RowTokenizer

        source = find_model(run)
        tell(source.origin)
        model = load_language_model(source)
        generator = LocalGenerator(model.model, RowTokenizer(model.tokenizer), sequences, None, strength)
        return generator, [], f"{model.fingerprint} {model.text_hash}"
    from prlhf.core.user_scores import mark_of
    from prlhf.policy.policy import PersonalizedPolicy

    policy = PersonalizedPolicy.from_pretrained(run, show=True, model=base)
    made = policy.settings
    identity = f"{policy.backbone.fingerprint} {made['model']['text_hash']} {made['user_place']} {strength:g}"

    def name(user: "User") -> str:
        return f"{identity} {mark_of(policy.user_model, policy.row_of(user)).hex()}"

    return policy.generator(strength, sequences), policy.users.ids, name


def _people(users: list[str] | None, known: list[str]) -> "list[User]":
    from prlhf.core.comparisons import User

    if users is None:
        return [User(user) for user in known] or [User(None)]
    asked = asked_users(users, known)
    if not known:
        tell("this model knows no users, so everybody is answered alike, but for what their own texts say")
    unknown = [user.id or "(none)" for user in asked if user.id not in known]
    if unknown and known:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        tell(f"not in this run, answered as the unknown user (row 0): {', '.join(unknown[:5])}{more}")
    return asked


def _show_texts(records: list[dict[str, Any]], people: "list[User]", run: str, strength: float) -> None:
    """Per user: how long the texts are, and whether they ended; accuracy hides what this shows."""
    from statistics import mean, median

    lines = []
    for user in people[:20]:
        mine = [record for record in records if record["user_id"] == user.id]
        lengths, words = [r["tokens"] for r in mine], [len(r["text"].split()) for r in mine]
        ended, empty = mean(r["ended"] for r in mine), mean(not r["text"] for r in mine)
        lines.append(
            (
                user.id or "(no user)",
                f"{len(mine):,}",
                f"{median(lengths):g}",
                f"{mean(words):.1f}",
                f"{100 * ended:.0f} %",
                f"{100 * empty:.0f} %",
            )
        )
    columns = ["user", "texts", "median tokens", "mean words", "ended", "empty"]
    more = " (the first 20 users)" if len(people) > 20 else ""
    table(f"Texts of {run} at strength {strength:g}{more}", columns, lines)


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Folder to write; must be empty or not there.")],
    merge: Annotated[bool, typer.Option(help="Add LoRA weights to the base model, or write them beside it.")] = True,
    base: ModelPlace = None,
) -> None:
    """Write plain weights: a causal language model, its tokenizer, and the table of users' vectors."""
    from prlhf.policy.policy import PersonalizedPolicy
    from prlhf.policy.publish import export as write

    policy = PersonalizedPolicy.from_pretrained(run, show=True, model=base)
    write(policy, out, merge)
    rows, (tokens, _) = len(policy.users), policy.user_model.shape
    tell(f"{out}: a language model, and user_model.safetensors with {rows:,} rows of {tokens} vectors, row 0 first")


app.command("push")(push_run)

"""`prlhf prm train|export|push`: a personalized reward model from comparisons."""

import difflib
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ModelPlace, load
from .output import percent, table, tell

if TYPE_CHECKING:
    from prlhf.core.comparisons import Comparisons
    from prlhf.prm.arguments import RewardArguments
    from prlhf.prm.reward_model import PersonalizedRewardModel
    from prlhf.prm.trainer import PersonalizedRewardConfig

app = typer.Typer(help="Personalized reward model (P-RM; not TRL's process reward model).", no_args_is_help=True)
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Train a personalized reward model: heads on a frozen model, or together with it (--tuning lora or full). "
    "Takes every flag of TRL's reward trainer; every flag may also stand in a --config FILE.yaml.",
)
def train(context: typer.Context) -> None:
    from prlhf.core.artefact import writing

    arguments, config = _parse(context.args)
    begun, out = time.time(), Path(str(config.output_dir))
    token, config.hub_token = config.hub_token, None  # checkpoints keep the configuration, and no secret
    push, config.push_to_hub = config.push_to_hub, False  # the trainer would push its checkpoints
    first = config.process_index == 0
    with writing(out) if first else nullcontext():
        model = _fit(arguments, config)
        if not first:
            return
        model.figures["seconds"] = round(time.time() - begun, 1)
        model.save_pretrained(out)
    _show(model, out)
    if push:
        _push(model, config.hub_model_id or out.name, arguments.publish_users, config.hub_private_repo, token)


def _show(model: "PersonalizedRewardModel", out: Path) -> None:
    figures, made = model.figures, model.settings
    losses = figures["validation_log_loss"]
    what = {"linear_head": "heads", "soft_prompt": "soft prompts"}[made["aggregator"]]
    by = "the strengths" if "base_strength" in figures else f"step {figures['best_step']} of {figures['steps']}"
    table(
        f"{out}: {made['user_model']} {what}, backbone {model.tuning}, {made['pooling']} pooling, "
        f"{made['model']['label']}",
        [f"on validation rows, which chose {by}", "log loss", "accuracy"],
        [(k, f"{losses[k]:.4f}", percent(figures["validation_accuracy"][k])) for k in losses],
    )
    tell(f"next: prlhf eval preference {out} --data TEST   (rows that chose nothing)")


def _parse(args: list[str]) -> "tuple[RewardArguments, PersonalizedRewardConfig]":
    """Reads flags and `--config`.

    Raises:
        ValueError: an unknown flag or key (the nearest one is named), or a value that does not fit.
    """
    import yaml
    from trl import TrlParser

    from prlhf.prm.arguments import RewardArguments, refuse_idle_flags
    from prlhf.prm.trainer import PersonalizedRewardConfig

    kinds: Any = [RewardArguments, PersonalizedRewardConfig]
    parser: Any = TrlParser(kinds, prog="prlhf prm train", usage=_USAGE, allow_abbrev=False)
    if {"--help", "-h", "--help-all"} & set(args):
        shown = parser if "--help-all" in args else _short(PersonalizedRewardConfig, RewardArguments)
        typer.echo(shown.format_help())
        raise typer.Exit
    try:
        arguments, config = parser.parse_args_and_config(args)
    except ValueError as error:
        raise ValueError(f"prm train: {error}{_nearest(str(error), kinds)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config: not YAML: {error}") from None
    except FileNotFoundError as error:
        raise ValueError(f"--config {error.filename}: no such file") from None
    if config.output_dir == PersonalizedRewardConfig().output_dir:
        raise ValueError("prm train: --output-dir is required: the folder of the run")
    given = {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in args if word[:2] == "--"}
    if "--config" in args:
        given |= set(yaml.safe_load(Path(args[args.index("--config") + 1]).read_text()))
    refuse_idle_flags(arguments, config, given)
    arguments.lora()  # may refuse too
    if str(config.resume_from_checkpoint).lower() == "true":
        config.resume_from_checkpoint = True
    return arguments, config


_USAGE = "prlhf prm train --data FILE --model MODEL --output-dir RUN [flags]   (or --config FILE.yaml)"
_SHOWN = (  # of TRL's and transformers' flags, those that most runs set
    *("output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "bf16", "center_rewards_coefficient", "eval_steps"),
    *("save_steps", "resume_from_checkpoint", "push_to_hub", "hub_model_id"),
)


def _short(config: Any, arguments: Any) -> Any:
    """A parser of this project's own flags and the commonest others, for a help text that can be read."""
    from dataclasses import field, fields, make_dataclass

    from transformers import HfArgumentParser
    from trl import RewardConfig

    def copied(of: Any) -> Any:
        return field(default=of.default, default_factory=of.default_factory, metadata=of.metadata)

    stock = {one.name for one in fields(RewardConfig)}
    own = [one for one in fields(config) if one.name in _SHOWN or one.name not in stock]
    own += [one for one in fields(config) if one.name in ("max_length", "seed")]
    training: Any = make_dataclass("training", [(one.name, one.type, copied(one)) for one in own])
    foot = (
        "Every other flag of TRL's RewardConfig and transformers' TrainingArguments works too: --help-all lists them."
    )
    return HfArgumentParser([arguments, training], prog="prlhf prm train", usage=_USAGE, epilog=foot)


def _nearest(message: str, kinds: list[Any]) -> str:
    fields = [name.replace("_", "-") for kind in kinds for name in kind.__dataclass_fields__]
    words = [word.strip("[]',\"-").replace("_", "-") for word in message.split()]
    near = [difflib.get_close_matches(word, fields, n=1, cutoff=0.75) for word in words if word not in fields]
    found = sorted({match[0] for match in near if match})
    return f" Did you mean {', '.join('--' + name for name in found)}?" if found else ""


def _fit(arguments: "RewardArguments", config: "PersonalizedRewardConfig") -> "PersonalizedRewardModel":
    from prlhf.core.artefact import MANIFEST
    from prlhf.core.pretrained import find_model, load_backbone
    from prlhf.prm.fit import fit_reward_model

    say = tell if config.process_index == 0 else lambda _: None
    heads = arguments.fits_heads(config)
    if (Path(str(config.output_dir)) / MANIFEST).exists() and not arguments.overwrite:
        raise ValueError(f"--output-dir {config.output_dir}: holds a run already; give another, or --overwrite")
    if heads and config.world_size > 1:
        raise ValueError("heads on a frozen model are fitted by one process; start without accelerate launch")
    head_config = arguments.head_config(config) if heads else None
    train_rows, validation = _data(arguments, config, say)
    source = find_model(arguments.model)
    say(source.origin)
    # Full fine-tuning in bfloat16 would lose small updates; computing in it (--bf16) does not.
    wish = "float32" if arguments.tuning == "full" and arguments.dtype == "auto" else arguments.dtype
    backbone = load_backbone(source, wish, "cpu" if config.use_cpu else None)
    say(f"running it in {str(backbone.dtype).removeprefix('torch.')} on {next(backbone.model.parameters()).device}")
    layout = arguments.layout(config)
    if head_config:
        return fit_reward_model(
            train_rows, validation, backbone, layout, config.pooling, head_config, not config.disable_tqdm
        )
    from prlhf.prm.joint import train_reward_model

    _resume(arguments, config, (train_rows, validation, backbone.fingerprint + backbone.text_hash), say)
    rows = (train_rows, validation)
    show = not config.disable_tqdm
    return train_reward_model(*rows, backbone, layout, config, arguments.tuning, arguments.lora(), show)


def _resume(arguments: "RewardArguments", config: "PersonalizedRewardConfig", on: tuple[Any, ...], say: Any) -> None:
    """Sets the checkpoint that training goes on from, where the same command was interrupted."""
    from dataclasses import asdict

    from prlhf.core.checkpoints import begin
    from prlhf.core.splits import data_hash

    if config.resume_from_checkpoint:
        return
    train_rows, validation, fingerprint = on
    aside = {"overwrite", "output_dir", "logging_dir", "local_rank", "hub_token"}
    told = {key: str(value) for key, value in {**asdict(arguments), **asdict(config)}.items() if key not in aside}
    facts = {**told, "rows": data_hash(list(train_rows)), "held": data_hash(list(validation)), "model": fingerprint}
    facts["processes"] = str(config.world_size)
    found = begin(Path(str(config.output_dir)), facts, arguments.overwrite, config.process_index == 0, say)
    config.resume_from_checkpoint = str(found) if found else None


def _data(
    arguments: "RewardArguments", config: "PersonalizedRewardConfig", say: Any
) -> "tuple[Comparisons, Comparisons]":
    from prlhf.core.splits import SplitPlan, split

    def read(source: str) -> "Comparisons":
        return load(source, arguments.columns, arguments.max_bad_rows, arguments.missing_user, say=say)

    rows = read(arguments.data)
    if arguments.eval_data:
        return rows, read(arguments.eval_data)
    parts = split(rows, SplitPlan("prompt", validation=0.1, test=0.0, seed=config.seed))
    say(f"no --eval-data: {len(parts['validation']):,} rows, by prompt, are held back for validation")
    return rows.subset(parts["train"]), rows.subset(parts["validation"])


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Folder to write; must be empty or not there.")],
    merge: Annotated[bool, typer.Option(help="Add LoRA weights to the base model, or write them beside it.")] = True,
    base: ModelPlace = None,
) -> None:
    """Write plain weights: a sequence classifier with row 0's head, its tokenizer, and the table of users' vectors."""
    from prlhf.prm.publish import export as write
    from prlhf.prm.reward_model import PersonalizedRewardModel

    model = PersonalizedRewardModel.from_pretrained(run, show=True, model=base)
    write(model, out, merge)
    tell(f"{out}: a sequence classifier, and user_model.safetensors with {len(model.users):,} rows, row 0 first")
    if model.head.aggregator == "soft_prompt":
        tell("its scores mean something with a user's vectors in front of the text, row 0's for the unknown user")
    elif model.settings["pooling"] != "last":
        tell(
            f"its head was trained on {model.settings['pooling']} pooling; a stock reader takes the last token instead"
        )


@app.command()
def push(
    run: RunArgument,
    repo: Annotated[str, typer.Option(help="Name on the hub, as in me/my-reward-model.")],
    users: Annotated[bool, typer.Option("--users", help="Also users' ids, vectors and facts: personal data.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A repository that only you can read.")] = False,
    base: ModelPlace = None,
) -> None:
    """Publish a run on the hub: row 0 alone, unless --users is given. The token is the hub's own ($HF_TOKEN)."""
    from prlhf.prm.reward_model import PersonalizedRewardModel

    model = PersonalizedRewardModel.from_pretrained(run, show=True, model=base)
    _push(model, repo, users, private or None, os.environ.get("HF_TOKEN"))


def _push(model: "PersonalizedRewardModel", repo: str, users: bool, private: bool | None, token: str | None) -> None:
    from prlhf.prm.publish import push_to_hub

    address = push_to_hub(model, repo, users, private, token)
    tell(f"{address}: published {'with' if users else 'without'} its users")

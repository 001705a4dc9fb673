"""`prlhf prm train|export|push`: a personalized reward model from comparisons."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ModelPlace
from .output import percent, table, tell
from .training import RunArgument, TrainVerb, load_base, push_run, resume, train_and_save, training_data

if TYPE_CHECKING:
    from prlhf.prm.arguments import RewardArguments
    from prlhf.prm.reward_model import PersonalizedRewardModel
    from prlhf.prm.trainer import PersonalizedRewardConfig

app = typer.Typer(help="Personalized reward model (P-RM; not TRL's process reward model).", no_args_is_help=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Train a personalized reward model: heads on a frozen model, or together with it (--tuning lora or full). "
    "Takes every flag of TRL's reward trainer; every flag may also stand in a --config FILE.yaml.",
)
def train(context: typer.Context) -> None:
    train_and_save(_verb(), context.args, _fit, _show)


def _verb() -> TrainVerb:
    from trl import RewardConfig

    from prlhf.prm.arguments import RewardArguments, refuse_idle_flags
    from prlhf.prm.trainer import PersonalizedRewardConfig

    shown = ("center_rewards_coefficient",)
    return TrainVerb("prm train", RewardArguments, PersonalizedRewardConfig, RewardConfig, shown, refuse_idle_flags)


def _show(model: Any, out: Path) -> None:
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


def _fit(arguments: "RewardArguments", config: "PersonalizedRewardConfig", say: Any) -> "PersonalizedRewardModel":
    from prlhf.core.pretrained import load_backbone
    from prlhf.prm.fit import fit_reward_model

    heads = arguments.fits_heads(config)
    if heads and config.world_size > 1:
        raise ValueError("heads on a frozen model are fitted by one process; start without accelerate launch")
    head_config = arguments.head_config(config) if heads else None
    rows = training_data(arguments, config, say)
    backbone = load_base(arguments, config, load_backbone, say)
    layout, show = arguments.layout(config), not config.disable_tqdm
    if head_config:
        return fit_reward_model(*rows, backbone, layout, config.pooling, head_config, show)
    from prlhf.prm.joint import train_reward_model

    resume(arguments, config, (*rows, backbone.fingerprint + backbone.text_hash), say)
    return train_reward_model(*rows, backbone, layout, config, arguments.tuning, arguments.lora(), show)


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


app.command("push")(push_run)

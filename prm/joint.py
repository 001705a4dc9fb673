"""Comparisons -> user model, head and backbone trained together -> a reward model that can be saved."""

from typing import Any, cast

import torch

from ..core.backbone import unwrapped
from ..core.comparisons import Comparison, Comparisons
from ..core.pretrained import Backbone, load_backbone
from ..core.sharded import is_sharded, whole_module
from ..core.tokenize import TextLayout
from ..core.training import (
    TrainingRows,
    check_tuning,
    common_settings,
    plain_forward,
    run_trainer,
    trainer_settings,
)
from ..core.tuned import tuned_backbone
from ..core.users import UserModel, make_user_model
from .features import feature_reader
from .fit import (
    TRIAL_ROWS,
    TRIAL_USERS,
    new_user_settings,
    resolve,
)
from .heads import Examples
from .linear_head import LinearHead
from .module import classifier_of, reward_module
from .reward_model import PersonalizedRewardModel
from .soft_prompt import SoftPrompt
from .trainer import PersonalizedRewardConfig, PersonalizedRewardTrainer, reward_dataset, start_user_model


def train_reward_model(
    train: Comparisons,
    validation: Comparisons,
    backbone: Backbone,
    layout: TextLayout,
    args: PersonalizedRewardConfig,
    tuning: str = "lora",
    peft_config: Any = None,
    show: bool = False,
    callbacks: Any = None,
) -> PersonalizedRewardModel:
    """Trains a personalized reward model together with its backbone.

    Args:
        validation: rows by which the best step is chosen (`args.load_best_model_at_end`).
        backbone: of its own: its weights are changed, or get an adapter.
        tuning: of the backbone: `lora`, `full`, or `frozen` (soft prompts alone; for frozen linear heads
            `fit_reward_model` is hundreds of times faster).
        peft_config: for `lora`.

    Returns:
        the model; under FSDP only in the first process, and None in the others.

    Raises:
        DataError: rows that can't be trained on.
        TrainingStopped: a loss or gradient that is not a number.
    """
    check_tuning(tuning, peft_config)
    # With a soft prompt, the last token's state has read both the user's vectors and the whole response.
    wish = args.pooling or ("last" if args.aggregator == "soft_prompt" else None)
    before = args.user_tokens if args.aggregator == "soft_prompt" else 0
    pooling, resolved = resolve(backbone, layout, wish, before)
    args.pooling = pooling  # type: ignore[assignment]
    rows = TrainingRows.of(train, validation, backbone, resolved, args)
    if tuning == "full":
        backbone.model.requires_grad_(True)
    trainer = _trainer(rows, backbone, args, peft_config, callbacks)
    figures = run_trainer(trainer, rows, (train, validation))
    user_model = _user_model(trainer.model, args.aggregator)
    settings = {
        **common_settings(backbone, resolved, train),
        "pooling": pooling,
        "aggregator": args.aggregator,
        **trainer_settings(trainer, user_model, tuning),
    }
    if not is_sharded(trainer):
        return _finished(trainer.model, backbone, rows, settings, figures, show)
    whole = _whole(trainer, backbone, len(rows.users))
    if whole is None:  # nothing to save in this process
        return cast(PersonalizedRewardModel, None)
    return _finished(*whole, rows, settings, figures, show)


def _whole(trainer: PersonalizedRewardTrainer, backbone: Backbone, users: int) -> tuple[Any, Backbone] | None:
    args = trainer.args

    def build(fresh: Backbone) -> Any:
        module = classifier_of(fresh)
        start = start_user_model(module, fresh.tokenizer, args, users)
        return reward_module(module, start, args.aggregator, str(args.pooling), args.user_place)

    return whole_module(trainer, backbone, load_backbone, build)


def _trainer(
    rows: TrainingRows, backbone: Backbone, args: PersonalizedRewardConfig, peft_config: Any, callbacks: Any
) -> PersonalizedRewardTrainer:
    return PersonalizedRewardTrainer(
        classifier_of(backbone, args.seed if args.aggregator == "soft_prompt" else None),
        args,
        reward_dataset(rows.pairs[0], rows.users),
        reward_dataset(rows.pairs[1], rows.users),
        backbone.tokenizer,
        users=len(rows.users),
        peft_config=peft_config,
        places=lambda row: rows.pairs[0].rows[row].place,
        callbacks=callbacks,
    )


def _user_model(module: Any, aggregator: str) -> UserModel:
    inner = unwrapped(module)
    return inner.base_model.user_model if aggregator == "soft_prompt" else inner.user_model


@torch.no_grad()
def _finished(
    module: Any,
    base: Backbone,
    rows: TrainingRows,
    settings: dict[str, Any],
    figures: dict[str, Any],
    show: bool,
) -> PersonalizedRewardModel:
    user_model = _user_model(module, settings["aggregator"])
    plain_forward(module)
    inner = unwrapped(module)
    backbone = tuned_backbone(base, module, settings["tuning"])
    settings["fingerprint"] = backbone.fingerprint
    if settings["aggregator"] == "soft_prompt":
        head: LinearHead | SoftPrompt = SoftPrompt(inner.score.weight[0].detach().clone().cpu())
    else:
        inner.score.weight.copy_(user_model.row0())  # what a stock reader of the weights gets: the unknown user
        reader = feature_reader(backbone, TextLayout(**settings["layout"]))
        head, settings["mixture_strength"] = _linear_head(user_model, rows, reader, settings, show)
    return PersonalizedRewardModel(
        rows.users, user_model, settings, figures, head=head, show=show, _backbone=backbone, _module=module
    )


def _linear_head(
    users: UserModel, rows: TrainingRows, reader: Any, settings: dict[str, Any], show: bool
) -> tuple[LinearHead, float]:
    """What new users need: the scale of the trained states, and a prior chosen on validation rows."""
    parts = [_few(rows.pairs[0].rows), rows.pairs[1].rows]
    z = [reader.differences(part, settings["pooling"], show) for part in parts]
    scale = float(z[0].square().mean().sqrt().clamp_min(1e-12))
    sets = [Examples(d / scale, rows.users.rows([r.user.id for r in p])) for d, p in zip(z, parts, strict=True)]
    scaled = make_user_model(users.name, users.users, torch.zeros(users.shape), **users.options())
    with torch.no_grad():
        for name, parameter in users.named_parameters():
            scaled.get_parameter(name).copy_(parameter.cpu() * (1 if name == "logits.weight" else scale))
        offsets = scaled(torch.arange(1, users.users)) - scaled.row0()
    strength = 1 / float(offsets.square().mean().clamp_min(1e-8)) if len(offsets) else 1.0
    prior, mixture, _ = new_user_settings(scaled, strength, sets, settings["seed"])
    return LinearHead(None, scale, prior), mixture


def _few(rows: list[Comparison]) -> list[Comparison]:
    """As many rows of as many users as the choice of a prior reads."""
    counts: dict[str | None, int] = {}
    kept = []
    for row in rows:
        counts[row.user.id] = counts.get(row.user.id, 0) + 1
        if len(counts) <= TRIAL_USERS and counts[row.user.id] <= TRIAL_ROWS:
            kept.append(row)
    return kept

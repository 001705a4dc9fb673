"""Comparisons -> user model, head and backbone trained together -> a reward model that can be saved."""

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from ..core.backbone import unwrapped
from ..core.comparisons import Comparison, Comparisons, DataError
from ..core.figures import wilson
from ..core.pairs import TokenPairs, token_pairs
from ..core.pretrained import Backbone
from ..core.splits import data_hash
from ..core.tokenize import RowTokenizer, TextLayout
from ..core.users import UserIndex, UserModel, make_user_model
from .features import feature_reader, over_long_by_user
from .fit import (
    TRIAL_ROWS,
    TRIAL_USERS,
    common_settings,
    new_user_settings,
    resolve,
    tell_over_long,
    user_facts,
    users_of,
)
from .heads import Examples
from .linear_head import LinearHead
from .module import classifier_of
from .reward_model import PersonalizedRewardModel
from .sharded import check_sharding, is_sharded, whole_module
from .soft_prompt import SoftPrompt
from .trainer import PersonalizedRewardConfig, PersonalizedRewardTrainer, correct, reward_dataset
from .tuned import TUNINGS, tuned_backbone


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
    if tuning not in TUNINGS or (tuning == "lora") != (peft_config is not None):
        raise ValueError(f"tuning {tuning!r}: must be one of {', '.join(TUNINGS)}; lora needs a peft_config")
    # With a soft prompt, the last token's state has read both the user's vectors and the whole response.
    wish = args.pooling or ("last" if args.aggregator == "soft_prompt" else None)
    pooling, resolved = resolve(backbone, layout, wish)
    args.pooling = pooling  # type: ignore[assignment]
    rows = _Rows.of(train, validation, backbone, resolved, args)
    if tuning == "full":
        backbone.model.requires_grad_(True)
    trainer = _trainer(rows, backbone, args, peft_config, callbacks)
    begun = time.time()
    trainer.train(args.resume_from_checkpoint)
    trainer.evaluate()
    spent = {"training_seconds": round(time.time() - begun, 1), **_costs(trainer)}
    if args.resume_from_checkpoint:
        spent["resumed_from"] = str(args.resume_from_checkpoint).rpartition("-")[2]  # the seconds are those since then
    settings = {**common_settings(backbone, resolved, pooling, train), **_settings(trainer, tuning)}
    left_out = {"train": train.dropped_counts, "validation": validation.dropped_counts}
    figures = {**rows.figures(), "left_out": left_out, **_validation_figures(trainer.margins(), rows.users), **spent}
    if not is_sharded(trainer):
        return _finished(trainer.model, backbone, rows, settings, figures, show)
    whole = whole_module(trainer, backbone, len(rows.users))
    if whole is None:  # nothing to save in this process
        return cast(PersonalizedRewardModel, None)
    return _finished(*whole, rows, settings, figures, show)


def _trainer(
    rows: "_Rows", backbone: Backbone, args: PersonalizedRewardConfig, peft_config: Any, callbacks: Any
) -> PersonalizedRewardTrainer:
    trainer = PersonalizedRewardTrainer(
        classifier_of(backbone),
        args,
        reward_dataset(rows.pairs[0], rows.users),
        reward_dataset(rows.pairs[1], rows.users),
        backbone.tokenizer,
        users=len(rows.users),
        peft_config=peft_config,
        places=lambda row: rows.pairs[0].rows[row].place,
        callbacks=callbacks,
    )
    told = json.dumps([rows.users.ids, *(data_hash(part.rows) for part in rows.pairs)])
    trainer.data_key = hashlib.sha256(told.encode()).hexdigest()[:16]
    check_sharding(trainer)
    return trainer


@dataclass
class _Rows:
    """Training and validation rows as token ids, their users, and what the length policy met."""

    pairs: list[TokenPairs]
    over_long: list[dict[str, int]]
    users: UserIndex

    @classmethod
    def of(
        cls, train: Comparisons, validation: Comparisons, backbone: Backbone, layout: TextLayout, args: Any
    ) -> "_Rows":
        tokenizer = RowTokenizer(backbone.tokenizer, layout)
        pairs = [token_pairs(rows, tokenizer) for rows in (train, validation)]
        over_long = [over_long_by_user(rows, p.over) for rows, p in zip((train, validation), pairs, strict=True)]
        tell_over_long(over_long, layout)
        users = users_of(pairs[0].rows, train.source, args.user_model)
        users.facts = user_facts(pairs[0].rows, over_long[0])
        if args.user_place == "after_bos":
            _check_bos(pairs[0], backbone.tokenizer.bos_token_id)
        return cls(pairs, over_long, users)

    def figures(self) -> dict[str, Any]:
        names = ("train", "validation")
        return {
            "rows": {name: len(part.rows) for name, part in zip(names, self.pairs, strict=True)},
            "over_long": {name: sum(c.values()) for name, c in zip(names, self.over_long, strict=True)},
        }


def _check_bos(pairs: TokenPairs, bos: int | None) -> None:
    for row, tokens in zip(pairs.rows, pairs.chosen, strict=True):
        if bos is None or tokens.prompt_ids[:1] != (bos,):
            raise DataError(
                f"{row.place}: does not begin with the BOS token, so --user-place after_bos has no place for the user; "
                "use prepend"
            )


def _settings(trainer: PersonalizedRewardTrainer, tuning: str) -> dict[str, Any]:
    args = trainer.args
    users = _user_model(trainer.model, args.aggregator)
    return {
        "aggregator": args.aggregator,
        "tuning": tuning,
        "user_model": args.user_model,
        "user_options": users.options(),
        "user_tokens": args.user_tokens,
        "user_place": args.user_place,
        "user_loss_alpha": args.user_loss_alpha,
        "user_loss": args.user_loss,
        "user_learning_rate": trainer.user_learning_rate(),
        "learning_rate": args.learning_rate,
        "epochs": args.num_train_epochs,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes,
        "seed": args.seed,
    }


def _user_model(module: Any, aggregator: str) -> UserModel:
    inner = unwrapped(module)
    return inner.base_model.user_model if aggregator == "soft_prompt" else inner.user_model


def _costs(trainer: PersonalizedRewardTrainer) -> dict[str, Any]:
    state = trainer.state
    kept = state.best_model_checkpoint or ""
    return {
        "steps": state.global_step,
        "best_step": int(kept.rpartition("-")[2]) if kept else state.global_step,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_memory_gb": _peak_memory(),
        "log": [dict(entry) for entry in state.log_history],
    }


def _peak_memory() -> float | None:
    """Most memory that this process held, on the GPU where there is one, in GiB; None where nobody counts it."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(peak / 2**30, 2)


def _validation_figures(margins: pd.DataFrame, users: UserIndex) -> dict[str, Any]:
    """Log loss and accuracy on validation rows with the user and with row 0; each user's own go to the users' facts."""
    sides = {"personal": margins["margin"].to_numpy(), "row0": margins["margin_row0"].to_numpy()}
    right = {name: correct(m) for name, m in sides.items()}
    table = pd.DataFrame({"user": margins["user"], **right}).groupby("user")
    for number, part in table:
        user: int = number  # type: ignore[assignment]
        facts = users.facts.setdefault(users.ids[user - 1] if user else "", {})
        facts["validation"] = {"n": len(part), **{name: round(float(part[name].mean()), 4) for name in right}}
    return {
        "validation_log_loss": {name: float(np.logaddexp(0, -m).mean()) for name, m in sides.items()},
        "validation_accuracy": {name: wilson(float(values.sum()), len(values)) for name, values in right.items()},
    }


@torch.no_grad()
def _finished(
    module: Any,
    base: Backbone,
    rows: _Rows,
    settings: dict[str, Any],
    figures: dict[str, Any],
    show: bool,
) -> PersonalizedRewardModel:
    user_model = _user_model(module, settings["aggregator"])
    for name in ("forward", "_original_forward"):
        vars(module).pop(name, None)  # accelerate's autocast, under which scores differ from those of a loaded run
    module.eval().requires_grad_(False)
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
        rows.users, user_model, head, settings, figures, show=show, _backbone=backbone, _module=module
    )


def _linear_head(
    users: UserModel, rows: _Rows, reader: Any, settings: dict[str, Any], show: bool
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

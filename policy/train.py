"""Comparisons -> user model and language model trained together -> a policy that can be saved."""

import copy
from typing import Any, cast

import torch

from ..core.backbone import personalize, unwrapped
from ..core.comparisons import Comparisons
from ..core.pretrained import Backbone, load_language_model
from ..core.sharded import is_sharded, whole_module
from ..core.tokenize import TextLayout
from ..core.training import (
    TrainingRows,
    check_tuning,
    common_settings,
    model_facts,
    plain_forward,
    resolved_layout,
    run_trainer,
    trainer_settings,
)
from .policy import PersonalizedPolicy, trained_model
from .trainer import PersonalizedDPOConfig, PersonalizedDPOTrainer, dpo_dataset, start_user_model


def train_policy(
    train: Comparisons,
    validation: Comparisons,
    base: Backbone,
    layout: TextLayout,
    args: PersonalizedDPOConfig,
    tuning: str = "lora",
    peft_config: Any = None,
    reference: Backbone | None = None,
    show: bool = False,
    callbacks: Any = None,
) -> PersonalizedPolicy:
    """Trains a personalized policy by DPO or any other preference loss (`args.loss_type`).

    Args:
        validation: rows by which the best step is chosen (`args.load_best_model_at_end`).
        base: from `load_language_model`, of its own: its weights are changed, or get an adapter.
        tuning: `lora`, `full`, or `frozen` (users' vectors alone).
        peft_config: for `lora`.
        reference: what the policy is held to, if not the model that training starts from.

    Returns:
        the policy; under FSDP only in the first process, and None in the others.

    Raises:
        DataError: rows that can't be trained on.
        TrainingStopped: a loss or gradient that is not a number.
    """
    check_tuning(tuning, peft_config)
    _check_reference(base, reference)
    resolved = resolved_layout(base, layout, args.user_tokens)
    args.max_length = resolved.max_length
    rows = TrainingRows.of(train, validation, base, resolved, args)
    if tuning == "full":
        base.model.requires_grad_(True)
    trainer = _trainer(rows, base, args, peft_config, reference, callbacks)
    figures = run_trainer(trainer, rows, (train, validation))
    settings = {**common_settings(base, resolved, train), **_settings(trainer, tuning, base, reference)}
    if not is_sharded(trainer):
        return _finished(trainer.model, base, rows, settings, figures, show, reference)

    def build(fresh: Backbone) -> Any:
        start = start_user_model(fresh.model, fresh.tokenizer, args, len(rows.users))
        return personalize(fresh.model, start, args.user_place)

    whole = whole_module(trainer, base, load_language_model, build)
    if whole is None:  # nothing to save in this process
        return cast(PersonalizedPolicy, None)
    return _finished(*whole, rows, settings, figures, show, reference)


def _settings(
    trainer: PersonalizedDPOTrainer, tuning: str, base: Backbone, reference: Backbone | None
) -> dict[str, Any]:
    args = trainer.args
    return {
        **trainer_settings(trainer, unwrapped(trainer.model).base_model.user_model, tuning),
        "loss_type": list(args.loss_type),
        "loss_weights": [float(weight) for weight in args.loss_weights or [1.0] * len(args.loss_type)],
        "beta": args.beta,
        "reference": {"separate": reference is not None, **model_facts(reference or base)},
    }


def _check_reference(base: Backbone, reference: Backbone | None) -> None:
    if reference and reference.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ValueError(
            f"the reference {reference.source.name} has another tokenizer than {base.source.name}: the same token ids "
            "would be other texts to it"
        )


def _trainer(
    rows: TrainingRows,
    base: Backbone,
    args: PersonalizedDPOConfig,
    peft_config: Any,
    reference: Backbone | None,
    callbacks: Any,
) -> PersonalizedDPOTrainer:
    return PersonalizedDPOTrainer(
        base.model,
        args,
        dpo_dataset(rows.pairs[0], rows.users),
        dpo_dataset(rows.pairs[1], rows.users),
        base.tokenizer,
        users=len(rows.users),
        peft_config=peft_config,
        ref_model=_reference_model(base, args, peft_config, reference),
        reference_key=(reference or base).fingerprint,
        places=lambda row: rows.pairs[0].rows[row].place,
        callbacks=callbacks,
    )


def _reference_model(base: Backbone, args: PersonalizedDPOConfig, peft_config: Any, reference: Backbone | None) -> Any:
    """The reference that has to be in memory while training runs; None where it is computed before, or below LoRA."""
    if reference:  # one that follows the policy must not change what the caller holds
        return copy.deepcopy(reference.model) if args.sync_ref_model else reference.model
    if args.precompute_ref_log_probs or peft_config is not None:
        return None
    # TRL would look for it under a name that the weights in memory need not have.
    return load_language_model(base.source, str(base.dtype).removeprefix("torch."), str(base.model.device)).model


@torch.no_grad()
def _finished(
    module: Any,
    base: Backbone,
    rows: TrainingRows,
    settings: dict[str, Any],
    figures: dict[str, Any],
    show: bool,
    reference: Backbone | None,
) -> PersonalizedPolicy:
    plain_forward(module)
    if reference:
        plain_forward(reference.model)
    trained = trained_model(base, module, settings["tuning"])
    settings["fingerprint"] = trained.fingerprint
    user_model = unwrapped(module).base_model.user_model
    return PersonalizedPolicy(
        rows.users,
        user_model,
        settings,
        figures,
        show=show,
        _backbone=trained,
        _module=module,
        _reference=reference,
    )

"""Plain weights of a run, for readers that know nothing of this library."""

import copy
from pathlib import Path

import torch

from ..core.publish import free_folder, plain_module, write_plain
from .module import classifier_of
from .reward_model import PersonalizedRewardModel


@torch.no_grad()
def export(model: PersonalizedRewardModel, folder: str | Path, merged: bool = True) -> None:
    """Writes plain weights for readers that know nothing of this library.

    A sequence classifier as transformers writes it, whose head is row 0's (linear head) or the one head (soft prompt),
    its tokenizer, `user_model.safetensors` with `vectors` (U, D) or (U, K, D), row 0 first, and `users.json`. As it
    stands it is the reward model of the unknown user only where heads read the last token: a stock reader knows
    neither mean pooling nor vectors in front of the text.

    Args:
        merged: LoRA weights are added to the base model; else the base model's weights are written as they were, and
            the adapter beside them in `adapter/`.

    Raises:
        ArtefactError: the folder is there and not empty.
    """
    folder = free_folder(folder)
    soft = model.head.aggregator == "soft_prompt"
    head = model.head.weight if soft else model.user_model.row0()  # type: ignore[union-attr]
    frozen_heads = model.tuning == "frozen" and not soft
    plain = classifier_of(model.backbone) if frozen_heads else plain_module(model, folder, merged)
    tokenizer = model.backbone.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    plain.config.get_text_config().pad_token_id = pad  # or a stock reader could take one row at a time only
    plain.score = copy.deepcopy(plain.score)
    plain.score.weight.copy_(head.reshape(1, -1))
    write_plain(plain, model, folder)

"""Plain weights of a policy, for readers that know nothing of this library."""

from pathlib import Path

import torch

from ..core.publish import free_folder, plain_module, write_plain
from .policy import PersonalizedPolicy


@torch.no_grad()
def export(policy: PersonalizedPolicy, folder: str | Path, merged: bool = True) -> None:
    """Writes a causal language model as transformers writes it, its tokenizer, and the users' vectors beside it.

    `user_model.safetensors` holds `vectors` (U, K, D), row 0 first, and `users.json` the ids. A reader has to put a
    user's K vectors in front of the embedded text, or behind its BOS token, as `user_place` in the table's metadata
    says; without them it is not the policy of the unknown user, which row 0's vectors make.

    Args:
        merged: LoRA weights are added to the base model; else the base model's weights are written as they were, and
            the adapter beside them in `adapter/`.

    Raises:
        ArtefactError: the folder is there and not empty.
    """
    folder = free_folder(folder)
    write_plain(plain_module(policy, folder, merged), policy, folder)

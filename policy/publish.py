"""Plain weights of a policy, for readers that know nothing of this library."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..core.artefact import ArtefactError
from ..core.backbone import keep_apart, unwrapped
from ..core.tuned import without_place
from .policy import PersonalizedPolicy

TABLE = "user_model.safetensors"


@torch.no_grad()
def export(policy: PersonalizedPolicy, folder: str | Path, merged: bool = True) -> None:
    """Writes a causal language model as transformers writes it, its tokenizer, and the users' vectors beside it.

    `user_model.safetensors` holds `vectors` (U, K, D), row 0 first, and `users.json` the ids. A reader has to put a
    user's K vectors in front of the embedded text; without them it is not the policy of the unknown user, which row 0's
    vectors make.

    Args:
        merged: LoRA weights are added to the base model; else the base model's weights are written as they were, and
            the adapter beside them in `adapter/`.

    Raises:
        ArtefactError: the folder is there and not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ArtefactError(f"{folder}: is there already; give another folder")
    plain = copy.deepcopy(policy.module)
    if policy.tuning == "lora":
        if not merged:
            plain.save_pretrained(folder / "adapter")
            (folder / "adapter" / "README.md").unlink(missing_ok=True)
            without_place(folder / "adapter" / "adapter_config.json")
        plain = plain.merge_and_unload() if merged else plain.unload()
    plain = unwrapped(plain)
    keep_apart(plain)
    plain.save_pretrained(folder)
    policy.backbone.tokenizer.save_pretrained(folder)
    vectors = policy.user_model.vectors().reshape(-1, *policy.user_model.shape)
    save_file({"vectors": vectors.contiguous()}, folder / TABLE)
    policy.users.save(folder / "users.json")

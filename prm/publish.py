"""Plain weights of a run, for readers that know nothing of this library."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..core.artefact import ArtefactError
from ..core.backbone import keep_apart
from ..core.tuned import without_place
from .module import classifier_of
from .reward_model import PersonalizedRewardModel

TABLE = "user_model.safetensors"


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
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ArtefactError(f"{folder}: is there already; give another folder")
    soft = model.head.aggregator == "soft_prompt"
    head = model.head.weight if soft else model.user_model.row0()  # type: ignore[union-attr]
    frozen_heads = model.tuning == "frozen" and not soft
    plain = classifier_of(model.backbone) if frozen_heads else copy.deepcopy(model.module)
    if model.tuning == "lora":
        if not merged:
            plain.save_pretrained(folder / "adapter")
            (folder / "adapter" / "README.md").unlink(missing_ok=True)
            without_place(folder / "adapter" / "adapter_config.json")
        plain = plain.merge_and_unload() if merged else plain.unload()
    keep_apart(plain)
    tokenizer = model.backbone.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    plain.config.get_text_config().pad_token_id = pad  # or a stock reader could take one row at a time only
    plain.score = copy.deepcopy(plain.score)
    plain.score.weight.copy_(head.reshape(1, -1))
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.arange(len(model.users), device=model.user_model.device)
    save_file({"vectors": model.user_model(ids).cpu().contiguous()}, folder / TABLE)
    model.users.save(folder / "users.json")

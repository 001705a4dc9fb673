"""Backbones that were trained along with the user model: where their weights lie in a run, and how they come back.

`lora`: an adapter as peft writes it, over a base model that is found and checked like that of frozen heads. `full`: a
whole model in the run's folder, as transformers writes it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import is_personal, unwrapped
from .pretrained import Backbone, ModelSource

TUNINGS = ("frozen", "lora", "full")


def tuned_fingerprint(base: Backbone, module: Any, tuning: str) -> str:
    """Fingerprint of a trained module without its users, 16 hex digits; what it started from, where that is frozen.

    Args:
        module: in peft's wrapper for `lora`.
    """
    if tuning == "frozen":
        return base.fingerprint
    if tuning == "full":
        digest = hashlib.sha256(b"full")
        _add(digest, {name: t for name, t in unwrapped(module).state_dict().items() if not is_personal(name)})
    else:
        from peft import get_peft_model_state_dict

        digest = hashlib.sha256(base.fingerprint.encode())
        _add(digest, get_peft_model_state_dict(module))
    return digest.hexdigest()[:16]


def tuned_backbone(base: Backbone, module: Any, tuning: str) -> Backbone:
    """The backbone inside a trained module."""
    if tuning == "frozen":
        return base
    return base.trained(unwrapped(module).base_model, tuned_fingerprint(base, module, tuning))


def _add(digest: Any, state: dict[str, Tensor]) -> None:
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load_tuned(module: Any, folder: Path) -> Any:
    """The module with the run's LoRA weights in it, frozen, in peft's wrapper."""
    from peft import PeftModel

    return PeftModel.from_pretrained(module, str(folder)).eval().requires_grad_(False)


def full_source(folder: Path, label: str) -> ModelSource:
    """The whole model that a fully tuned run holds."""
    return ModelSource(str(folder), folder, label, f"model {label}: the run {folder}")


def weight_files(module: Any, tokenizer: Any, tuning: str) -> dict[str, Callable[[Path], Any]]:
    """Files of the trained weights, and what writes each: for `core.artefact.save`.

    Args:
        module: the classifier, in peft's wrapper for `lora`; its `score` must hold the head of row 0.
    """
    if tuning == "frozen":
        return {}
    work = tempfile.TemporaryDirectory(prefix="prlhf-")
    module.save_pretrained(work.name)
    if tuning == "lora":
        without_place(Path(work.name) / "adapter_config.json")
    else:
        tokenizer.save_pretrained(work.name)
    names = sorted(path.name for path in Path(work.name).iterdir() if path.name != "README.md")

    def writer(name: str) -> Callable[[Path], Any]:
        # The folder lives as long as what writes from it.
        return lambda path: shutil.copyfile(Path(work.name) / name, path)

    return {name: writer(name) for name in names}


def without_place(config: Path) -> None:
    """Takes the path of a local base model out of an adapter's configuration: a run may go to other people."""
    content = {**json.loads(config.read_text(encoding="utf-8")), "base_model_name_or_path": None}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

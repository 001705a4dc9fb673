"""FSDP2: what is refused before training, and the whole module that is built of the shards afterwards.

While training runs, parameters are shards (DTensors) that no artefact can be made of.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .backbone import unwrapped
from .pretrained import Backbone


def is_sharded(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled)


def check_sharding(trainer: Any) -> None:
    """Refuses settings of FSDP under which training would not be what was asked for.

    Raises:
        ValueError: names the setting.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed: users' vectors would not be gathered; shard with FSDP2 (recipes/fsdp2.yaml)")
    if not is_sharded(trainer):
        # On CPUs, and with one process, accelerate leaves FSDP out without a word.
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "FSDP was asked for, but accelerate shards nothing here: it needs several processes, each with an "
                "accelerator of its own. Start without the FSDP configuration"
            )
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: must be 2, found {plugin.fsdp_version}; see recipes/fsdp2.yaml")
    kind = getattr(plugin.state_dict_type, "name", str(plugin.state_dict_type))
    if kind != "FULL_STATE_DICT":
        # With an adapter, sharded checkpoints hold LoRA weights alone: users' vectors and the head would be lost.
        raise ValueError(f"fsdp_state_dict_type: must be FULL_STATE_DICT, found {kind}; see recipes/fsdp2.yaml")
    if plugin.cpu_ram_efficient_loading:
        # Only the first process would read the weights that start values and fingerprints are computed from.
        raise ValueError("fsdp_cpu_ram_efficient_loading: must be false; see recipes/fsdp2.yaml")


def whole_module(
    trainer: Any, base: Backbone, load: Callable[..., Backbone], build: Callable[[Backbone], Any]
) -> tuple[Any, Backbone] | None:
    """The trained module built anew around a fresh base model, and that base; None where the process is not the first.

    All processes must call it, because gathering needs each one's shards.

    Args:
        base: what training started from; its own modules are shards by now.
        load: what loaded it.
        build: the personalized module that training starts from, of the fresh base.
    """
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    fresh = replace(load(base.source, str(base.dtype).removeprefix("torch.")), tokenizer=base.tokenizer)
    module = build(fresh)
    module.config = fresh.model.config = unwrapped(trainer.model).config
    if hasattr(trainer.model, "peft_config"):
        from peft import get_peft_model

        module = get_peft_model(module, trainer.model.peft_config["default"])
    module.load_state_dict(state)
    return module, fresh

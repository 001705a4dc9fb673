"""A backbone's layers compiled while it is trained: their many small operations become few."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone import unwrapped

RECOMPILES = 64  # of one layer's code: training and evaluation, with and without a mask, each twice for shapes


@contextmanager
def compiled_layers(module: Any, wanted: bool) -> Iterator[None]:
    """Inside, each layer of a model runs compiled, for any length; afterwards the model is what it was.

    The layers one by one and not the whole model, because they share what is compiled, and because what stands in
    front of them differs from batch to batch. On a CPU attention is compiled with them: PyTorch's own is slow backward
    in bf16 (a quarter of the time of a step). Its memory grows with the square of the length.

    Args:
        module: in the wrappers of peft or not.

    Raises:
        ValueError: the architecture has no layers that can be told apart.
    """
    if not wanted:
        yield
        return
    backbone = unwrapped(module).base_model
    layers = [part for part in backbone.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--compile-layers: {type(backbone).__name__} has no layers that transformers tells apart")
    attention = backbone.config._attn_implementation
    if next(backbone.parameters()).device.type == "cpu":
        backbone.set_attn_implementation("eager")
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
            yield
    finally:
        backbone.set_attn_implementation(attention)
        for layer in layers:
            layer._compiled_call_impl = None

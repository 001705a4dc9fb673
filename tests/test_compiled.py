"""Compiled layers: what they compute, and that nothing of them is left."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import checkerboard
from training import classifier, lora, small_trainer

from prlhf.core.compiled import compiled_layers

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")


@needs_compiler
def test_a_training_with_compiled_layers_is_the_same_training(tmp_path: Path) -> None:
    losses = {}
    for name, wanted in (("plain", False), ("compiled", True)):
        trainer = small_trainer(
            tmp_path / name, checkerboard(4), peft_config=lora(), logging_steps=1, aggregator="soft_prompt"
        )
        with compiled_layers(trainer.model, wanted):
            trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses["plain"]) > 3
    assert losses["compiled"] == pytest.approx(losses["plain"], abs=1e-4)


@needs_compiler
def test_afterwards_the_model_is_what_it_was() -> None:
    model = classifier()
    attention = model.config._attn_implementation
    with compiled_layers(model, True):
        assert model.config._attn_implementation == "eager"
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert model.config._attn_implementation == attention
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_a_model_without_layers_is_refused() -> None:
    class Bare(torch.nn.Linear):
        base_model = property(lambda self: self)

    with pytest.raises(ValueError, match="--compile-layers"), compiled_layers(Bare(2, 2), True):
        pass

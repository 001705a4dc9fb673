"""Fixtures: a tiny random Llama with a byte tokenizer; no test needs a download."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_config
from transformers import LlamaForCausalLM

from prlhf.core.pretrained import Backbone, find_model, load_backbone

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test reads or writes the cache of the person who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["PRLHF_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tiny_model: Path, own_cache: Path) -> Backbone:
    return load_backbone(find_model(str(tiny_model)), "float32", "cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from more threads, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""The example model itself: found, converted, read, and good enough to tell users apart."""

import os
from pathlib import Path

import pytest
import torch
from tiny import checkerboard

from prlhf.core.pretrained import EXAMPLE_MODEL, Backbone, find_model, load_backbone
from prlhf.core.tokenize import RowTokenizer, TextLayout
from prlhf.prm.features import hidden_states
from prlhf.prm.fit import fit_reward_model
from prlhf.prm.head_config import HeadConfig

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """From the person's own cache, where it is already, or fetched where PRLHF_TEST_DOWNLOAD asks for it."""
    models = Path.home() / ".cache" / "prlhf"
    if not any((models / "models").glob("SmolLM2*/config.json")) and not os.environ.get("PRLHF_TEST_DOWNLOAD"):
        pytest.skip(f"{EXAMPLE_MODEL} is not in {models}; set PRLHF_TEST_DOWNLOAD=1 to fetch it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRLHF_CACHE", str(models))
        return load_backbone(find_model(EXAMPLE_MODEL), "bfloat16", "cpu")


def test_source_says_what_it_is(backbone: Backbone) -> None:
    assert backbone.hidden_size == 576
    if "wheel" in backbone.source.origin:
        assert backbone.source.label == "SmolLM2-135M (Q4_1)"
        assert "4-bit" in backbone.source.origin


def test_bfloat16_states_are_near_float32_ones(backbone: Backbone) -> None:
    exact = load_backbone(backbone.source, "float32", "cpu")
    assert exact.fingerprint != backbone.fingerprint
    rows = RowTokenizer(exact.tokenizer).rows(["Why is the sky blue?"] * 2, ["It scatters light.", "Magic!"], ["", ""])
    near, true = hidden_states(backbone, rows), hidden_states(exact, rows)
    assert torch.cosine_similarity(near.flatten(1), true.flatten(1)).min() > 0.99


def test_control_tokens_of_rows_stay_text(backbone: Backbone) -> None:
    tokenizer = RowTokenizer(backbone.tokenizer)
    plain = tokenizer.rows(["Hi"], ["there"], ["me"])[0]
    nasty = tokenizer.rows(["<|im_end|>Hi"], ["<|im_start|>there<|endoftext|>"], ["<|im_end|>me"])[0]
    control = set(backbone.tokenizer.all_special_ids)
    counts = [sum(i in control for i in row.prompt_ids + row.response_ids) for row in (plain, nasty)]
    assert counts[0] == counts[1]


def test_users_on_a_checkerboard(backbone: Backbone) -> None:
    data, held = checkerboard(12), checkerboard(4, first=12)
    model = fit_reward_model(data, held, backbone, TextLayout(), None, HeadConfig())
    ranked = model.rank("Say 99", ["well, 99 it is.", "WOW!!! 99!!!"], ["u0", "u1"])
    assert [ranking.order[0] for ranking in ranked] == [0, 1]

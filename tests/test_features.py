"""Hidden states: the same whatever the batch and the padding, computed once, and kept through a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from prlhf.core.pretrained import Backbone
from prlhf.core.row_cache import RowCache
from prlhf.core.token_rows import batches, row_key
from prlhf.core.tokenize import RowTokenizer, TokenRow
from prlhf.prm import features
from prlhf.prm.features import extract, hidden_states
from prlhf.prm.pooling import POOLINGS


def token_rows(count: int, longest: int = 60) -> list[TokenRow]:
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ids = tuple(int(i) for i in random.integers(0, 256, random.integers(3, longest)))
        made.append(TokenRow(ids[: len(ids) // 2], ids[len(ids) // 2 :]))
    return made


def test_pooling_against_one_row_at_a_time(tiny_backbone: Backbone, tiny_model: Path) -> None:
    """Against the model's own last hidden state without padding, batch or mask."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).model.eval()
    rows = token_rows(12)
    found = hidden_states(tiny_backbone, rows)
    for row, states in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = whole(torch.tensor([row.prompt_ids + row.response_ids])).last_hidden_state[0]
        assert torch.allclose(states[0], alone[-1], atol=1e-5)
        assert torch.allclose(states[1], alone[len(row.prompt_ids) :].mean(0), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_independent_of_batch_size_and_order(tiny_backbone: Backbone, tokens: int) -> None:
    rows = token_rows(20)
    expected = hidden_states(tiny_backbone, rows)
    found = torch.empty_like(expected)
    for batch in batches(rows, tokens):
        assert len(batch) == 1 or max(len(rows[i]) for i in batch) * len(batch) <= tokens
        found[batch] = hidden_states(tiny_backbone, [rows[i] for i in batch])
    assert torch.allclose(found, expected, atol=1e-4)


def test_each_response_is_computed_once(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RowCache(tmp_path, tiny_backbone.hidden_size, POOLINGS)
    calls: list[int] = []
    monkeypatch.setattr(features, "hidden_states", lambda b, rows: calls.append(len(rows)) or hidden_states(b, rows))
    rows = token_rows(6)
    first = extract(tiny_backbone, rows + rows[:3], store, show=False)
    assert sum(calls) == 6
    again = extract(tiny_backbone, rows, RowCache(tmp_path, tiny_backbone.hidden_size, POOLINGS), show=False)
    assert sum(calls) == 6
    assert (first[:6] == again).all()
    assert (first[6:] == first[:3]).all()
    assert torch.allclose(store.gather(again, "mean"), hidden_states(tiny_backbone, rows)[:, 1], atol=1e-5)


def test_key_tells_prompt_from_response() -> None:
    assert row_key(TokenRow((1, 2), (3,))) != row_key(TokenRow((1,), (2, 3)))


def test_store_cut_at_every_byte_keeps_whole_rows(tmp_path: Path) -> None:
    """Whatever a kill leaves of either file, the next writer goes on and no row is wrong."""
    width = 2
    keys = [bytes([i]) * 16 for i in range(4)]
    rows = np.arange(16, dtype=np.float32).reshape(4, 2, width)
    whole = tmp_path / "whole"
    RowCache(whole, width, POOLINGS).append(keys[:3], rows[:3])
    for name in ("keys.bin", "rows.f32"):
        data = (whole / name).read_bytes()
        for cut in range(len(data)):
            folder = tmp_path / f"{name}{cut}"
            folder.mkdir()
            for other in ("keys.bin", "rows.f32"):
                content = (whole / other).read_bytes()
                (folder / other).write_bytes(content[:cut] if other == name else content)
            store = RowCache(folder, width, POOLINGS)
            kept = [key for key in keys[:3] if key in store]
            assert kept == keys[: len(kept)]
            store.append(keys, rows)
            assert np.array_equal(store.gather(store.positions(keys), "mean").numpy(), rows[:, 1])
            assert np.array_equal(
                RowCache(folder, width, POOLINGS).gather(store.positions(keys), "last").numpy(), rows[:, 0]
            )


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    first, second = RowCache(tmp_path, 1, POOLINGS), RowCache(tmp_path, 1, POOLINGS)
    first.append([b"a" * 16], np.full((1, 2, 1), 1.0))
    second.append([b"b" * 16, b"a" * 16], np.array([[[2.0], [2.0]], [[9.0], [9.0]]]))
    first.append([b"c" * 16], np.full((1, 2, 1), 3.0))
    at = first.positions([b"a" * 16, b"b" * 16, b"c" * 16])
    assert first.gather(at, "mean").ravel().tolist() == [1, 2, 3]


def test_killed_extraction_resumes(tiny_model: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of extraction; the next run computes only what is missing."""
    code = f"""
import time
from pathlib import Path
import torch
from test_features import token_rows as some_rows
from prlhf.core.pretrained import find_model, load_backbone
from prlhf.core import token_rows
from prlhf.core.row_cache import RowCache
from prlhf.prm import features
backbone = load_backbone(find_model({str(tiny_model)!r}), "float32", "cpu")
token_rows.TOKENS_PER_BATCH = 64
real = features.hidden_states
features.hidden_states = lambda *a: time.sleep(0.05) or real(*a)
features.extract(backbone, some_rows(60), RowCache(Path({str(tmp_path)!r}), 32, features.POOLINGS), show=False)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    keys = tmp_path / "keys.bin"
    until = time.time() + 60
    while time.time() < until and (not keys.exists() or keys.stat().st_size < 16 * 10):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = len(RowCache(tmp_path, 32, POOLINGS)._index)
    assert 10 <= kept < 60
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert done.returncode == 0
    store = RowCache(tmp_path, 32, POOLINGS)
    assert len(store._index) == 60 == keys.stat().st_size // 16  # nothing twice


def test_over_long_rows_are_cut_to_the_limit() -> None:
    from prlhf.core.tokenize import TextLayout

    tokenizer = RowTokenizer(byte_tokenizer(), TextLayout(max_length=64))
    rows = tokenizer.rows(["p" * 200, "short"], ["r" * 200, "fine"], ["", ""])
    assert len(rows[0]) == 64
    assert rows[0].cut > 0
    assert rows[0].response_ids[-2:] == tokenizer.closing_ids
    assert rows[1].cut == 0

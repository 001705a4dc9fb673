"""Two processes train what one process trains on the joined batches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import KINDS, SECONDS
from safetensors.torch import load_file

each_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, int], Any]]:
    """What each process found, by (processes, rank)."""
    folder = tmp_path_factory.mktemp("processes")
    tests = Path(__file__).parent
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "processes.py"), str(folder)]
    limit = SECONDS + 60
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=limit)
    assert not done.returncode, done.stderr[-2000:]
    found = {
        key: json.loads((folder / f"found-{key[0]}-{key[1]}.json").read_text()) for key in ((2, 0), (2, 1), (1, 0))
    }
    return folder, found


@each_kind
def test_weights_are_those_of_one_process(runs: Any, kind: str) -> None:
    """Also where one process has rows of the unknown user alone, in the second step."""
    folder, found = runs
    seen = [found[key]["trained"][kind]["rows"] for key in ((2, 0), (2, 1), (1, 0))]
    assert seen[0] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert [a + b for a, b in zip(seen[0], seen[1], strict=True)] == seen[2]
    weights = [load_file(folder / f"{kind}-{world}-{rank}.safetensors") for world, rank in ((2, 0), (2, 1), (1, 0))]
    assert weights[0].keys() == weights[2].keys()
    for name, tensor in weights[2].items():
        assert torch.equal(weights[0][name], weights[1][name]), name
        assert torch.allclose(weights[0][name], tensor, rtol=0, atol=1e-6), name
    table = next((tensor for name, tensor in weights[2].items() if name.endswith("offsets.weight")), None)
    if table is not None:
        assert [bool(row.any()) for row in table] == [False] + [kind != "alpha 0"] * 4


@each_kind
def test_validation_is_that_of_one_process(runs: Any, kind: str) -> None:
    """Of nine rows in batches of two, which do not come out even; each row counts once."""
    several, one = runs[1][2, 0]["trained"][kind], runs[1][1, 0]["trained"][kind]
    assert several["margins"]["row"] == one["margins"]["row"] == list(range(9))
    for column in ("user", "margin", "margin_row0"):
        assert several["margins"][column] == pytest.approx(one["margins"][column], abs=1e-5)
    assert several["accuracy"] == one["accuracy"]
    assert several["tokens"] == one["tokens"]
    assert several["complete"] == one["complete"] == "checkpoint-2"


def test_each_process_keeps_its_random_state(runs: Any) -> None:
    names = {path.name for path in (runs[0] / "soft_prompt-2" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= names


@pytest.mark.parametrize("key", [(1, 0), (2, 0), (2, 1)])
def test_a_resumed_run_reads_the_rows_that_come_next(runs: Any, key: tuple[int, int]) -> None:
    """In the middle of an epoch that is not the first, where rows of a prompt come together."""
    found = runs[1][key]["resumed"]
    assert found["steps"] == 1
    assert found["again"] == found["whole"]
    assert found["apart"] <= 1e-6


def test_a_loss_that_is_not_a_number_stops_every_process(runs: Any) -> None:
    told = [runs[1][2, rank]["stopped"] for rank in (0, 1)]
    assert all(text.startswith("step 2: the loss is not a number") for text in told)
    assert "board:" not in told[0]
    assert "in the batch of board:13, board:14, board:15, board:16" in told[1]

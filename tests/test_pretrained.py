"""Where a model comes from, and how long that may take."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prlhf.core.pretrained import choose_dtype, find_model


def test_folder(tiny_model: Path) -> None:
    found = find_model(str(tiny_model))
    assert found.path == tiny_model
    assert "local folder" in found.origin


@pytest.mark.parametrize(("name", "said"), [("./none", "no such folder"), ("no/such-model", "hub did not give it")])
def test_nowhere_to_be_found_says_what_was_tried(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_model(name)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_a_hub_that_never_answers_is_given_up() -> None:
    """A server on loopback that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        code = (
            "from prlhf.core import pretrained; pretrained.HUB_SECONDS = 1\n"
            "try: pretrained.find_model('some/model')\nexcept ValueError as error: print(error)"
        )
        begun = time.time()
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert "hub did not give it" in done.stdout
        assert time.time() - begun < 15


def test_dtype() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("float32", cpu) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    assert choose_dtype("auto", cpu) is (torch.bfloat16 if native else torch.float32)

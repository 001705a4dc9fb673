"""Training on shards (FSDP2): two CPU processes give what one gives, go on from a checkpoint, and refuse what fails.

accelerate leaves FSDP out on CPUs, so the script of the two processes sets the one switch that it does not set. All
that follows is its own FSDP2 code, over gloo.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, checkerboard, tiny_config
from training import lora, small_config
from transformers import LlamaForCausalLM

from prlhf.core.pretrained import find_model, load_backbone
from prlhf.core.tokenize import TextLayout
from prlhf.prm.joint import train_reward_model
from prlhf.prm.reward_model import PersonalizedRewardModel

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [("soft_prompt", "lora"), ("linear_head", "full")]
OPTIONS: dict[str, Any] = {"max_steps": 8, "eval_steps": 2, "save_steps": 2, "save_total_limit": None}

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
stock = AcceleratorState.__init__

def on_cpu_too(self, *args, fsdp_plugin=None, **kwargs):
    stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = on_cpu_too

from transformers import TrainerCallback
from test_fsdp import KINDS, train

class AllSharded(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **_):
        assert all(isinstance(p, DTensor) for p in model.parameters())
        whole, here = (sum(n) for n in zip(*((p.numel(), p.to_local().numel()) for p in model.parameters())))
        assert 0.4 < here / whole < 0.6, (here, whole)

base, out = Path(sys.argv[2]), Path(sys.argv[3])

def run(name, *kind, **config):
    model = train(base, out / name, *kind, batch=4, callbacks=[AllSharded()], **config)
    assert (model is None) == (PartialState().process_index > 0)
    if model is not None:
        model.save_pretrained(out / name)

for kind in KINDS:
    run("-".join(kind), *kind)
    run("again-" + "-".join(kind), *kind, resume_from_checkpoint=str(out / "-".join(kind) / "checkpoint-4"))
torch.distributed.destroy_process_group()
"""

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def train(
    base: Path, run: Path, aggregator: str, tuning: str, batch: int = 8, callbacks: Any = None, **config: Any
) -> PersonalizedRewardModel:
    args = small_config(
        run,
        aggregator=aggregator,
        learning_rate=3e-3,
        user_learning_rate=0.03,
        **{**OPTIONS, "per_device_train_batch_size": batch, **config},
    )
    return train_reward_model(
        checkerboard(16),
        checkerboard(4, first=40),
        load_backbone(find_model(str(base)), "float32", "cpu"),
        TextLayout(),
        args,
        tuning,
        lora() if tuning == "lora" else None,
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(initializer_range=0.2)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, of each kind one from the start and one that goes on from step 4 of 8."""
    out = tmp_path_factory.mktemp("sharded")
    (out / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}"]
    command = [sys.executable, "-m", "torch.distributed.run", *place, str(out / "script.py")]
    environment = {**os.environ, **FSDP, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    own = [str(Path(__file__).parent), str(base), str(out)]
    done = subprocess.run([*command, *own], capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}:{name}": t for path in run.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_what_one_process_gives(base: Path, sharded: Path, tmp_path: Path, kind: tuple[str, str]) -> None:
    alone = train(base, tmp_path / "run", *kind)
    alone.save_pretrained(tmp_path / "run")
    one, two = weights(tmp_path / "run"), weights(sharded / "-".join(kind))
    start = load_backbone(find_model(str(base)), "float32", "cpu").model.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-4), name
        assert tensor.dtype == two[name].dtype
    if kind[1] == "full":
        name = "layers.0.mlp.up_proj.weight"
        moved = next(tensor for key, tensor in two.items() if key.endswith(name)) - start[name]
        assert moved.abs().max() > 1e-3
    facts = [json.loads((run / "prlhf.json").read_text()) for run in (tmp_path / "run", sharded / "-".join(kind))]
    assert facts[0]["files"].keys() == facts[1]["files"].keys()
    assert facts[0]["settings"].keys() == facts[1]["settings"].keys()
    again = PersonalizedRewardModel.from_pretrained(sharded / "-".join(kind))  # checks the hash of the weights
    assert again.module is not None or kind[1] == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_goes_on_from_a_checkpoint(sharded: Path, kind: tuple[str, str]) -> None:
    whole, resumed = weights(sharded / "-".join(kind)), weights(sharded / ("again-" + "-".join(kind)))
    assert whole.keys() == resumed.keys()
    assert not (sharded / ("again-" + "-".join(kind)) / "checkpoint-2").exists()
    for name, tensor in whole.items():
        assert torch.allclose(tensor, resumed[name], atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_checkpoint_is_of_no_use_without_fsdp(base: Path, sharded: Path, kind: tuple[str, str]) -> None:
    folder = sharded / "-".join(kind) / "checkpoint-4"
    with pytest.raises(ValueError, match="written with FSDP, and this run is started without FSDP"):
        train(base, sharded / "other", *kind, resume_from_checkpoint=str(folder))


def test_fsdp_that_accelerate_leaves_out_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="FSDP was asked for, but accelerate shards nothing"):
        train(base, tmp_path, *KINDS[0])

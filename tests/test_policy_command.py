"""`prlhf policy train`: its flags and what becomes of them, a kill, several processes."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import Done, prlhf
from policies import language_model
from policy_processes import FLAGS
from safetensors.torch import load_file
from tiny import byte_tokenizer, checkerboard, write_jsonl
from torch import Tensor

from prlhf.policy.arguments import PolicyArguments
from prlhf.policy.trainer import PersonalizedDPOConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    language_model(folder / "model")
    language_model(folder / "other", seed=1)
    write_jsonl(folder / "t.jsonl", checkerboard(8))
    write_jsonl(folder / "v.jsonl", checkerboard(3, first=40))
    write_jsonl(folder / "test.jsonl", checkerboard(3, first=200))
    return folder


@pytest.fixture
def at(work: Path, tmp_path: Path) -> Path:
    """A folder of its own, with the same model and data in it."""
    for path in work.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def train(folder: Path, *flags: object, run: str = "run", code: int = 0) -> Done:
    return prlhf("policy", "train", *FLAGS, "--output-dir", run, *flags, cwd=folder, code=code)


def settings(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "prlhf.json").read_text())["settings"])


def weights(run: Path) -> dict[str, Tensor]:
    return {
        f"{path.name} {name}": tensor for path in run.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def test_a_policy_is_trained_and_judged(at: Path) -> None:
    learn = ("--max-steps", 40, "--learning-rate", 1e-2, "--eval-steps", 10, "--save-steps", 10)
    done = train(at, *learn)
    said = " ".join(done.stdout.split())
    assert "run: individualized users, sigmoid, lora, model" in said
    assert "4 users" in done.stderr
    assert "running it in float32 on cpu" in done.stderr
    evaluated = json.loads(prlhf("eval", "preference", "run", "--data", "test.jsonl", "--json", cwd=at).stdout)
    assert evaluated["accuracy"]["individualized"]["top"]["value"] == 1.0
    made = settings(at / "run")
    assert (made["tuning"], made["user_tokens"], made["beta"], made["user_learning_rate"]) == ("lora", 3, 0.1, 1e-2)
    assert not made["reference"]["separate"]
    again = train(at, *learn, code=2)
    assert "--output-dir run: holds a run already; give another, or --overwrite" in again.stderr


def test_a_configuration_file_says_the_same(at: Path) -> None:
    """But for what the command line says itself; losses may stand in a list."""
    train(at, "--loss-type", "sigmoid", "sft", "--loss-weights", 1, 0.1, "--beta", 0.3, run="flags")
    given = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True))
    content = {flag[2:].replace("-", "_"): yaml.safe_load(value) for flag, value in given.items()}
    content |= {"output_dir": "nowhere", "loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1], "beta": 0.3}
    (at / "c.yaml").write_text(yaml.safe_dump(content))
    prlhf("policy", "train", "--config", "c.yaml", "--output-dir", "yaml", cwd=at)
    assert settings(at / "yaml") == settings(at / "flags")
    assert (settings(at / "yaml")["loss_type"], settings(at / "yaml")["loss_weights"]) == (["sigmoid", "sft"], [1, 0.1])
    flags, file = weights(at / "flags"), weights(at / "yaml")
    assert flags.keys() == file.keys()
    assert all(torch.equal(tensor, file[name]) for name, tensor in flags.items())
    assert "1 x sigmoid, 0.1 x sft" in (at / "yaml" / "README.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss-type", "sigmoid", "sft", "--loss-weights", 1, 0.1),
        ("--loss-type", "ipo_sum", "--ipo-sum-beta", 0.5),
        ("--loss-type", "ipo_sum"),
        ("--ref-model", "other"),
        ("--precompute-ref-log-probs", "False", "--ref-model", "other"),
        ("--user-place", "after_bos"),
        ("--user-model", "cluster", "--user-clusters", 2),
        ("--user-loss-alpha", 0.9),
    ],
)
def test_flags_change_what_is_trained(at: Path, plain: dict[str, Tensor], flags: tuple[object, ...]) -> None:
    train(at, *flags)
    found = weights(at / "run")
    adapter = [name for name in plain if name.startswith("adapter")]
    assert adapter
    assert not all(torch.equal(plain[name], found[name]) for name in adapter)
    made = settings(at / "run")
    losses = [str(flag) for flag in flags if flag in ("sigmoid", "sft", "ipo_sum")]
    assert made["loss_type"] == (losses or ["sigmoid"])
    assert made["reference"]["separate"] is ("other" in flags)
    assert Path(made["reference"]["name"]).name == ("other" if "other" in flags else "model")


@pytest.fixture(scope="module")
def plain(work: Path) -> dict[str, Tensor]:
    """What is trained without further flags."""
    train(work, run="plain")
    return weights(work / "plain")


def test_help_is_short_and_the_whole_one_complete(work: Path) -> None:
    short, whole = (prlhf("policy", "train", flag, cwd=work).stdout for flag in ("--help", "--help-all"))
    for name in ("loss-type", "loss-weights", "beta", "ref-model", "ipo-sum-beta", "user-tokens", "learning-rate"):
        assert f"--{name} " in short, name
    assert "--adam-beta1" not in short.replace("_", "-")
    assert "--help-all lists them" in " ".join(short.split())
    every = {one.name for kind in (PolicyArguments, PersonalizedDPOConfig) for one in fields(kind) if one.init}
    flags = {name for name in every if f"--{name} " in whole or f"--{name.replace('_', '-')} " in whole}
    assert every - flags == set()
    assert len(short.splitlines()) < len(whole.splitlines()) / 2


LORA = "add --tuning lora"
HUB = "add --push-to-hub"
UNREAD = "not read here"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *((f"--{name} {value}", UNREAD) for name, value in (
            ("truncation-mode", "keep_end"), ("padding-free", "True"), ("precompute-ref-batch-size", "4"),
            ("pad-token", "x"), ("model-init-kwargs", '{"a":1}'),
            ("trust-remote-code", "True"), ("dataset-num-proc", "2"), ("remove-unused-columns", "False"),
            ("label-smoothing-factor", "0.1"), ("hub-strategy", "end"), ("hub-always-push", "True"),
            ("hub-revision", "x"), ("do-train", "True"), ("do-predict", "True"),
        )),
        *((f"--tuning frozen --{name}", LORA) for name in (
            "lora-alpha 8", "lora-dropout 0.1", "lora-target-modules q_proj", "use-rslora True", "use-dora True",
        )),
        ("--tuning full --lora-r 4", LORA),
        ("--lora-dropout 0.1", "add --disable-dropout False"),
        ("--lora-layers 0", "--lora-layers: name the modules too"),
        ("--user-clusters 3", "add --user-model cluster"),
        ("--user-model cluster --user-shared False", "the cluster user model has no e_0"),
        ("--user-loss sampled --user-loss-alpha 1", "changes nothing where --user-loss-alpha is 1"),
        ("--publish-users True", HUB), ("--hub-model-id me/x", HUB), ("--hub-token x", HUB),
        ("--hub-private-repo True", HUB),
        ("--ref-model-mixup-alpha 0.5", "add --sync-ref-model"), ("--ref-model-sync-steps 4", "add --sync-ref-model"),
        ("--ipo-sum-beta 0.5", "--ipo-sum-beta: is of the loss ipo_sum"),
        ("--discopop-tau 0.5", "--discopop-tau: is of the loss discopop"),
        ("--f-alpha-divergence-coef 0.3", "is of --f-divergence-type alpha_divergence"),
        ("--label-smoothing 0.1", "robust, exo_pair, aot and aot_unpaired do"),
        ("--user-model uniform --user-tokens 0 --user-place after_bos", "without user vectors"),
        ("--loss-typ ipo", "Did you mean --loss-type"),
        ("--user-tokens 0", "the uniform user model the only one without vectors"),
        ("--loss-weights 1 2", "must have the same length as `loss_type`"),
        ("--loss-type ipo_sum --ipo-sum-beta -1", "ipo_sum_beta must be above 0"),
        ("--loss-type aot --user-loss sampled", "sorts a batch, so it must be exact"),
        ("--loss-type nonsense", "Unknown loss type: nonsense"),
        ("--ref-model nowhere/x", "nowhere/x: not a folder"),
        ("--config torn.yaml", "not YAML"), ("--config odd.yaml", "Did you mean --loss-type"),
        ("--config none.yaml", "no such file"),
    ],
)  # fmt: skip
def test_flags_that_change_nothing_are_refused(at: Path, flags: str, said: str) -> None:
    (at / "torn.yaml").write_text("model: [x\n")
    (at / "odd.yaml").write_text("loss_typ: ipo\n")
    done = train(at, *flags.split(), code=2)
    assert said in done.stderr
    if said in (UNREAD, LORA, HUB):
        assert f"prlhf: {flags.split()[-2]}: " in done.stderr
    assert not (at / "run" / "prlhf.json").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--sync-ref-model True --precompute-ref-log-probs False",
        "--loss-type ipo --beta 0",
        "--use-liger-kernel True",
    ],
)
def test_what_can_not_be_trained_is_refused_with_a_message(at: Path, flags: str) -> None:
    assert train(at, *flags.split(), code=2).stderr


def test_only_what_is_near_is_named(at: Path) -> None:
    assert "--seed" not in train(at, "--loss-typ", "ipo", code=2).stderr


def test_a_learning_rate_of_frozen_weights_is_refused(at: Path) -> None:
    assert "--user-learning-rate" in train(at, "--tuning", "frozen", "--learning-rate", 3, code=2).stderr


def test_a_run_with_nothing_to_train_is_refused(at: Path) -> None:
    assert train(at, "--tuning", "frozen", "--user-model", "uniform", "--user-tokens", 0, code=2).stderr


def test_a_reference_with_another_tokenizer_is_refused(at: Path) -> None:
    """It would read ids that mean other texts to it."""
    language_model(at / "foreign", seed=1)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["a new token"])
    tokenizer.save_pretrained(at / "foreign")
    assert "tokenizer" in train(at, "--ref-model", "foreign", code=2).stderr


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory, work: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    for name in ("model", "t.jsonl", "v.jsonl"):
        (folder / name).symlink_to(work / name)
    script = Path(__file__).parent / "policy_processes.py"
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PRLHF_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
    return folder, {**json.loads((folder / "found.json").read_text()), "stderr": done.stderr}


def test_the_same_command_goes_on_after_a_kill(processes: tuple[Path, dict[str, Any]]) -> None:
    """To the last bit of what a run gives that nobody killed."""
    folder, found = processes
    assert (found["whole"], found["killed"], found["again"]) == (0, -9, 0)
    assert found["there"] == ["checkpoint-2", "checkpoint-4"]
    assert "left aside: killed/checkpoint-4" in found["stderr"]
    assert "going on from killed/checkpoint-2" in found["stderr"]
    whole, resumed = weights(folder / "whole"), weights(folder / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert settings(folder / "whole")["fingerprint"] == settings(folder / "killed")["fingerprint"]


def test_two_processes_train_what_one_trains(processes: tuple[Path, dict[str, Any]], work: Path) -> None:
    folder, found = processes
    assert found["together"] == [0, 0, 0], found["stderr"][-2000:]
    one, two = weights(folder / "joined-1"), weights(folder / "joined-2")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=0, atol=1e-4), name
    table = one["user_model.safetensors offsets.weight"]
    assert [bool(row.abs().max() > 1e-3) for row in table] == [False, True, True, True, True]
    made = [json.loads((folder / f"joined-{n}" / "prlhf.json").read_text()) for n in (1, 2)]
    assert made[0]["settings"]["batch_size"] == made[1]["settings"]["batch_size"] == 8
    losses = [m["figures"]["validation_log_loss"]["personal"] for m in made]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)

"""`prlhf policy train`, killed and started again, and in two processes (gloo, on the CPU): policy_processes.py FOLDER

The folder holds the model and the data. Every command has a process of its own, forked from this one, which spares it
the seconds that imports take.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from killed import apart, die

from prlhf.cli import main
from prlhf.core import checkpoints

SECONDS = 200  # after which a process that hangs ends itself
FLAGS = [
    *("--data", "t.jsonl", "--eval-data", "v.jsonl", "--model", "model", "--dtype", "float32", "--bf16", "False"),
    *("--gradient-checkpointing", "False", "--user-tokens", "3", "--max-steps", "6"),
    *("--eval-steps", "2", "--save-steps", "2", "--use-cpu", "True", "--disable-tqdm", "True"),
]
KILLED = ["--user-loss", "sampled", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2"]
JOINED = ["--optim", "sgd", "--learning-rate", "0.1", "--user-learning-rate", "0.5", "--max-grad-norm", "0"]


def train(*flags: str) -> None:
    """The command, as in a process that was started for it."""
    signal.alarm(SECONDS)
    sys.argv = ["prlhf", "policy", "train", *FLAGS, *flags]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise


def train_and_die(*flags: str) -> None:
    """The same, killed when the second checkpoint is whole but for its marker."""
    real = checkpoints.mark_complete

    def deadly(folder: Path) -> None:
        if folder.name == "checkpoint-4":
            die()
        real(folder)

    checkpoints.mark_complete = deadly
    train(*flags)


def train_as(rank: int, world: int, port: int) -> None:
    """The same, as one of several processes."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if world > 1:
        os.environ |= {name: str(value) for name, value in found.items()}
    several = ["--ddp-backend", "gloo"] if world > 1 else []
    batch = ["--per-device-train-batch-size", str(8 // world), "--per-device-eval-batch-size", "2"]
    train("--output-dir", f"joined-{world}", *JOINED, *batch, *several)


def together(port: int) -> list[int]:
    """Exit codes of two processes that train together, and of one that trains alone."""
    begun = []
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        pid = os.fork()
        if not pid:
            torch.set_num_threads(1)
            try:
                train_as(rank, world, port)
            except BaseException as error:
                print(f"{rank} of {world}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        begun.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in begun]


def run(folder: Path) -> dict[str, Any]:
    os.chdir(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    again = ("--output-dir", "killed", *KILLED)
    found: dict[str, Any] = {"whole": apart(lambda: train("--output-dir", "whole", *KILLED))}
    found["killed"] = apart(lambda: train_and_die(*again))
    found["there"] = sorted(path.name for path in Path("killed").glob("checkpoint-*"))
    found["again"] = apart(lambda: train(*again))
    return {**found, "together": together(port)}


if __name__ == "__main__":
    import prlhf.policy.train  # noqa: F401  (before it forks)

    found = run(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))

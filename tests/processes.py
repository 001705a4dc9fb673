"""The same training in two processes (gloo, on the CPU) and in one: processes.py FOLDER

All of them are forked from this one, which spares them the seconds that imports take.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import checkerboard
from training import lora, small_trainer

from prlhf.core.checkpoints import newest_complete
from prlhf.core.comparisons import Comparisons, User
from prlhf.core.trainer import TrainingStopped
from prlhf.prm.module import AGGREGATORS

SECONDS = 100  # after which a process that hangs ends itself
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"aggregator": name} for name in AGGREGATORS},
    "clusters": {"aggregator": "soft_prompt", "user_model": "cluster", "user_clusters": 3},
    "alpha 0": {"aggregator": "soft_prompt", "user_loss_alpha": 0.0},
    "lora": {"aggregator": "soft_prompt"},
    "lora heads": {"aggregator": "linear_head"},
}


def rows() -> Comparisons:
    """Sixteen rows; those of the second step that come to the first of two processes are by nobody."""
    made = [replace(row, user=User(None)) if 8 <= i < 12 else row for i, row in enumerate(checkerboard(4))]
    return Comparisons(made, "board")


def trainer_of(folder: Path, world: int, kind: str, **options: Any) -> Any:
    return small_trainer(
        folder,
        options.pop("train", None) or rows(),
        checkerboard(3, users=3, first=40),
        peft_config=lora() if kind.startswith("lora") else None,
        **{
            "ddp_backend": "gloo" if world > 1 else None,
            "train_sampling_strategy": "sequential",
            "per_device_train_batch_size": 8 // world,
            "per_device_eval_batch_size": 2,
            "max_steps": 2,
            "optim": "sgd",
            "learning_rate": 0.05,
            "user_learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_steps": 2,
            **KINDS[kind],
            **options,
        },
    )


def trained(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Two steps of each kind; validation margins, and the rows that were seen."""
    found = {}
    for kind in KINDS:
        run = folder / f"{kind}-{world}"
        trainer = trainer_of(run, world, kind)
        seen = recorded(trainer)
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy_average"]
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(weights, folder / f"{kind}-{world}-{rank}.safetensors")
        found[kind] = {
            "rows": seen,
            "margins": trainer.margins().to_dict("list"),
            "accuracy": accuracy,
            "tokens": trainer._total_train_tokens,
            "complete": (newest_complete(run)[0] or run).name,
        }
    return found


def recorded(trainer: Any) -> list[list[int]]:
    """Rows of every batch that is trained on."""
    seen: list[list[int]] = []
    real = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        if trainer.model.training:
            seen.append(inputs["rows"].tolist())
        return real(model, inputs, *given, **named)

    trainer.compute_loss = compute_loss
    return seen


def resumed(folder: Path, world: int) -> dict[str, Any]:
    """Rows of the last step of a run of seven, and of the same run resumed in the middle of its second epoch."""
    options = {"group_by_prompt": True, "per_device_train_batch_size": 4 // world, "max_steps": 7, "save_steps": 6}
    options |= {"train": checkerboard(4), "user_loss": "sampled", "save_total_limit": 1}
    whole = trainer_of(folder / f"whole-{world}", world, "soft_prompt", **options, save_strategy="no")
    rows_of_whole = recorded(whole)
    whole.train()
    trainer_of(folder / f"again-{world}", world, "soft_prompt", **{**options, "max_steps": 6}).train()
    again = trainer_of(folder / f"again-{world}", world, "soft_prompt", **options)
    rows_of_again = recorded(again)
    again.train(resume_from_checkpoint=True)
    wanted = dict(whole.model.named_parameters())
    apart = max(float((p - wanted[name]).detach().abs().max()) for name, p in again.model.named_parameters())
    return {"whole": rows_of_whole[-1], "again": rows_of_again[-1], "steps": len(rows_of_again), "apart": apart}


def stopped(folder: Path, rank: int) -> str:
    """What a process is told when the last one's loss is not a number."""
    trainer = trainer_of(folder / "stopped", 2, "soft_prompt")
    real = trainer.model.forward

    def poisoned(**given: Any) -> Any:
        out = real(**given)
        if rank == 1 and trainer.state.global_step == 1:
            out.logits = out.logits * float("nan")
        return out

    trainer.model.forward = poisoned
    try:
        trainer.train()
    except TrainingStopped as error:
        return str(error)
    return "nothing"


def worker(folder: Path, rank: int, world: int, port: int) -> None:
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found: dict[str, Any] = {"trained": trained(folder, rank, world), "resumed": resumed(folder, world)}
    if world > 1:
        found["stopped"] = stopped(folder, rank)
    (folder / f"found-{world}-{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = []
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        pid = os.fork()
        if not pid:
            try:
                worker(folder, rank, world, port)
            except BaseException as error:
                print(f"{rank} of {world}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        begun.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in begun]
    if any(codes):
        sys.exit(f"exit codes {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

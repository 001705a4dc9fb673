"""Training runs that kill themselves while a checkpoint is written, and what becomes of them: killed.py FOLDER

Every run has a process of its own, forked from this one, which spares it the seconds that imports take.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.trainer_utils
from safetensors.torch import save_file
from tiny import checkerboard
from training import lora, small_trainer
from transformers import Trainer, TrainerCallback, TrainerState

from prlhf.core import checkpoints
from prlhf.core.checkpoints import newest_complete

STEPS = 6  # two epochs of three
KINDS: dict[str, dict[str, Any]] = {
    "soft": {"aggregator": "soft_prompt", "learning_rate": 1e-2, "user_learning_rate": 0.05},
    "heads": {"aggregator": "linear_head", "group_by_prompt": True, "user_learning_rate": 0.05},
    "full": {"aggregator": "soft_prompt", "user_model": "cluster", "user_clusters": 3, "learning_rate": 1e-3},
}


@dataclass
class Kill:
    """A moment of a checkpoint's writing, the step of the checkpoint, and the step that is left to resume from."""

    moment: str
    step: int = 4
    left: int | None = 2
    kind: str = "soft"

    @property
    def begun(self) -> bool:
        """Whether anything of the checkpoint is there, though it is not complete."""
        return self.left != self.step

    @property
    def name(self) -> str:
        return f"{self.moment.replace(' ', '-')}-{self.step}-{self.kind}"


KILLS = [
    Kill("before the first marker", 2, None),
    Kill("before the weights"),
    Kill("in the weights"),
    Kill("before the users"),
    Kill("in the users"),
    Kill("before the optimizer"),
    Kill("after the optimizer"),
    Kill("in the state"),
    Kill("before the marker"),
    Kill("in the marker"),
    Kill("after the marker", 4, 4),
    Kill("in the rotation", 4, 4),
    Kill("before the marker", 6, 4, "heads"),
    Kill("before the weights", 4, 2, "heads"),
    Kill("before the optimizer", 6, 4, "full"),
]


class Due(TrainerCallback):
    """Whether the checkpoint that is written next is the one to die in."""

    def __init__(self, step: int):
        self.step, self.now = step, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = state.global_step == self.step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def arm(kill: Kill, due: Due) -> None:
    """Replaces one function by one that kills this process when the checkpoint is due."""

    def when_due(owner: Any, name: str, before: bool = True, damage: Callable[..., Any] = lambda *_: None) -> None:
        real = getattr(owner, name)

        def deadly(*given: Any, **named: Any) -> Any:
            if due.now and not before:
                real(*given, **named)
            if due.now:
                damage(*given)
                die()
            return real(*given, **named)

        setattr(owner, name, deadly)

    def half_removed(folder: str, *_: Any) -> None:
        for path in sorted(Path(folder).iterdir())[::2]:
            path.unlink()

    {
        "before the first marker": lambda: when_due(checkpoints, "mark_complete"),
        "before the weights": lambda: when_due(Trainer, "_save"),
        "in the weights": lambda: when_due(
            Trainer, "_save", False, lambda _, folder, *rest: cut(next(Path(folder).glob("*model.safetensors")))
        ),
        "before the users": lambda: when_due(checkpoints, "save_file"),
        "in the users": lambda: when_due(checkpoints, "save_file", False, lambda _, path, *facts: cut(path)),
        "before the optimizer": lambda: when_due(Trainer, "_save_optimizer_and_scheduler"),
        "after the optimizer": lambda: when_due(Trainer, "_save_optimizer_and_scheduler", False),
        "in the state": lambda: when_due(TrainerState, "save_to_json", False, lambda _, path: cut(Path(path))),
        "before the marker": lambda: when_due(checkpoints, "mark_complete"),
        "in the marker": lambda: when_due(Path, "replace", True, lambda new, _: cut(new)),
        "after the marker": lambda: when_due(checkpoints, "rotate_checkpoints"),
        "in the rotation": lambda: when_due(transformers.trainer_utils.shutil, "rmtree", True, half_removed),
    }[kill.moment]()


def train(run: Path, kind: str, kill: Kill | None = None) -> dict[str, torch.Tensor]:
    """Trains, from the newest complete checkpoint where there is one; what was trained."""
    due = Due(kill.step if kill else -1)
    trainer = small_trainer(
        run,
        checkerboard(3),
        peft_config=None if kind == "full" else lora(),
        given={"callbacks": [due]},
        **{
            "user_loss": "sampled",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_steps": 2,
            "save_total_limit": 1,
            **KINDS[kind],
        },
    )
    if kill:
        arm(kill, due)
    trainer.train(resume_from_checkpoint=True)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def apart(work: Callable[[], Any]) -> int:
    """Does something in a forked process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path) -> None:
    for kind in KINDS:
        assert not apart(lambda kind=kind: save_file(train(folder / kind, kind), folder / f"{kind}.safetensors"))
    found = {}
    for kill in KILLS:
        run = folder / kill.name
        code = apart(lambda run=run, kill=kill: train(run, kill.kind, kill))
        complete, problems = newest_complete(run)
        there = sorted(path.name for path in run.glob("checkpoint-*"))
        result = folder / f"{kill.name}.safetensors"
        again = apart(lambda run=run, kill=kill, result=result: save_file(train(run, kill.kind), result))
        found[kill.name] = {
            "code": code,
            "there": there,
            "complete": complete and complete.name,
            "problems": problems,
            "again": again,
            "at the end": sorted(path.name for path in run.glob("checkpoint-*")),
        }
        shutil.rmtree(run)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Checkpoints of a training run: complete, or not there.

A kill between the files of a checkpoint leaves one that transformers would resume from and die. Here a marker with
every file's size is written last, and a run resumes from the newest checkpoint whose marker holds.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints

from .artefact import to_disk
from .backbone import load_personal_state, personal_state

MARK = "complete.json"
BEGUN = "incomplete"  # lies in a checkpoint of ours until its marker does
FACTS = "training.json"
PERSONAL_FILE = "personal.safetensors"


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None; a missing or cut file is named."""
    try:
        sizes = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{folder / MARK}: missing or damaged, so the checkpoint was never finished"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"{folder / name}: {'missing' if found is None else f'{found} bytes, expected {size}'}"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first, complete or not."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("checkpoint-")))


def newest_complete(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what is wrong with each newer one."""
    problems: list[str] = []
    for folder in checkpoints(run):
        wrong = problem(folder)
        if wrong is None:
            return folder, problems
        problems.append(wrong)
    return None, problems


def begin(run: Path, facts: dict[str, str], overwrite: bool, first: bool, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that a command goes on from when it is run again; None where training starts.

    Args:
        facts: everything that training depends on, kept beside the checkpoints.
        overwrite: throw away what is there.
        first: of several processes, the one that writes.

    Raises:
        ValueError: there are checkpoints of other settings; the message names what differs.
    """
    told = run / FACTS
    if checkpoints(run) and not overwrite:
        before = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
        changed = sorted(key for key in {**before, **facts} if before.get(key) != facts.get(key))
        if changed:
            raise ValueError(
                f"{run}: holds checkpoints of other settings ({', '.join(changed[:5])}); give another --output-dir, "
                "the same settings to go on, or --overwrite"
            )
        found, problems = newest_complete(run)
        for problem_of_one in problems:
            say(f"left aside: {problem_of_one}")
        if found:
            say(f"going on from {found}")
        return found
    if first:
        for folder in checkpoints(run):
            shutil.rmtree(folder)
        run.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return None


def mark_complete(folder: Path) -> None:
    """Writes the marker, after everything else is on disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MARK, BEGUN)]
    for path in files:
        to_disk(path)
    new = folder / (MARK + ".new")
    new.write_text(json.dumps({str(path.relative_to(folder)): path.stat().st_size for path in files}, indent=1))
    to_disk(new)
    new.replace(folder / MARK)
    (folder / BEGUN).unlink(missing_ok=True)


def _check_ours(folder: Path) -> None:
    if not (folder / BEGUN).exists() and not (folder / MARK).exists():
        raise ValueError(f"{folder}: written by another program, and this run would write there; give another folder")


def _check_kind(folder: Path, sharded: bool) -> None:
    """Refuses a checkpoint of the other kind: transformers would load it in part, or name a file nobody knows."""
    found = any(folder.glob("pytorch_model_fsdp*"))
    if found != sharded:
        kinds = ("without FSDP", "with FSDP")
        raise ValueError(
            f"{folder}: written {kinds[found]}, and this run is started {kinds[sharded]}; start it as before, or "
            "give another --output-dir"
        )


class CompleteCheckpoints:
    """Goes in front of a trainer of transformers; its checkpoints also hold the users' vectors and the reward head.

    Attributes:
        data_key: of the users and the rows; a checkpoint of other ones is refused, whose vectors are other people's.
    """

    data_key: str = ""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock `train`; True resumes from the newest complete checkpoint, or starts where there is none.

        Raises:
            ValueError: the checkpoint that was named is not complete; the message names the file.
        """
        if resume_from_checkpoint is True:
            found, _ = newest_complete(Path(cast(Any, self).args.output_dir))
            resume_from_checkpoint = str(found) if found else None
        elif resume_from_checkpoint:
            wrong = problem(Path(resume_from_checkpoint))
            if wrong:
                raise ValueError(f"--resume-from-checkpoint: {wrong}")
        if resume_from_checkpoint:
            self._check_data(Path(resume_from_checkpoint))
            _check_kind(Path(resume_from_checkpoint), bool(cast(Any, self).is_fsdp_enabled))
        return cast(Any, super()).train(resume_from_checkpoint, *args, **kwargs)

    def _check_data(self, folder: Path) -> None:
        with safe_open(folder / PERSONAL_FILE, "pt") as file:
            found = (file.metadata() or {}).get("data_key", "")
        if found != self.data_key:
            raise ValueError(f"{folder}: written for other users or other rows; resume with the same data")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        me: Any = self
        run = Path(me._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{me.state.global_step}"
        if me.is_world_process_zero():
            if folder.exists():
                _check_ours(folder)
                shutil.rmtree(folder)  # an unfinished one: resuming starts behind every complete one
            folder.mkdir(parents=True)
            (folder / BEGUN).touch()
        me.accelerator.wait_for_everyone()
        # Older checkpoints are thrown away only after this one is complete, and not by the stock code before that.
        limit, me.args.save_total_limit = me.args.save_total_limit, None
        try:
            cast(Any, super())._save_checkpoint(model, trial)
        finally:
            me.args.save_total_limit = limit
        me.accelerator.wait_for_everyone()
        if me.is_world_process_zero():
            mark_complete(folder)
            for unfinished in (other for other in checkpoints(run) if (other / BEGUN).exists() and problem(other)):
                shutil.rmtree(unfinished)  # or it would count as one of those to keep
            if limit:
                rotate_checkpoints(str(run), limit, me.state.best_model_checkpoint, use_mtime=False)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        me: Any = self
        cast(Any, super())._save(output_dir, state_dict)
        if me.args.should_save:
            folder = Path(output_dir or me.args.output_dir)
            save_file(personal_state(me.model, state_dict), folder / PERSONAL_FILE, {"data_key": self.data_key})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        cast(Any, super())._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_personal(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        me: Any = self
        cast(Any, super())._load_best_model()
        self._load_personal(me.state.best_model_checkpoint)

    def _load_personal(self, folder: str) -> None:
        me: Any = self
        if not me.is_fsdp_enabled:  # a checkpoint of FSDP holds all trained parameters in one file, which is loaded
            load_personal_state(me.model, load_file(Path(folder) / PERSONAL_FILE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint holds users' vectors, which are published only when asked for."""

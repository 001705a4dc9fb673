"""Checkpoints: complete or not there; what a kill, a cut file or a loss that is not a number leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import KILLS, STEPS, Kill
from safetensors.torch import load_file
from tiny import checkerboard
from torch import Tensor, nn
from training import lora, small_trainer
from transformers import TrainerCallback

from prlhf.core.backbone import personal_state
from prlhf.core.checkpoints import BEGUN, MARK, PERSONAL_FILE, begin, checkpoints, newest_complete, problem
from prlhf.core.trainer import TrainingStopped
from prlhf.prm.module import AGGREGATORS

pytestmark = pytest.mark.usefixtures("one_thread")

both = pytest.mark.parametrize("aggregator", AGGREGATORS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All runs that were killed, what each left, and what became of it when it was started again."""
    folder = tmp_path_factory.mktemp("killed")
    tests = Path(__file__).parent
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "killed.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert not done.returncode, done.stderr
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.name)
def test_a_killed_run_goes_on_as_if_nothing_had_been(killed: tuple[Path, dict[str, Any]], kill: Kill) -> None:
    folder, every = killed
    found = every[kill.name]
    assert found["code"] == -9
    assert found["complete"] == (kill.left and f"checkpoint-{kill.left}")
    assert (f"checkpoint-{kill.step}" in found["there"]) is (kill.begun or kill.left == kill.step)
    assert len(found["problems"]) == kill.begun
    assert all(f"checkpoint-{kill.step}" in told for told in found["problems"])
    assert found["again"] == 0
    assert found["at the end"] == [f"checkpoint-{STEPS}"]
    wanted, resumed = (load_file(folder / f"{name}.safetensors") for name in (kill.kind, kill.name))
    assert wanted.keys() == resumed.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(resumed[name], tensor, rtol=0, atol=1e-6), name


def trainer_of(folder: Path, **options: Any) -> Any:
    """A trainer that stops after two of four steps unless told otherwise, and keeps every checkpoint."""
    given = options.pop("given", None)
    peft_config = options.pop("peft_config", None)
    rows = options.pop("rows", None) or checkerboard(4)
    return small_trainer(
        folder,
        rows,
        peft_config=peft_config,
        given=given,
        **{
            "max_steps": 4,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_steps": 2,
            "save_total_limit": None,
            **options,
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer_of(folder, aggregator="soft_prompt", peft_config=lora()).train()
    return folder


def test_files_of_a_checkpoint(run: Path) -> None:
    """The marker lists all of them; users' vectors are in one file of their own, and no card tells of anything."""
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-2"]
    newest = checkpoints(run)[0]
    sizes = json.loads((newest / MARK).read_text())
    assert set(sizes) == {path.name for path in newest.iterdir()} - {MARK}
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", PERSONAL_FILE} <= set(sizes)
    users = load_file(newest / PERSONAL_FILE)
    assert set(users) == {"model.user_model.base", "model.user_model.offsets.weight", "score.weight"}
    assert not [name for name in load_file(newest / "adapter_model.safetensors") if "user_model" in name]


def test_a_whole_models_checkpoint_holds_users_once(tmp_path: Path) -> None:
    trainer_of(tmp_path, aggregator="soft_prompt", max_steps=2).train()
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert "score.weight" in weights
    assert not [name for name in weights if "user_model" in name]


@pytest.mark.parametrize("how", ["missing", "cut", "longer"])
def test_a_damaged_checkpoint_is_told_by_the_file(run: Path, tmp_path: Path, how: str) -> None:
    assert problem(run / "checkpoint-4") is None
    names = sorted(path.name for path in (run / "checkpoint-4").iterdir())
    assert len(names) >= 9
    for name in names:
        if name == MARK and how == "longer":
            continue
        copy = shutil.copytree(run, tmp_path / name)
        path = copy / "checkpoint-4" / name
        if how == "missing":
            path.unlink()
        else:
            size = path.stat().st_size
            os.truncate(path, size // 2 if how == "cut" else size + 1)
        assert str(path) in str(problem(copy / "checkpoint-4"))
        found, problems = newest_complete(copy)
        assert found == copy / "checkpoint-2"
        assert len(problems) == 1
        shutil.rmtree(copy)


def test_a_checkpoint_that_was_named_and_is_damaged_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    os.truncate(copy / "checkpoint-4" / "optimizer.pt", 10)
    trainer = trainer_of(copy, aggregator="soft_prompt", peft_config=lora())
    with pytest.raises(ValueError, match=r"--resume-from-checkpoint: .*checkpoint-4/optimizer\.pt: 10 bytes"):
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"checkpoint-9/complete\.json"):
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-9"))
    trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert problem(copy / "checkpoint-4") is None
    wanted, found = (load_file(folder / "checkpoint-4" / PERSONAL_FILE) for folder in (run, copy))
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-6) for name in wanted)


def test_an_unfinished_checkpoint_of_a_later_step_costs_no_complete_one(run: Path, tmp_path: Path) -> None:
    """As a run leaves that was killed under other `save_steps`, and then saves at steps before that one."""
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoint-2")
    (copy / "checkpoint-4").rename(copy / "checkpoint-100")
    (copy / "checkpoint-100" / MARK).rename(copy / "checkpoint-100" / BEGUN)
    trainer_of(copy, aggregator="soft_prompt", peft_config=lora(), save_total_limit=1).train(True)
    found, _ = newest_complete(copy)
    assert found == copy / "checkpoint-4"


def test_nothing_of_an_unfinished_checkpoint_is_kept(run: Path, tmp_path: Path) -> None:
    """As a cut file of a process that is no longer there."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoint-4" / MARK).rename(copy / "checkpoint-4" / BEGUN)
    (copy / "checkpoint-4" / "rng_state_7.pth").write_bytes(b"cut")
    trainer_of(copy, aggregator="soft_prompt", peft_config=lora()).train(resume_from_checkpoint=True)
    assert problem(copy / "checkpoint-4") is None
    assert not (copy / "checkpoint-4" / "rng_state_7.pth").exists()


def test_checkpoints_of_other_programs_are_left_alone(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for step, kept in ((4, False), (50, True)):
        shutil.rmtree(copy / f"checkpoint-{step}", ignore_errors=True)
        (copy / f"checkpoint-{step}").mkdir()
        (copy / f"checkpoint-{step}" / "model.safetensors").write_text("theirs")
        trainer = trainer_of(copy, aggregator="soft_prompt", peft_config=lora(), save_total_limit=1)
        if kept:
            trainer.train(resume_from_checkpoint=True)
            break
        with pytest.raises(ValueError, match="written by another program"):
            trainer.train(resume_from_checkpoint=True)
        assert (copy / f"checkpoint-{step}" / "model.safetensors").read_text() == "theirs"
        shutil.rmtree(copy / f"checkpoint-{step}")
    assert (copy / "checkpoint-50" / "model.safetensors").read_text() == "theirs"


def test_a_checkpoint_of_other_rows_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    trainer = trainer_of(copy, aggregator="soft_prompt", peft_config=lora())
    trainer.data_key = "other"
    with pytest.raises(ValueError, match="other users or other rows"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_users_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    more = trainer_of(copy, aggregator="soft_prompt", peft_config=lora(), rows=checkerboard(4, users=5))
    with pytest.raises(ValueError, match="do not fit"):
        more.train(resume_from_checkpoint=True)


def test_a_command_goes_on_only_under_the_same_settings(run: Path, tmp_path: Path) -> None:
    copy, facts, said = shutil.copytree(run, tmp_path / "run"), {"seed": "0", "rows": "abc"}, []
    with pytest.raises(ValueError, match="other settings"):
        begin(copy, facts, False, True, said.append)
    assert begin(copy, facts, True, True, said.append) is None
    assert checkpoints(copy) == []
    shutil.copytree(run / "checkpoint-2", copy / "checkpoint-2")
    shutil.copytree(run / "checkpoint-4", copy / "checkpoint-4")
    (copy / "checkpoint-4" / MARK).unlink()
    assert begin(copy, facts, False, True, said.append) == copy / "checkpoint-2"
    assert [line.split(" ")[0] for line in said] == ["left", "going"]
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        begin(copy, {**facts, "seed": "1"}, False, True, said.append)


class Keep(TrainerCallback):
    """Parameters after each step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}


def stopped(trainer: Any, keep: Keep, told: str, step: int) -> None:
    """Training stops in this step, says so, and leaves parameters and checkpoints as they were."""
    with pytest.raises(TrainingStopped, match=f"step {step}: {told}"):
        trainer.train()
    assert trainer.state.global_step == step - 1
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, keep.after[step - 1][name]), name
        assert torch.isfinite(parameter).all()
    folder, problems = newest_complete(Path(trainer.args.output_dir))
    assert folder is not None
    assert (folder.name, problems) == ("checkpoint-2", [])
    saved = load_file(folder / PERSONAL_FILE)
    assert all(torch.equal(saved[name], tensor) for name, tensor in personal_state(trainer.model, saved).items())


def row_of_step(trainer: Any, step: int, place: int, batch: int) -> int:
    """Row of the training data that comes up at a place of a step's batch."""
    order = [row for batch in trainer.get_train_dataloader() for row in batch["rows"].tolist()]
    return order[(step - 1) * batch + place]


@both
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_a_number_stops_training(aggregator: str, accumulation: int, tmp_path: Path) -> None:
    """It names the rows; an accumulated gradient of the micro-batch before is thrown away as well."""
    keep = Keep()
    options = {"group_by_prompt": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of(tmp_path, aggregator=aggregator, given={"callbacks": [keep]}, **options)
    # The last row of step 4's last micro-batch.
    bad = row_of_step(trainer, 4, 2 * accumulation - 1, 2 * accumulation)
    ids = torch.tensor(trainer.train_dataset[bad]["chosen_ids"])
    user = trainer.train_dataset[bad]["user"]
    real = trainer.model.forward

    def poisoned(**given: Any) -> Any:
        out = real(**given)
        here = [
            row
            for row, text in enumerate(given["input_ids"].repeat(len(given["user_ids"]) // len(given["input_ids"]), 1))
            if given["user_ids"][row] == user and torch.equal(text[: len(ids)], ids)
        ]
        out.logits = out.logits.clone()
        out.logits[here] = float("nan")
        return out

    trainer.model.forward = poisoned
    stopped(trainer, keep, f"the loss is not a number, in the batch of .*board:{bad + 1}", 4)


@both
def test_a_users_vector_that_is_not_finite_stops_training(aggregator: str, tmp_path: Path) -> None:
    keep = Keep()

    class Poison(Keep):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                table = next(p for name, p in model.named_parameters() if name.endswith("offsets.weight"))
                with torch.no_grad():
                    table[3] = float("inf")

    trainer = trainer_of(tmp_path, aggregator=aggregator, given={"callbacks": [keep, Poison()]})
    with pytest.raises(TrainingStopped, match=r"step 3: the loss is not a number, in the batch of board:\d+"):
        trainer.train()
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_a_number_stops_training(
    aggregator: str, value: float, clip: float, tmp_path: Path
) -> None:
    """Under a loss that is one, before the update, and whether or not gradients are clipped."""
    keep = Keep()
    trainer = trainer_of(tmp_path, aggregator=aggregator, max_grad_norm=clip, given={"callbacks": [keep]})
    weight = trainer.model.base_model.layers[1].mlp.up_proj.weight

    def poisoned(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed[0, 0] = value if trainer.state.global_step == 2 else changed[0, 0]
        return changed

    weight.register_hook(poisoned)
    stopped(trainer, keep, r"a gradient is not a number, in the batch of .*board:\d+", 3)


def test_places_of_all_micro_batches_of_the_step_are_told(tmp_path: Path) -> None:
    options = {"group_by_prompt": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, **options)
    rows = {row_of_step(trainer, 2, place, 4) for place in range(4)}
    trainer.model.user_model.base.register_hook(lambda g: g * float("nan") if trainer.state.global_step == 1 else g)
    with pytest.raises(TrainingStopped) as told:
        trainer.train()
    assert {f"board:{row + 1}" for row in rows} == {
        word.strip(",;") for word in str(told.value).split() if word.startswith("board:")
    }


@both
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_the_best_step_is_kept(aggregator: str, peft_config: Any, tmp_path: Path) -> None:
    """All of it: users and head, which no stock checkpoint would bring back, and the weights beside them."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
            assert model is not None
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and state.global_step == 5:
                    at_best[name] = parameter.detach().clone()
                    with torch.no_grad():
                        parameter.mul_(-3)
                        parameter.add_(0.5)

    keep, at_best = Keep(), dict[str, Tensor]()
    trainer = trainer_of(
        tmp_path,
        aggregator=aggregator,
        peft_config=peft_config,
        given={"callbacks": [keep, Spoil()]},
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=2,
        learning_rate=1e-3,
        user_learning_rate=0.02,
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert best in (2, 4)
    assert trainer.state.best_global_step == best
    assert {path.name for path in checkpoints(tmp_path)} == {f"checkpoint-{best}", "checkpoint-8"}
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, keep.after[best][name]), name
        if name in at_best and "offsets" not in name:
            assert not torch.equal(parameter, keep.after[8][name]), name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_the_best_step_outlives_a_kill(tmp_path: Path) -> None:
    """A run that resumes knows the best step of the run before."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    small = {"aggregator": "soft_prompt", "peft_config": lora(), **options}
    first = trainer_of(tmp_path, max_steps=8, **small, given={"callbacks": [StopAt(4)]})
    first.train()
    again = trainer_of(tmp_path, max_steps=8, **small)
    again.train(resume_from_checkpoint=True)
    whole = trainer_of(tmp_path / "whole", max_steps=8, **small)
    whole.train()
    assert again.state.best_global_step == whole.state.best_global_step
    wanted = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.allclose(parameter, wanted[name], rtol=0, atol=1e-6), name


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("user_loss", ["exact", "sampled"])
def test_a_run_that_stopped_goes_on_in_the_same_process(user_loss: str, tmp_path: Path) -> None:
    """With the draws of a run that never stopped, and without what was left of the step that was broken off."""
    options = {"aggregator": "soft_prompt", "user_loss": user_loss, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2}
    trainer = trainer_of(tmp_path, **options)
    real, seen = trainer._stop_at_nan, []

    def once(loss: Tensor, rows: Tensor) -> None:
        seen.append(trainer.state.global_step)
        if seen.count(2) == 2:
            trainer._stop_at_nan = real
            raise TrainingStopped("as a NaN would")
        real(loss, rows)

    trainer._stop_at_nan = once
    with pytest.raises(TrainingStopped, match="as a NaN would"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    wanted = dict(whole.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter, wanted[name], rtol=0, atol=1e-6), name

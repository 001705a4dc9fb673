"""The reference, which no user changes, on its four paths, and what is kept of it on disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo import (
    EMPTY,
    PATHS,
    UNSAVED,
    columns,
    language_model,
    on_path,
    randomize,
    response_log_probs,
    small_trainer,
    token_log_probs,
    users_of,
)
from test_alpha_mix import close, loss_of
from tiny import checkerboard
from torch import Tensor
from training import batch_of, own_pad_tokenizer
from transformers import TrainerCallback

from prlhf.core.comparisons import Comparisons, User
from prlhf.core.users import UserIndex
from prlhf.policy import trainer as module
from prlhf.policy.trainer import REFERENCE

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [0, 1, 5, 6, 11, 14]
paths = pytest.mark.parametrize("path", PATHS)
before_or_on_the_fly = pytest.mark.parametrize("precompute", [True, False], ids=["before", "fly"])


def without_reference(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in REFERENCE}


def reference_of(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """What the trainer's reference gives on the fly, (2B,)."""
    found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, without_reference(inputs))
    return torch.cat(found)


@paths
@before_or_on_the_fly
def test_reference_is_the_plain_model_whatever_users_become(path: str, precompute: bool, tmp_path: Path) -> None:
    trainer, plain = on_path(path, tmp_path, precompute_ref_log_probs=precompute, user_model="cluster")
    inputs = batch_of(trainer, ROWS)
    assert (REFERENCE[0] in inputs) is precompute
    with torch.no_grad():
        wanted = response_log_probs(plain, inputs)
    before = reference_of(trainer, inputs)
    assert close(before, wanted, 1e-4)
    if precompute:
        assert close(torch.cat([inputs[key] for key in REFERENCE]), before, 1e-4)
    loss, _ = loss_of(trainer, inputs)
    randomize(trainer.model)
    assert float(loss_of(trainer, inputs)[0]) != pytest.approx(float(loss), abs=1e-3)
    assert torch.equal(reference_of(trainer, inputs), before)


@paths
@before_or_on_the_fly
def test_loss_is_log_2_at_the_start_without_users(path: str, precompute: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {"given": {"ref_model": language_model()}} if path == "model" else {}
    if path == "model":
        trainer: Any = small_trainer(tmp_path, precompute_ref_log_probs=precompute, **EMPTY, **given)
    else:
        trainer, _ = on_path(path, tmp_path, precompute_ref_log_probs=precompute, **EMPTY)
    loss, _ = loss_of(trainer, batch_of(trainer, ROWS))
    assert float(loss) == pytest.approx(0.693147, abs=2e-6)


def test_the_model_itself_is_the_reference_before_it_is_trained_in_full(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, max_steps=2, learning_rate=0.01, **EMPTY, **UNSAVED)
    inputs = batch_of(trainer, ROWS)
    assert float(loss_of(trainer, inputs)[0]) == pytest.approx(0.693147, abs=2e-6)
    trainer.train()
    assert float(loss_of(trainer, inputs)[0]) != pytest.approx(0.693147, abs=1e-3)
    assert torch.equal(batch_of(trainer, ROWS)[REFERENCE[0]], inputs[REFERENCE[0]])
    with pytest.raises(ValueError, match="after training has started"):  # there is no reference any more
        trainer.evaluate(trainer.eval_dataset.remove_columns(list(REFERENCE)))


@pytest.mark.parametrize("path", ["off", "ref"])
@before_or_on_the_fly
def test_training_leaves_the_reference_alone(path: str, precompute: bool, tmp_path: Path) -> None:
    """The adapter that is trained is trained, and users with it, though its copy has been switched on and off."""
    options = {"precompute_ref_log_probs": precompute, "max_steps": 2, "learning_rate": 0.01, **UNSAVED}
    trainer, plain = on_path(path, tmp_path, **options)
    inputs = batch_of(trainer, ROWS)
    state = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    before = reference_of(trainer, inputs)
    trainer.train()
    moved = {name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, state[name])}
    assert moved == {name for name in state if ".default." in name or "user_model" in name}
    assert torch.equal(reference_of(trainer, inputs), before)
    with torch.no_grad():
        assert close(response_log_probs(plain, inputs), before, 1e-4)


@paths
def test_rows_that_come_later_meet_the_same_reference(path: str, tmp_path: Path) -> None:
    trainer, plain = on_path(path, tmp_path, precompute_ref_log_probs=False)
    randomize(trainer.model, 0.1)
    rows = checkerboard(2, first=70)
    later = columns(rows, UserIndex.seen_in(rows.user_ids))
    trainer.evaluate(later)
    inputs = batch_of(trainer, list(range(8)), later)
    with torch.no_grad():
        ids = list(users_of(trainer)(inputs["user_ids"]))
        own = response_log_probs(trainer.model, inputs, ids) - response_log_probs(plain, inputs)
    margins = 0.1 * torch.sub(*own.chunk(2))
    assert close(trainer.margins()["margin"].to_numpy(dtype="float32"), margins, 1e-5)


def test_tokens_of_the_longer_response_weigh_less_in_both(tmp_path: Path) -> None:
    """LD-DPO's weights are in the reference that was computed before, as in the one on the fly."""
    trainer = small_trainer(tmp_path, given={"ref_model": language_model(1)}, ld_alpha=0.5)
    inputs = batch_of(trainer, ROWS)
    before = torch.cat([inputs[key] for key in REFERENCE])
    assert close(reference_of(trainer, inputs), before, 1e-4)
    trainer.ld_alpha = None
    assert (reference_of(trainer, inputs) - before).abs().max() > 1


def test_text_about_the_user_is_the_references_too(tmp_path: Path) -> None:
    rows = checkerboard(4)
    told = Comparisons([replace(r, user=User(r.user.id, f"{r.user.id} likes it so")) for r in rows], rows.source)
    bare, _ = on_path("off", tmp_path, rows)
    trainer, plain = on_path("off", tmp_path, told)
    ids = trainer.train_dataset[1]["prompt_ids"]
    assert "u1 likes it so" in own_pad_tokenizer().decode(ids)
    inside = torch.tensor(ids + trainer.train_dataset[1]["chosen_ids"])
    with torch.no_grad():
        wanted = float(token_log_probs(plain, inside)[len(ids) - 1 :].sum())
    assert trainer.train_dataset[1][REFERENCE[0]] == pytest.approx(wanted, abs=1e-4)
    assert bare.train_dataset[1][REFERENCE[0]] != pytest.approx(wanted, abs=0.1)


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows in the reference's batches; the cache on disk is empty."""
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []
    stock = module.log_probs

    def counted(model: Any, rows: Any, *further: Any) -> Tensor:
        seen.append(len(rows))
        return stock(model, rows, *further)

    monkeypatch.setattr(module, "log_probs", counted)
    return seen


def keyed(folder: Path, key: str = "abc", train: Comparisons | None = None, **config: Any) -> Any:
    return small_trainer(folder, train, given={"ref_model": language_model(1), "reference_key": key}, **config)


def test_the_cache_serves_other_users_losses_and_alphas(tmp_path: Path, computed: list[int]) -> None:
    first = keyed(tmp_path)
    # 4 prompts to train on and 2 to validate, whose two responses are seen by four users each.
    assert sum(computed) == 2 * (4 + 2)
    computed.clear()
    options: dict[str, Any] = {
        "user_loss_alpha": 1.0,
        "loss_type": ["ipo_sum", "apo_zero"],
        "beta": 0.5,
        "label_smoothing": 0.1,
    }
    second = keyed(tmp_path, user_model="cluster", user_tokens=2, **options)
    assert computed == []
    for key in REFERENCE:
        assert second.train_dataset[key][:] == first.train_dataset[key][:]
        assert second.eval_dataset[key][:] == first.eval_dataset[key][:]


def test_the_cache_knows_references_and_tokens_apart(tmp_path: Path, computed: list[int]) -> None:
    keyed(tmp_path)
    computed.clear()
    keyed(tmp_path, train=checkerboard(5))
    assert sum(computed) == 2  # of the fifth prompt
    computed.clear()
    keyed(tmp_path, "abd")
    assert sum(computed) == 12


def test_without_a_key_nothing_is_kept(tmp_path: Path, computed: list[int]) -> None:
    for _ in range(2):
        keyed(tmp_path, "")
    assert sum(computed) == 2 * 2 * (4 + 2)
    assert not (tmp_path / "cache").exists()


def test_under_autocast_the_reference_is_computed_as_the_policy_is(tmp_path: Path) -> None:
    trainer, _ = on_path("off", tmp_path, bf16=True)
    inputs = batch_of(trainer, ROWS)
    before = torch.cat([inputs[key] for key in REFERENCE])
    assert close(reference_of(trainer, inputs), before, 1e-4)


SYNCED: dict[str, Any] = {
    "sync_ref_model": True,
    "ref_model_sync_steps": 1,
    "precompute_ref_log_probs": False,
    "max_steps": 2,
    "learning_rate": 0.01,
    **UNSAVED,
}


class Remembers(TrainerCallback):
    """Weights of the policy at the end of every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in given["model"].named_parameters()})


@pytest.mark.parametrize("mixup", [1.0, 0.25])
def test_the_reference_follows_the_policy_by_name(mixup: float, tmp_path: Path) -> None:
    seen = Remembers()
    given = {"ref_model": language_model(1), "callbacks": [seen]}
    trainer = small_trainer(tmp_path, given=given, ref_model_mixup_alpha=mixup, **SYNCED)
    wanted = {name: tensor.detach().clone() for name, tensor in trainer.ref_model.named_parameters()}
    trainer.train()
    found = dict(trainer.ref_model.named_parameters())
    assert len(seen.states) == 2
    assert any("user_model" in name for name in seen.states[0])
    for state in seen.states:
        wanted = {name: (1 - mixup) * tensor + mixup * state[name] for name, tensor in wanted.items()}
    for name, tensor in wanted.items():
        assert close(found[name], tensor), name
        assert not torch.equal(seen.states[1][name], seen.states[0][name])


def test_a_reference_that_follows_is_not_cached(tmp_path: Path, computed: list[int]) -> None:
    trainer = keyed(tmp_path, **SYNCED)
    trainer.train()
    trainer.evaluate(trainer.eval_dataset)
    fresh = keyed(tmp_path)
    inputs = batch_of(fresh, list(range(8)), fresh.eval_dataset)
    assert close(torch.cat([inputs[key] for key in REFERENCE]), reference_of(fresh, inputs), 1e-4)

"""What training does to users beside a policy, and configurations and data sets that are refused."""

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
    small_config,
    small_trainer,
    users_of,
)
from test_alpha_mix import loss_of, with_strangers
from tiny import checkerboard
from training import batch_of, one_without, own_pad_tokenizer

from prlhf.core.users import UserIndex
from prlhf.policy.trainer import PersonalizedDPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["individualized", "cluster"])
@pytest.mark.parametrize("path", ["model", "off"])
def test_absent_users_get_no_gradient(name: str, path: str, tmp_path: Path) -> None:
    trainer, _ = on_path(path, tmp_path, with_strangers(checkerboard(4), 0, 4, 8), user_model=name)
    randomize(users_of(trainer))
    table = {"individualized": "offsets.weight", "cluster": "logits.weight"}[name]
    for which, present in (([1, 2], {2, 3}), ([0, 5], {2}), ([0, 4, 8], set()), ([3], {4})):
        _, found = loss_of(trainer, batch_of(trainer, which))
        gradient = next(g for key, g in found.items() if key.endswith(table))
        assert {u for u in range(1, 5) if gradient[u].any()} == present
        # The offset of the unknown user is not trained at all; its mixture is, with every batch.
        assert bool(gradient[0].any()) is (name == "cluster")


def test_row_0_keeps_no_offset(tmp_path: Path) -> None:
    rows = with_strangers(checkerboard(4), 0, 4, 8)
    trainer = small_trainer(tmp_path, rows, user_learning_rate=0.1, weight_decay=0.1, max_steps=3, **UNSAVED)
    before = users_of(trainer).row0().detach().clone()
    trainer.train()
    table: Any = users_of(trainer).offsets
    assert not table.weight[0].any()
    assert (table.weight[1:].abs().sum(1) > 0).all()
    assert not torch.equal(users_of(trainer).row0(), before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("chosen", "rate"), [(None, 1e-2), (0.0, 0.0), (0.3, 0.3)])
def test_users_have_an_optimizer_group_of_their_own(path: str, chosen: Any, rate: float, tmp_path: Path) -> None:
    trainer, _ = on_path(path, tmp_path, learning_rate=1e-3, user_learning_rate=chosen, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    own = {id(p) for p in users_of(trainer).parameters()}
    which = [group for group in groups if {id(p) for p in group["params"]} & own]
    assert [{id(p) for p in group["params"]} for group in which] == [own]
    assert (which[0]["lr"], which[0]["weight_decay"]) == (rate, 0.0)
    others = [p for group in groups if group is not which[0] for p in group["params"]]
    assert all(group["lr"] == 1e-3 for group in groups if group is not which[0])
    assert any(group["weight_decay"] == 0.1 for group in groups)
    trained = [id(p) for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(trained) == sorted([id(p) for p in others] + list(own))


@pytest.mark.parametrize("personal", [True, False], ids=["personal", "vanilla"])
def test_a_checkerboard_is_learned_with_users_alone(personal: bool, tmp_path: Path) -> None:
    options = {} if personal else EMPTY
    rates = {"learning_rate": 1e-2, "user_learning_rate": 1e-2, "max_steps": 40}
    trainer, _ = on_path("off", tmp_path, checkerboard(20), **rates, **options, **UNSAVED)
    trainer.train()
    trainer.evaluate()
    table = trainer.margins()
    assert (table["margin"] > 0).mean() == (1.0 if personal else 0.5)
    assert (table["margin_row0"] > 0).mean() == 0.5


def test_rows_are_padded_to_a_multiple(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, pad_to_multiple_of=16)
    assert batch_of(trainer, [0, 1])["input_ids"].shape[1] % 16 == 0


@pytest.mark.parametrize("losses", ["aot", "aot_unpaired", ["sigmoid", "aot"]])
def test_losses_that_sort_a_batch_are_not_sampled(losses: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sampled: the loss aot.* sorts"):
        small_config(tmp_path, loss_type=losses, user_loss="sampled")
    small_config(tmp_path, loss_type=losses)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_a_beta_that_makes_no_sense_is_refused(beta: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ipo_sum_beta"):
        small_config(tmp_path, loss_type="ipo_sum", ipo_sum_beta=beta)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_data_set_without_users_is_refused(which: str, tmp_path: Path) -> None:
    rows = checkerboard(2)
    data = one_without(which, columns(rows, UserIndex.seen_in(rows.user_ids)), "user", "prompt_ids")
    with pytest.raises(ValueError, match=f"{which}: no column prompt_ids, user; make it with `dpo_dataset`"):
        PersonalizedDPOTrainer(language_model(), small_config(tmp_path), **data, processing_class=own_pad_tokenizer())

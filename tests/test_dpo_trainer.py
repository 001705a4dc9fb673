"""What the personalized preference trainer adds to TRL's losses: users, the mix of two losses, ipo_sum."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpo import (
    EMPTY,
    UNSAVED,
    language_model,
    on_path,
    randomize,
    response_log_probs,
    small_config,
    small_trainer,
    uneven,
    users_of,
)
from test_alpha_mix import close, loss_of, with_strangers
from tiny import checkerboard
from torch import Tensor
from torch.nn.functional import logsigmoid
from training import batch_of, own_pad_tokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from prlhf.core.batch_order import LengthSampler
from prlhf.policy.losses import ipo_sum
from prlhf.policy.trainer import PersonalizedDPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [0, 1, 5, 6, 11, 14]  # users u0, u1, u1, u2, u3, u2 of different prompts
STOCK_LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
CASES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    **{name: ({name: 1.0}, {}) for name in STOCK_LOSSES},
    "three": ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}, {}),
    "forward_kl": ({"sigmoid": 1.0}, {"f_divergence_type": "forward_kl"}),
    "js": ({"sigmoid": 1.0}, {"f_divergence_type": "js_divergence"}),
    "alpha": ({"sigmoid": 1.0}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}),
    "ld": ({"sigmoid": 1.0}, {"ld_alpha": 0.5}),
    "weighting": ({"sigmoid": 1.0}, {"use_weighting": True}),
}


def with_losses(trainer: Any, losses: dict[str, float], **changes: Any) -> Any:
    """The same trainer with other losses; whatever is not named is as by default."""
    plain = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0}
    for name, value in {**plain, "use_weighting": False, **changes}.items():
        setattr(trainer, name, value)
    trainer.loss_types, trainer.loss_weights = list(losses), list(losses.values())
    if isinstance(trainer, PersonalizedDPOTrainer):
        trainer.take_further_losses()
    return trainer


class PreTokenized(DPOTrainer):
    """The stock trainer on rows that are tokens already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


@pytest.fixture(scope="module")
def stock_and_ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Any, Any]]:
    """Stock trainer and personalized trainer with the same weights, reference and rows, with weighting or without."""
    made: dict[bool, tuple[Any, Any]] = {}

    def pair(weighting: bool) -> tuple[Any, Any]:
        if weighting not in made:
            folder = tmp_path_factory.mktemp("pair")
            options: dict[str, Any] = {"label_smoothing": 0.1, "use_weighting": weighting}
            ours, _ = on_path("model", folder, uneven(checkerboard(4)), **EMPTY, **options)
            args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, **options)
            bare = ours.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
            further = {"train_dataset": bare, "processing_class": own_pad_tokenizer()}
            made[weighting] = PreTokenized(language_model(), language_model(1), args, **further), ours
        return made[weighting]

    return pair


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_without_users_it_is_stock_training(stock_and_ours: Any, case: str, alpha: float) -> None:
    losses, changes = CASES[case]
    both = stock_and_ours(changes.get("use_weighting", False))
    stock, ours = (with_losses(trainer, losses, **changes) for trainer in both)
    ours.args.user_loss_alpha = alpha
    given, bare = batch_of(ours, ROWS), batch_of(stock, ROWS)
    if case == "ld":  # the columns are of the plain sums
        given = {key: value for key, value in given.items() if not key.startswith("ref_")}
    assert torch.equal(given["input_ids"], bare["input_ids"])
    assert (given["input_ids"] == 258).any()
    wanted, wanted_gradients = loss_of(stock, bare)
    found, found_gradients = loss_of(ours, given)
    assert close(found, wanted)
    assert len(wanted_gradients) == 21
    for name, gradient in wanted_gradients.items():
        assert gradient.abs().max() > 0
        assert close(found_gradients[name] / gradient.abs().max(), gradient / gradient.abs().max(), 1e-4), name


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_is_logged_is_stock_too(stock_and_ours: Any, alpha: float) -> None:
    shown = []
    for trainer in stock_and_ours(False):
        with_losses(trainer, {"sigmoid": 1.0}).args.user_loss_alpha = alpha
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        loss_of(trainer, batch_of(trainer, ROWS))
        shown.append({key: values for key, values in trainer._metrics["train"].items() if "generic" not in key})
    stock, ours = shown
    assert len(stock) == 11
    assert set(ours) == set(stock)
    for key, values in stock.items():
        assert ours[key] == pytest.approx(values, abs=1e-5), key


MIXED = {
    "sigmoid": lambda c, r, _: -logsigmoid(0.1 * (c - r)),
    "ipo": lambda c, r, lengths: (c / lengths[0] - r / lengths[1] - 5) ** 2,
    "ipo_sum": lambda c, r, _: (c - r - 5) ** 2,
}


def ratios(trainer: Any, inputs: dict[str, Any], user_ids: Tensor) -> tuple[Tensor, Tensor]:
    """log pi - log pi_ref of chosen and of rejected responses, (B,) each, one row at a time."""
    own = response_log_probs(trainer.model, inputs, list(users_of(trainer)(user_ids)))
    with torch.no_grad():
        reference = response_log_probs(language_model(1), inputs)
    chosen, rejected = (own - reference).chunk(2)
    return chosen, rejected


def by_hand(name: str, trainer: Any, inputs: dict[str, Any], user_ids: Tensor) -> Tensor:
    lengths = inputs["completion_mask"].sum(1).chunk(2)
    return MIXED[name](*ratios(trainer, inputs, user_ids), lengths).mean()


@pytest.fixture(scope="module")
def personal(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Trainers with users who differ, and a reference of its own."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            rows = with_strangers(uneven(checkerboard(4)), 6)
            folder = tmp_path_factory.mktemp(name)
            made[name], _ = on_path("model", folder, rows, user_model=name, user_clusters=3)
            randomize(users_of(made[name]), 1.0)
        made[name].args.user_loss_alpha, made[name].args.ipo_sum_beta = 0.5, None
        return with_losses(made[name], {"sigmoid": 1.0})

    return get


@pytest.mark.parametrize("user_model", ["individualized", "cluster"])
@pytest.mark.parametrize("loss_type", MIXED)
def test_loss_is_the_mix_of_two_losses(personal: Any, user_model: str, loss_type: str) -> None:
    trainer = with_losses(personal(user_model), {loss_type: 1.0})
    inputs = batch_of(trainer, ROWS)
    assert inputs["user_ids"].tolist() == [1, 2, 2, 0, 4, 3] * 2
    halves, each = [], []
    for user_ids in (inputs["user_ids"], torch.zeros_like(inputs["user_ids"])):
        trainer.model.zero_grad()
        loss = by_hand(loss_type, trainer, inputs, user_ids)
        loss.backward()
        halves.append(loss.detach())
        each.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert abs(float(halves[0] - halves[1])) > 1e-3
    for alpha in (0.0, 0.3, 1.0):
        trainer.args.user_loss_alpha = alpha
        found, gradients = loss_of(trainer, inputs)
        assert close(found, alpha * halves[0] + (1 - alpha) * halves[1], 1e-5)
        assert set(gradients) == set(each[0]) | set(each[1])
        for name, gradient in gradients.items():
            nothing = torch.zeros_like(gradient)
            wanted = alpha * each[0].get(name, nothing) + (1 - alpha) * each[1].get(name, nothing)
            scale = wanted.abs().max().clamp_min(1e-6)
            assert close(gradient / scale, wanted / scale, 1e-4), name


@pytest.mark.parametrize("losses", [{"sigmoid": 1.0}, {"ipo_sum": 1.0, "ipo": 1.0}], ids=["stock", "further"])
def test_one_pass_over_the_model_serves_both_halves(personal: Any, losses: dict[str, float]) -> None:
    trainer = with_losses(personal("individualized"), losses)
    seen: list[int] = []
    hook = trainer.model.base_model.norm.register_forward_hook(lambda *given: seen.append(len(given[2])))
    loss_of(trainer, batch_of(trainer, ROWS))
    hook.remove()
    assert seen == [4 * len(ROWS)]


def test_evaluation_keeps_margins_with_the_user_and_without(personal: Any) -> None:
    trainer = personal("individualized")
    trainer.args.user_loss_alpha = 0.3
    found = trainer.evaluate()
    inputs = batch_of(trainer, list(range(8)), trainer.eval_dataset)
    with torch.no_grad():
        both = [ratios(trainer, inputs, ids) for ids in (inputs["user_ids"], torch.zeros_like(inputs["user_ids"]))]
    margins = [0.1 * (chosen - rejected) for chosen, rejected in both]
    table = trainer.margins()
    assert list(table["user"]) == [1, 2, 3, 4] * 2
    assert close(table["margin"].to_numpy(dtype="float32"), margins[0], 1e-5)
    assert close(table["margin_row0"].to_numpy(dtype="float32"), margins[1], 1e-5)
    losses = [float(-logsigmoid(margin).mean()) for margin in margins]
    assert found["eval_loss"] == pytest.approx(0.3 * losses[0] + 0.7 * losses[1], abs=1e-5)
    right = [float((margin > 0).float().mean()) for margin in margins]
    assert found["eval_rewards/accuracies"] == pytest.approx(right[0])
    assert found["eval_generic/rewards/accuracies"] == pytest.approx(right[1])


def test_ipo_sum_in_numbers() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([-2.0, 3.0, 0.0])
    assert ipo_sum(chosen, rejected, 0.1).tolist() == pytest.approx([4.0, 64.0, 0.0])
    assert ipo_sum(chosen, rejected, 0.5).tolist() == pytest.approx([4.0, 16.0, 16.0])


def test_ipo_sum_has_a_beta_of_its_own_and_adds_to_others(personal: Any) -> None:
    trainer = personal("individualized")
    trainer.args.user_loss_alpha = 1.0
    inputs = batch_of(trainer, ROWS)
    with torch.no_grad():
        delta = torch.sub(*ratios(trainer, inputs, inputs["user_ids"]))
    sigmoid = -logsigmoid(0.1 * delta).mean()
    for beta, wish in ((None, 5.0), (0.05, 10.0), (2.0, 0.25)):
        trainer.args.ipo_sum_beta = beta
        own = ((delta - wish) ** 2).mean()
        alone, _ = loss_of(with_losses(trainer, {"ipo_sum": 1.0}), inputs)
        assert close(alone, own, 1e-4)
        several, _ = loss_of(with_losses(trainer, {"ipo_sum": 0.3, "sigmoid": 0.7}), inputs)
        assert close(several, 0.3 * own + 0.7 * sigmoid, 1e-4)


def test_ipo_sum_weighs_tokens_as_the_stock_losses_do(personal: Any) -> None:
    """Under LD-DPO the ratios behind both are the same, so one is a function of the other."""
    trainer = personal("individualized")
    trainer.args.user_loss_alpha = 1.0
    inputs = {key: value for key, value in batch_of(trainer, [3]).items() if not key.startswith("ref_")}
    found = {}
    for name in ("sigmoid", "ipo_sum"):
        for share in (None, 0.5):
            found[name, share] = float(loss_of(with_losses(trainer, {name: 1.0}, ld_alpha=share), inputs)[0])
    for share in (None, 0.5):
        delta = -np.log(np.expm1(found["sigmoid", share])) / 0.1
        assert found["ipo_sum", share] == pytest.approx((delta - 5) ** 2, rel=1e-3)
    assert found["ipo_sum", 0.5] != pytest.approx(found["ipo_sum", None], rel=1e-2)


@pytest.mark.parametrize(("losses", "weights"), [(["ipo_sum"], None), (["sigmoid", "ipo_sum", "sft"], [1.0, 0.1, 0.5])])
def test_losses_of_the_configuration(losses: list[str], weights: Any, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, loss_type=losses, loss_weights=weights, max_steps=1, **UNSAVED)
    assert trainer.further == [("ipo_sum", 0.1 if weights else 1.0)]
    assert trainer.loss_types == [name for name in losses if name != "ipo_sum"]
    assert trainer.loss_weights == ([1.0, 0.5] if weights else [])
    before = users_of(trainer).row0().detach().clone()
    assert np.isfinite(trainer.train().training_loss)
    assert not torch.equal(users_of(trainer).row0(), before)


class Known:
    """Stands for the model: what it gave for 2B rows with their users and without, by whom it is asked about."""

    def __init__(self, trainer: Any, inputs: dict[str, Any]):
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        ids = inputs["user_ids"]
        with torch.no_grad():
            self.outs = [trainer.model(**given, user_ids=u, fused_lm_head=True) for u in (torch.zeros_like(ids), ids)]

    def __call__(self, user_ids: Tensor, **_: Any) -> FusedCausalLMOutput:
        known, (row0, own) = (user_ids > 0)[:, None], self.outs
        kept = ("log_probs", "entropy", "mean_logits", "is_top1")
        return FusedCausalLMOutput(**{key: torch.where(known, own[key], row0[key]) for key in kept})


def test_sampled_is_exact_on_average(personal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = with_losses(personal("individualized"), {"sigmoid": 1.0, "ipo_sum": 0.01})
    inputs = batch_of(trainer, ROWS)
    model = Known(trainer, inputs)
    trainer.model.train()
    exact = []
    for alpha in (0.0, 1.0):
        trainer.args.user_loss_alpha = alpha
        exact.append(float(trainer.compute_loss(model, dict(inputs))))
    trainer.args.user_loss_alpha = 0.3
    monkeypatch.setattr(trainer.args, "user_loss", "sampled")
    found = []
    for step in range(1500):
        monkeypatch.setattr(trainer.state, "global_step", step)
        found.append(float(trainer.compute_loss(model, dict(inputs))))
    spread = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(0.7 * exact[0] + 0.3 * exact[1], abs=4 * spread)
    assert abs(exact[1] - exact[0]) > 20 * spread


def test_ipo_sum_is_not_silently_unweighted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_weighting"):
        small_config(tmp_path, loss_type="ipo_sum", use_weighting=True)


def test_training_reads_batches_of_like_length(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=4)
    rows = next(iter(trainer.get_train_dataloader()))["rows"]
    assert rows.tolist() == list(LengthSampler(trainer.train_dataset["length"], 4, seed=0))[:4]

"""What the personalized reward trainer adds to TRL's loss: the mix of two losses, its gradients, its groups."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import checkerboard
from torch import Tensor
from training import batch_of, classifier, columns, lora, one_without, own_pad_tokenizer, small_config, small_trainer
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl import RewardConfig, RewardTrainer

from prlhf.core.batch_order import LengthSampler, PromptSampler
from prlhf.core.comparisons import Comparison, Comparisons, User
from prlhf.core.users import UserIndex, UserModel
from prlhf.prm.module import AGGREGATORS
from prlhf.prm.trainer import PersonalizedRewardTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [0, 1, 5, 6, 11, 14]  # users u0, u1, u1, u2, u3, u2 of different prompts
EMPTY = {
    "soft_prompt": {"aggregator": "soft_prompt", "user_model": "uniform", "user_tokens": 0},
    "linear_head": {"aggregator": "linear_head"},
}

both = pytest.mark.parametrize("aggregator", AGGREGATORS)


def with_margins(rows: Comparisons) -> Comparisons:
    made = [replace(row, extra={"margin": 0.1 * (i % 7) - 0.2}) for i, row in enumerate(rows)]
    return Comparisons(made, rows.source)


def with_strangers(rows: Comparisons, *which: int) -> Comparisons:
    """The same rows, some of them by nobody in particular."""
    made = [replace(row, user=User(None)) if i in which else row for i, row in enumerate(rows)]
    return Comparisons(made, rows.source)


def gradients(trainer: Any, loss: Tensor) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return found


def loss_of(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training batch, and all gradients."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    return loss.detach(), gradients(trainer, loss)


def users_of(trainer: Any) -> UserModel:
    inner = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    return inner.base_model.user_model if trainer.args.aggregator == "soft_prompt" else inner.user_model


def randomize(trainer: Any, size: float = 0.3) -> None:
    """Users who differ, and clusters, as after training."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in users_of(trainer).named_parameters():
            parameter += size * torch.randn(parameter.shape, generator=random)
            if name == "offsets.weight":
                parameter[0] = 0


def close(found: Any, wanted: Any, tolerance: float = 1e-6) -> bool:
    return torch.allclose(torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-5, atol=tolerance)


def with_alpha(trainer: Any, alpha: float, center: float | None = None) -> Any:
    trainer.args.user_loss_alpha, trainer.args.center_rewards_coefficient = alpha, center
    return trainer


@pytest.fixture(scope="module")
def stock_pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[Any, Any]]:
    """Stock trainer and personalized trainer of the same start on the same rows."""
    made: dict[tuple[str, bool], tuple[Any, Any]] = {}

    def pair(aggregator: str, margins: bool) -> tuple[Any, Any]:
        if (aggregator, margins) not in made:
            folder = tmp_path_factory.mktemp("pair")
            rows = with_margins(checkerboard(4)) if margins else checkerboard(4)
            options = {"pooling": "last", **EMPTY[aggregator]}
            ours = small_trainer(folder, rows, model=classifier(), **options)
            args = RewardConfig(output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False)
            dataset = ours.train_dataset.remove_columns(ours.user_columns)
            stock = RewardTrainer(classifier(), args, train_dataset=dataset, processing_class=own_pad_tokenizer())
            made[aggregator, margins] = stock, ours
        return made[aggregator, margins]

    return pair


@both
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("center", [None, 0.05])
def test_without_users_it_is_stock_training(
    stock_pairs: Any, aggregator: str, alpha: float, margins: bool, center: float | None
) -> None:
    stock, ours = stock_pairs(aggregator, margins)
    stock.args.center_rewards_coefficient = center
    with_alpha(ours, alpha, center)
    given = batch_of(ours, ROWS)
    bare = batch_of(stock, ROWS)
    assert ("margin" in given) is margins
    assert (given["input_ids"] == 258).any()
    assert torch.equal(given["input_ids"], bare["input_ids"])
    wanted, wanted_gradients = loss_of(stock, bare)
    found, found_gradients = loss_of(ours, given)
    assert close(found, wanted)
    head = wanted_gradients.pop("score.weight")
    own = "user_model.base" if aggregator == "linear_head" else "score.weight"
    assert head.abs().max() > 1e-3
    assert close(found_gradients[own].reshape(-1), head.reshape(-1))
    assert len(wanted_gradients) == 20
    for name, gradient in wanted_gradients.items():
        assert gradient.abs().max() > 0
        assert close(found_gradients[name], gradient), name


def rewards_one_by_one(trainer: Any, inputs: dict[str, Any], user_ids: list[int]) -> Tensor:
    """Rewards (R,) of rows that are run one at a time without padding, vectors joined to the text by hand."""
    model, users = trainer.model, users_of(trainer)
    plain, rewards = model.base_model, []
    for ids, mask, user in zip(inputs["input_ids"], inputs["attention_mask"], user_ids, strict=True):
        text = ids[mask.bool()][None]  # (1, t)
        vector = users(torch.tensor([user]))[0]  # (K, D) or (D,)
        if trainer.args.aggregator == "soft_prompt":
            joined = torch.cat([vector[None], model.get_input_embeddings()(text)], dim=1)  # (1, K + t, D)
            state = plain(inputs_embeds=joined).last_hidden_state[0, -1]
            rewards.append(model.score(state)[0])
        else:
            rewards.append(plain(input_ids=text).last_hidden_state[0, -1] @ vector)
    return torch.stack(rewards)


def stock_loss(trainer: Any, inputs: dict[str, Any], rewards: Tensor) -> Tensor:
    """TRL's loss of rewards that are already there."""
    out = SequenceClassifierOutputWithPast(logits=rewards[:, None])
    return RewardTrainer.compute_loss(trainer, lambda **_: out, dict(inputs))


@both
@pytest.mark.parametrize("name", ["individualized", "cluster"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_is_the_mix_of_two_stock_losses(aggregator: str, name: str, alpha: float, tmp_path: Path) -> None:
    rows = with_margins(with_strangers(checkerboard(4), 6))
    options = {"pooling": "last", "center_rewards_coefficient": 0.02, "user_clusters": 3}
    trainer = small_trainer(tmp_path, rows, aggregator=aggregator, user_model=name, user_loss_alpha=alpha, **options)
    randomize(trainer, 1.0)
    inputs = batch_of(trainer, ROWS)
    assert inputs["user_ids"].tolist() == [1, 2, 2, 0, 4, 3] * 2
    found, found_gradients = loss_of(trainer, inputs)
    losses, each = [], []
    for user_ids in (inputs["user_ids"].tolist(), [0] * 2 * len(ROWS)):
        loss = stock_loss(trainer, inputs, rewards_one_by_one(trainer, inputs, user_ids))
        losses.append(loss.detach())
        each.append(gradients(trainer, loss))
    assert abs(float(losses[0] - losses[1])) > 1e-3
    assert close(found, alpha * losses[0] + (1 - alpha) * losses[1], 1e-5)
    assert set(found_gradients) == set(each[0]) | set(each[1])
    for key in found_gradients:
        nothing = torch.zeros_like(found_gradients[key])
        wanted = alpha * each[0].get(key, nothing) + (1 - alpha) * each[1].get(key, nothing)
        assert close(found_gradients[key], wanted, 1e-5), key


@both
def test_one_pass_over_the_backbone_serves_both_halves(aggregator: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, aggregator=aggregator)
    seen: list[int] = []
    trainer.model.base_model.norm.register_forward_hook(lambda *given: seen.append(len(given[2])))
    loss_of(trainer, batch_of(trainer, ROWS))
    # 12 rows, of which u1 and u3 share one comparison with nobody, and the others read the same texts.
    assert seen == [24 if aggregator == "soft_prompt" else distinct_rows(trainer, ROWS)]


def distinct_rows(trainer: Any, rows: list[int]) -> int:
    return len(np.unique(batch_of(trainer, rows)["input_ids"].numpy(), axis=0))


@both
def test_gradient_checkpointing_changes_nothing(aggregator: str, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        trainer = small_trainer(tmp_path, aggregator=aggregator, gradient_checkpointing=on)
        if on:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        randomize(trainer)
        found.append(loss_of(trainer, batch_of(trainer, ROWS)))
    assert close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert close(gradient, found[1][1][name]), name


class Table:
    """Stands for a model: rewards of 2B rows, with their users and without, and whom it was asked about."""

    def __init__(self, rows: int):
        self.rewards = torch.randn(2, rows, generator=torch.Generator().manual_seed(0))
        self.asked: list[Tensor] = []

    def __call__(self, user_ids: Tensor, **_: Any) -> SequenceClassifierOutputWithPast:
        self.asked.append(user_ids)
        rewards = torch.where(user_ids > 0, self.rewards[1], self.rewards[0])
        return SequenceClassifierOutputWithPast(logits=rewards[:, None])


def sampled(folder: Path, alpha: float = 0.3, **config: Any) -> Any:
    trainer = small_trainer(folder, user_loss="sampled", user_loss_alpha=alpha, **config)
    trainer.model.train()
    return trainer


def draws(trainer: Any, inputs: dict[str, Any], steps: range, micro_batches: int = 1) -> tuple[list[float], Tensor]:
    """Losses of draws, and whom each was about, (n, 2B)."""
    table, losses = Table(len(inputs["user_ids"])), []
    for step in steps:
        trainer.state.global_step = step
        losses += [float(trainer.compute_loss(table, dict(inputs))) for _ in range(micro_batches)]
    return losses, torch.stack(table.asked)


def test_sampled_is_exact_on_average(tmp_path: Path) -> None:
    trainer = sampled(tmp_path)
    inputs = batch_of(trainer, ROWS)
    losses, asked = draws(trainer, inputs, range(2000))
    assert torch.equal(asked[:, : len(ROWS)], asked[:, len(ROWS) :])  # both rows of a comparison
    assert ((asked == inputs["user_ids"]) | (asked == 0)).all()
    known = (asked > 0).float()
    assert float(known.mean()) == pytest.approx(0.3, abs=0.02)
    together = torch.corrcoef(known[:, : len(ROWS)].T)
    assert (together - torch.eye(len(ROWS))).abs().max() < 0.1  # each comparison by itself
    rewards = Table(len(inputs["user_ids"])).rewards
    exact = [float(stock_loss(trainer, inputs, part)) for part in rewards]
    spread = np.std(losses) / np.sqrt(len(losses))
    assert np.mean(losses) == pytest.approx(0.3 * exact[1] + 0.7 * exact[0], abs=4 * spread)
    assert abs(exact[1] - exact[0]) > 20 * spread


def test_a_draw_is_known_from_seed_step_and_micro_batch(tmp_path: Path) -> None:
    inputs = batch_of(sampled(tmp_path), ROWS * 4)
    first = draws(sampled(tmp_path), inputs, range(3), 2)[1]
    assert torch.equal(first, draws(sampled(tmp_path), inputs, range(3), 2)[1])
    assert torch.equal(first[2:], draws(sampled(tmp_path), inputs, range(1, 3), 2)[1])  # as a resumed run draws
    assert len({tuple(row.tolist()) for row in first}) == 6
    other = draws(sampled(tmp_path, seed=1), inputs, range(3), 2)[1]
    assert not torch.equal(first, other)
    neighbour = sampled(tmp_path)
    neighbour.accelerator = SimpleNamespace(
        **{n: getattr(neighbour.accelerator, n) for n in ("gather", "gather_for_metrics", "parallelism_config")},
        process_index=1,
    )
    assert not torch.equal(first, draws(neighbour, inputs, range(3), 2)[1])


def test_draws_do_not_depend_on_what_was_trained_before(tmp_path: Path) -> None:
    """A trainer that stopped within a step and resumes in the same process draws what a fresh process draws."""
    trainer = sampled(tmp_path)
    inputs = batch_of(trainer, ROWS * 4)
    trainer.state.global_step = 0
    trainer.compute_loss(Table(len(inputs["user_ids"])), dict(inputs))  # of a step that was not finished
    found = []
    taken = trainer._drawn
    trainer._drawn = lambda ids: found.append(taken(ids)) or found[-1]
    trainer.args.max_steps = 1
    trainer.train()
    again = sampled(tmp_path)
    wanted: list[Tensor] = []
    other = again._drawn
    again._drawn = lambda ids: wanted.append(other(ids)) or wanted[-1]
    again.args.max_steps = 1
    again.train()
    assert torch.equal(torch.stack(found), torch.stack(wanted))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_evaluation_is_exact(alpha: float, tmp_path: Path) -> None:
    """Validation rows are judged with the user and without, whatever training draws and however it weighs."""
    trainer = sampled(tmp_path, alpha)
    randomize(trainer)
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.evaluate()
        inputs = batch_of(trainer, list(range(8)), trainer.eval_dataset)
        rewards = [
            trainer.model(**{k: v for k, v in inputs.items() if k != "user_ids"}, user_ids=ids).logits[:, 0]
            for ids in (inputs["user_ids"], torch.zeros_like(inputs["user_ids"]))
        ]
    losses = [float(stock_loss(trainer, inputs, part)) for part in rewards]
    assert found["eval_loss"] == pytest.approx(alpha * losses[0] + (1 - alpha) * losses[1], abs=1e-5)
    table = trainer.margins()
    margins = [torch.sub(*part.chunk(2)).numpy() for part in rewards]
    assert list(table["row"]) == list(range(8))
    assert list(table["user"]) == [1, 2, 3, 4] * 2
    assert np.allclose(table["margin_row0"], margins[1], atol=1e-5)
    assert np.allclose(table["margin"], margins[0], atol=1e-5)


def test_margins_are_those_of_the_rows_that_were_evaluated(tmp_path: Path) -> None:
    """Of other rows than the trainer's own validation rows, too."""
    rows = checkerboard(4)
    trainer = small_trainer(tmp_path, rows)
    other = checkerboard(5, first=60)
    other.rows.reverse()
    trainer.evaluate(columns(other, UserIndex.seen_in(rows.user_ids)))
    assert list(trainer.margins()["user"]) == [4, 3, 2, 1] * 5
    trainer.evaluate(trainer.eval_dataset.select(range(4, 8)))
    assert list(trainer.margins()["user"]) == [1, 2, 3, 4]


def test_trls_limit_leaves_no_row_out(tmp_path: Path) -> None:
    """TRL would drop rows over its own `max_length` in silence; the layout's policy has met them already."""
    validation = checkerboard(2, first=40)
    validation.rows[0] = replace(validation[0], chosen=validation[0].chosen * 20)
    trainer = small_trainer(tmp_path, checkerboard(4), validation, max_length=120)
    assert len(trainer.eval_dataset) == 8
    trainer.evaluate()
    assert list(trainer.margins()["user"]) == [1, 2, 3, 4, 1, 2, 3, 4]


@both
@pytest.mark.parametrize("name", ["individualized", "cluster"])
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_absent_users_get_no_gradient(aggregator: str, name: str, peft_config: Any, tmp_path: Path) -> None:
    rows = with_strangers(checkerboard(4), 0, 4, 8)
    trainer = small_trainer(tmp_path, rows, peft_config=peft_config, aggregator=aggregator, user_model=name)
    randomize(trainer)
    table = {"individualized": "offsets.weight", "cluster": "logits.weight"}[name]
    for which, present in (([1, 2], {2, 3}), ([0, 5], {2}), ([0, 4, 8], set()), ([3], {4})):
        _, found = loss_of(trainer, batch_of(trainer, which))
        gradient = next(g for key, g in found.items() if key.endswith(table))
        assert {u for u in range(1, 5) if gradient[u].any()} == present
        # The offset of the unknown user is not trained at all; its mixture is, with every batch.
        assert bool(gradient[0].any()) is (name == "cluster")


@both
def test_row_0_keeps_no_offset(aggregator: str, tmp_path: Path) -> None:
    rows = with_strangers(checkerboard(4), 0, 4, 8)
    options = {"user_learning_rate": 0.1, "weight_decay": 0.1, "max_steps": 3}
    trainer = small_trainer(tmp_path, rows, aggregator=aggregator, **options)
    before = users_of(trainer).row0().detach().clone()
    trainer.train()
    table = users_of(trainer).offsets.weight
    assert not table[0].any()
    assert (table[1:].abs().sum(1) > 0).all()
    assert not torch.equal(users_of(trainer).row0(), before)


@both
def test_without_e0_rows_stand_alone(aggregator: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, aggregator=aggregator, user_shared=False)
    _, found = loss_of(trainer, batch_of(trainer, [1, 2]))
    gradient = next(g for key, g in found.items() if key.endswith("offsets.weight"))
    assert [bool(g.any()) for g in gradient] == [True, False, True, True, False]


@both
def test_one_cluster_is_uniform(aggregator: str, tmp_path: Path) -> None:
    options = {"aggregator": aggregator, "user_clusters": 1}
    clusters = small_trainer(tmp_path, user_model="cluster", **options)
    uniform = small_trainer(tmp_path, user_model="uniform", **options)
    with torch.no_grad():
        users_of(clusters).centres.copy_(users_of(uniform).base.reshape(1, -1))
    inputs = batch_of(uniform, ROWS)
    found, wanted = loss_of(clusters, inputs), loss_of(uniform, inputs)
    assert close(found[0], wanted[0])
    own = next(g for key, g in found[1].items() if key.endswith("centres"))
    base = next(g for key, g in wanted[1].items() if key.endswith("base"))
    assert close(own.reshape(-1), base.reshape(-1))
    assert close(found[1]["model.norm.weight"], wanted[1]["model.norm.weight"])


@both
def test_metrics_are_the_users_and_beside_them_row_0s(aggregator: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, aggregator=aggregator)
    randomize(trainer)
    inputs = batch_of(trainer, ROWS)
    shown = {}
    for alpha in (0.0, 0.5, 1.0):
        with_alpha(trainer, alpha)
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        for _ in range(2):
            loss_of(trainer, inputs)
        shown[alpha] = {key: list(values) for key, values in trainer._metrics["train"].items()}
        assert trainer._total_train_tokens == 2 * int(inputs["attention_mask"].sum())
        assert shown[alpha]["num_tokens"] == [trainer._total_train_tokens]
    mixed = shown[0.5]
    stock = {"num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin"}
    assert set(mixed) == stock | {"generic/accuracy", "generic/margin"}
    for key in stock - {"num_tokens"}:
        assert len(mixed[key]) == 2
        assert mixed[key] == pytest.approx(shown[1.0][key], abs=1e-6), key
    for key in ("accuracy", "margin"):
        assert mixed[f"generic/{key}"] == pytest.approx(shown[0.0][key], abs=1e-6)
    assert mixed["generic/margin"] != pytest.approx(mixed["margin"], abs=1e-4)


@both
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_users_have_an_optimizer_group_of_their_own(aggregator: str, peft_config: Any, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-3, "user_learning_rate": 0.02, "weight_decay": 0.1}
    trainer = small_trainer(tmp_path, peft_config=peft_config, aggregator=aggregator, **options)
    groups = trainer.create_optimizer().param_groups
    own = {id(p) for p in users_of(trainer).parameters()}
    which = [group for group in groups if {id(p) for p in group["params"]} & own]
    assert len(which) == 1
    assert {id(p) for p in which[0]["params"]} == own
    assert (which[0]["lr"], which[0]["weight_decay"]) == (0.02, 0.0)
    others = [p for group in groups if group is not which[0] for p in group["params"]]
    assert all(group["lr"] == 1e-3 for group in groups if group is not which[0])
    assert any(group["weight_decay"] == 0.1 for group in groups)
    trained = [id(p) for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(trained) == sorted([id(p) for p in others] + list(own))
    score = next(p for name, p in trainer.model.named_parameters() if name.endswith("score.weight"))
    assert score.requires_grad is (aggregator == "soft_prompt")


@both
def test_default_learning_rate_of_users(aggregator: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, aggregator=aggregator)
    wanted = {"soft_prompt": 1e-2, "linear_head": 1e-3}[aggregator]
    assert trainer.create_optimizer().param_groups[-1]["lr"] == wanted
    still = small_trainer(tmp_path, aggregator=aggregator, user_learning_rate=0.0)
    assert still.create_optimizer().param_groups[-1]["lr"] == 0


def test_an_optimizer_that_was_given_is_left_alone(tmp_path: Path) -> None:
    model = classifier()
    mine = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = small_trainer(tmp_path, model=model, given={"optimizers": (mine, None)})
    before = [list(group["params"]) for group in mine.param_groups]
    assert trainer.create_optimizer() is mine
    assert len(mine.param_groups) == 1
    assert all(a is b for a, b in zip(before[0], mine.param_groups[0]["params"], strict=True))


def test_a_batch_without_users_is_refused(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    inputs = batch_of(trainer, ROWS)
    del inputs["user_ids"]
    with pytest.raises(ValueError, match="user_ids"):
        trainer.compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_data_set_without_users_is_refused(which: str, tmp_path: Path) -> None:
    rows = checkerboard(2)
    data = one_without(which, columns(rows, UserIndex.seen_in(rows.user_ids)), "user", "chosen_start")
    with pytest.raises(ValueError, match=f"{which}: no column chosen_start, user;.*reward_dataset"):
        PersonalizedRewardTrainer(classifier(), small_config(tmp_path), **data, processing_class=own_pad_tokenizer())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"user_loss_alpha": 1.5}, "user_loss_alpha"),
        ({"user_tokens": -1}, "user_tokens"),
        ({"user_clusters": 0}, "user_clusters"),
        ({"user_learning_rate": float("nan")}, "user_learning_rate"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        small_config(tmp_path, **wrong)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_linear_head_runs_equal_rows_once(pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer(tmp_path, pooling=pooling, pad_to_multiple_of=16)
    randomize(trainer)
    seen: list[int] = []
    trainer.model.base_model.norm.register_forward_hook(lambda *given: seen.append(len(given[2])))
    inputs = batch_of(trainer, [0, 1, 2, 3, 5])
    once = loss_of(trainer, inputs)
    monkeypatch.setattr(type(trainer.model), "_pooled_once", type(trainer.model)._pooled)
    each = loss_of(trainer, inputs)
    assert seen == [4, 10]  # two responses of each of two prompts
    assert close(once[0], each[0])
    assert once[1].keys() == each[1].keys()
    for name, gradient in each[1].items():
        assert close(once[1][name], gradient), name


def test_equal_tokens_with_another_response_are_two_rows_under_mean_pooling(tmp_path: Path) -> None:
    """Where the response begins is part of what makes rows equal."""
    trainer = small_trainer(tmp_path, pooling="mean")
    inputs = batch_of(trainer, [0, 0])
    inputs["completion_mask"][0, : int(inputs["attention_mask"][0].sum()) - 3] = 0
    with torch.no_grad():
        rewards = trainer.model(**inputs).logits[:, 0]
    assert float(rewards[0] - rewards[1]) != pytest.approx(0, abs=1e-4)
    assert rewards[2] == rewards[3]


def test_prompt_sampler() -> None:
    prompts = [3, 0, 1, 0, 2, 3, 3, 1, 0, 4]
    sampler = PromptSampler(prompts, seed=7)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert orders[-1] == list(sampler)
        assert sorted(orders[-1]) == list(range(10))
        seen = [prompts[row] for row in orders[-1]]
        assert sum(a != b for a, b in pairwise(seen)) == 4  # rows of a prompt are neighbours
    assert len(sampler) == 10
    assert len({tuple(order) for order in orders}) == 4
    again = PromptSampler(prompts, seed=7)
    again.set_epoch(2)
    assert list(again) == orders[2]
    assert list(PromptSampler(prompts, seed=8)) != orders[0]
    firsts = {tuple(row for row in order if prompts[row] == 0) for order in orders}
    assert len(firsts) > 1  # also within a prompt


def test_length_sampler() -> None:
    """Batches of like length in random order: neither from long to short nor the same in every epoch."""
    lengths = np.random.default_rng(0).integers(5, 500, 203)
    sampler = LengthSampler(lengths, 4, seed=7)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(203))
        batches = [lengths[orders[-1][start : start + 4]] for start in range(0, 200, 4)]
        assert np.mean([np.ptp(batch) for batch in batches]) < 15
        assert abs(np.corrcoef([batch.mean() for batch in batches], range(50))[0, 1]) < 0.3
    assert len({tuple(order) for order in orders}) == 3
    again = LengthSampler(lengths, 4, seed=7)
    again.set_epoch(2)
    assert list(again) == orders[2]


def test_training_reads_batches_of_like_length(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=4)
    rows = iter(trainer.get_train_dataloader())
    assert isinstance(trainer.sampler, LengthSampler)
    assert next(rows)["rows"].tolist() == list(trainer.sampler)[:4]


def test_prompts_stay_together_in_the_trainers_batches(tmp_path: Path) -> None:
    """The loader hands the number of the epoch on, and a batch of four rows is one prompt's."""
    rows = checkerboard(6)
    random = np.random.default_rng(0).permutation(len(rows))
    shuffled = Comparisons([rows[i] for i in random], rows.source)
    options = {"group_by_prompt": True, "per_device_train_batch_size": 4}
    trainer = small_trainer(tmp_path, shuffled, **options)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([batch["rows"].tolist() for batch in loader])
        assert all(len({shuffled[row].prompt for row in batch}) == 1 for batch in epochs[-1])
    assert epochs[0] != epochs[1]
    assert sorted(chain(*epochs[0])) == list(range(len(rows)))


def test_collator_marks_responses(tmp_path: Path) -> None:
    rows = Comparisons([Comparison(User("a"), "p", "xyz", "y"), Comparison(User("b"), "longer", "z", "zz")], "two")
    trainer = small_trainer(tmp_path, rows, pad_to_multiple_of=8)
    batch = batch_of(trainer, [0, 1])
    tokenizer = own_pad_tokenizer()
    assert batch["completion_mask"].shape == batch["input_ids"].shape
    assert batch["input_ids"].shape[1] % 8 == 0
    texts = [
        tokenizer.decode(ids[m.bool()]) for ids, m in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert texts == [f"{text}<|im_end|>\n" for text in ("xyz", "z", "y", "zz")]
    assert batch["user_ids"].tolist() == [1, 2, 1, 2]
    assert batch["rows"].tolist() == [0, 1]

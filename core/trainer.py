"""What every personalized trainer adds to a trainer of TRL: the alpha mix, the users' learning rate, a stop at NaN.

`alpha * loss(with the user) + (1 - alpha) * loss(user unknown)` on the same comparisons (Remark 4.1 of the paper). No
loss is written here: the trainer's own `compute_loss` runs on each half of one forward pass.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback

from .backbone import is_personal, is_user, unwrapped
from .batch_order import LengthSampler, RowSampler, TellsSampler


class TrainingStopped(ValueError):
    """A loss or gradient that is not a number; the last complete checkpoint is as it was."""


class AlphaMix:
    """Goes in front of a trainer of TRL whose batches hold `user_ids` (2B,) and `rows` (B,).

    Attributes:
        user_columns: columns of the data set that the collator needs beside TRL's.
        generic_metrics: of the row-0 half, kept as `generic/...`.
        places: row -> where it came from, for messages.
    """

    user_columns: tuple[str, ...] = ("user", "row")
    generic_metrics: tuple[str, ...] = ()
    places: Callable[[int], str] = str
    sampler: RowSampler | None = None
    _draws: tuple[int, int] = (-1, 0)  # step, micro-batches of it
    _rows_of_step: tuple[int, list[int]] = (-1, [])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # A run that stopped within a step and goes on in the same process counts that step's batches anew.
        self._draws, self._rows_of_step = (-1, 0), (-1, [])
        return cast(Any, super()).train(*args, **kwargs)

    def check_columns(self, maker: str, **datasets: Any) -> None:
        """Refuses a data set that is there and lacks a column.

        Raises:
            ValueError: names the data set, the columns, and the function that makes them.
        """
        for name, given in datasets.items():
            missing = {"chosen_ids", "rejected_ids", *self.user_columns} - set(given.column_names if given else ())
            if given is not None and missing:
                raise ValueError(f"{name}: no column {', '.join(sorted(missing))}; make it with `{maker}`")

    def begin(self, personal: list[Any]) -> None:
        """After the stock constructor: users and head are trained though peft has frozen whatever is not its own."""
        for parameter in personal:
            parameter.requires_grad_(parameter.numel() > 0)
        cast(Any, self).add_callback(StopAtBadGradient(self))
        cast(Any, self).add_callback(TellsSampler(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        me: Any = self
        seed = me.args.seed if me.args.data_seed is None else me.args.data_seed
        self.sampler = self.row_order(me.train_dataset if train_dataset is None else train_dataset, seed)
        return cast(Any, super())._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def row_order(self, rows: Any, seed: int) -> RowSampler | None:
        """Order of the training rows; None for that of transformers."""
        args = cast(Any, self).args
        if args.train_sampling_strategy != "group_by_length":
            return None
        return LengthSampler(rows["length"], args.train_batch_size * args.gradient_accumulation_steps, seed)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Nothing: rows are tokenized, and the length policy has met them; TRL would drop some in silence."""
        return dataset

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("push the finished run, with `push_to_hub` of prlhf, which leaves users' data out")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card of the finished run says what TRL's can't."""

    def _set_signature_columns_if_needed(self) -> None:
        me: Any = self
        cast(Any, super())._set_signature_columns_if_needed()
        me._signature_columns += [c for c in self.user_columns if c not in me._signature_columns]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The alpha mix of the stock loss; in evaluation always both halves, whatever training draws."""
        me: Any = self
        inputs = dict(inputs)
        if "user_ids" not in inputs:
            raise ValueError("no user_ids in the batch: give the trainer its own collator (0 is the unknown user)")
        rows = inputs.pop("rows", None)
        training, alpha = me.model.training, me.args.user_loss_alpha
        if training and me.args.user_loss == "sampled":
            inputs["user_ids"], alpha = self._drawn(inputs["user_ids"]), 1.0
        elif training and not alpha:
            inputs["user_ids"] = torch.zeros_like(inputs["user_ids"])
        if training and alpha in (0.0, 1.0):
            found = cast(Any, super()).compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, halves = (found[0], [found[1]]) if return_outputs else (found, [])
        else:
            loss, halves = self._mixed(model, inputs, alpha, num_items_in_batch)
        if training:
            self._stop_at_nan(loss, rows)
        elif rows is not None:
            self.record(rows, inputs, halves)
        return (loss, halves[0]) if return_outputs else loss

    def _mixed(self, model: Any, inputs: dict[str, Any], alpha: float, items: Any) -> tuple[Tensor, list[Any]]:
        me, stock = cast(Any, self), cast(Any, super())
        mode = "train" if me.model.training else "eval"
        pass_of_both = _OnePass(model, self.double)
        own = stock.compute_loss(pass_of_both.half(0), inputs, False, items)
        # What the stock code records of the second half is put aside, and its tokens are not counted again.
        kept, tokens = me._metrics[mode], me._total_train_tokens
        generic: dict[str, list[float]] = defaultdict(list)
        me._metrics[mode] = generic
        unknown = {**inputs, "user_ids": torch.zeros_like(inputs["user_ids"])}
        row0 = stock.compute_loss(pass_of_both.half(1), unknown, False, items)
        me._metrics[mode], me._total_train_tokens = kept, tokens
        for key in self.generic_metrics:
            kept[f"generic/{key}"].extend(generic[key])
        return alpha * own + (1 - alpha) * row0, pass_of_both.halves

    def double(self, given: dict[str, Any]) -> dict[str, Any]:
        """The rows of a forward pass twice: with their users, then with the unknown user; (R, ...) -> (2R, ...)."""
        rows = len(given["input_ids"])
        twice = {
            key: torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for key, value in given.items()
        }
        return {**twice, "user_ids": and_unknown(given["user_ids"])}

    def record(self, rows: Tensor, inputs: dict[str, Any], halves: list[Any]) -> None:
        """Sees the outputs of every evaluation batch."""
        raise NotImplementedError

    def _drawn(self, user_ids: Tensor) -> Tensor:
        """Users of (2B,) rows, both rows of a comparison unknown with probability 1 - alpha.

        Every draw has a seed of its own, made of what a resumed run knows, so there is no state to save.
        """
        me: Any = self
        step = me.state.global_step
        self._draws = (step, self._draws[1] + 1 if self._draws[0] == step else 0)
        name = f"{me.args.seed} {step} {self._draws[1]} {me.accelerator.process_index}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        random = torch.rand(len(user_ids) // 2, generator=torch.Generator().manual_seed(seed))
        keep = (random < me.args.user_loss_alpha).repeat(2).to(user_ids.device)  # (B,) -> (2B,)
        return torch.where(keep, user_ids, 0)

    def _stop_at_nan(self, loss: Tensor, rows: Tensor | None) -> None:
        """Raises where any process has a loss that is not a number, in all of them."""
        me: Any = self
        here = [] if rows is None else rows.tolist()
        step = me.state.global_step
        self._rows_of_step = (step, (self._rows_of_step[1] if self._rows_of_step[0] == step else []) + here)
        finite = me.accelerator.gather(torch.isfinite(loss.detach()).reshape(1))
        if not finite.all():
            bad = here if not torch.isfinite(loss) else []
            raise TrainingStopped(f"step {step + 1}: the loss is not a number{self._told(bad)}")

    def stop_at_bad_gradient(self) -> None:
        """Raises before an update with a gradient that is not a number, in all processes where one has it."""
        me: Any = self
        found = [torch.isfinite(p.grad).all() for p in unwrapped(me.model).parameters() if p.grad is not None]
        # Of a shard's gradient it is a shard too, of which every process must ask for the whole.
        whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in found]
        finite = torch.stack([one.to(me.accelerator.device) for one in whole]).all().reshape(1)
        if not me.accelerator.gather(finite).all():
            told = self._told([] if finite else self._rows_of_step[1])
            raise TrainingStopped(f"step {me.state.global_step + 1}: a gradient is not a number{told}")

    def _told(self, rows: list[int]) -> str:
        named = ", ".join(self.places(row) for row in rows[:8])
        where = f", in the batch of {named}{' and others' if len(rows) > 8 else ''}" if rows else ""
        cure = "lower the learning rates, or use --bf16 False --dtype float32"
        return f"{where}; nothing was updated, complete checkpoints are as they were; {cure}"

    def create_optimizer(self, model: Any = None) -> Any:
        """The stock optimizer with the users' vectors in a group of their own: their learning rate, no weight decay."""
        me: Any = self
        given = me.optimizer is not None
        optimizer = cast(Any, super()).create_optimizer(model)
        named = (me.model if model is None else model).named_parameters()
        users = [p for name, p in named if is_user(name) and p.requires_grad and p.numel()]
        if given or not users:
            return optimizer
        own = set(map(id, users))
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group({"params": users, "lr": self.user_learning_rate(), "weight_decay": 0.0})
        return optimizer

    def user_learning_rate(self) -> float:
        """Learning rate of the users' vectors, with the default filled in."""
        raise NotImplementedError


class StopAtBadGradient(TrainerCallback):
    """Looks at the gradients before each update; see `AlphaMix.stop_at_bad_gradient`."""

    def __init__(self, trainer: AlphaMix):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # In fp16 the gradient scaler skips such steps by itself.
        if not args.fp16:
            self.trainer.stop_at_bad_gradient()


class _OnePass:
    """One forward pass over both halves, handed out half by half to code that expects to call a model."""

    def __init__(self, model: Any, double: Callable[[dict[str, Any]], dict[str, Any]]):
        self.model, self.double = model, double
        self.halves: list[Any] = []

    def half(self, which: int) -> Callable[..., Any]:
        def stand_in(**given: Any) -> Any:
            if not self.halves:
                self.halves = _halves(self.model(**self.double(given)), 2 * len(given["input_ids"]))
            return self.halves[which]

        return stand_in


def _halves(out: Any, rows: int) -> list[Any]:
    """Outputs of 2R rows -> of the first R and of the last R."""
    parts: list[dict[str, Any]] = [{}, {}]
    for key, value in out.items():
        whole = isinstance(value, Tensor) and value.ndim and len(value) == rows
        for part, piece in zip(parts, value.chunk(2) if whole else (value, value), strict=True):
            part[key] = piece
    return [type(out)(**part) for part in parts]


def and_unknown(user_ids: Tensor) -> Tensor:
    """(R,) -> (2R,): the users, then row 0 as often."""
    return torch.cat([user_ids, torch.zeros_like(user_ids)])


def personal_parameters(model: Any) -> list[Any]:
    """What is trained beside the language model: users' vectors and the reward head."""
    return [p for name, p in model.named_parameters() if is_personal(name) and p.requires_grad]


def beside_users(peft_config: Any) -> Any:
    """A peft configuration that leaves the head and the user model alone, which are trained as they are.

    Without a task type, because that of sequence classifiers makes a second copy of `score`.
    """
    if peft_config is None:
        return None
    changed = type(peft_config).from_peft_type(**{**peft_config.to_dict(), "task_type": None})
    own = {"score", "user_model"}
    changed.modules_to_save = [m for m in changed.modules_to_save or () if m not in own] or None
    if isinstance(changed.target_modules, str) and hasattr(changed, "exclude_modules") and not changed.exclude_modules:
        changed.exclude_modules = sorted(own)
    return changed

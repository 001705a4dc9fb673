"""PersonalizedRewardTrainer: TRL's RewardTrainer, personalized (P-RM, appendix F.2 of the paper)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from ..core.backbone import is_personal
from ..core.checkpoints import CompleteCheckpoints
from ..core.pairs import TokenPairs, margins_of
from ..core.trainer import AlphaMix, PersonalizedFields, StopAtBadGradient, and_unknown
from ..core.users import UserIndex, UserModel, make_user_model, neutral_prompt
from .module import PersonalizedRewards, reward_module

USER_LEARNING_RATE = {"soft_prompt": 1e-2, "linear_head": 1e-3}


@dataclass
class PersonalizedRewardConfig(PersonalizedFields, RewardConfig):
    """TRL's RewardConfig, with how users enter.

    What differs from TRL's defaults: rows are longer before they are cut, the best of ten validations is kept with at
    most two checkpoints, the seed is 0, nothing is reported to trackers, and the CPU is used where there is
    nothing else.
    """

    aggregator: Literal["linear_head", "soft_prompt"] = field(
        default="linear_head",
        metadata={"help": "How user and response meet: the user's vector is the head, or stands before the text."},
    )
    pooling: Literal["last", "mean", "best"] | None = field(
        default=None,
        metadata={
            "help": "Hidden state of a response: mean over its tokens (default), its last token (default of soft "
            "prompts and of stock reward models), or whichever is best on validation rows (frozen backbone only)."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Comparisons of a prompt come one after the other, prompts in random order: with the linear head, "
            "responses that many users judged are then run once a batch."
        },
    )
    max_length: int = field(default=2048, metadata={"help": "Longest row in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the order of rows, of cluster starts, of a validation split."})
    eval_strategy: str = field(default="steps", metadata={"help": "When validation rows are scored."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Below 1: share of the whole training."})
    save_strategy: str = field(default="steps", metadata={"help": "When a checkpoint is written."})
    save_steps: float = field(default=0.1, metadata={"help": "Below 1: share of the whole training."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept, the best included."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep what did best on validation rows."})
    # Every parameter is read in every pass, so DDP need not look for ones that are not.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Let DDP look for idle weights."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  (as transformers has it)
        default="none", metadata={"help": "Trackers (wandb, tensorboard, trackio, ...)."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


@dataclass
class PersonalizedCollator(DataCollatorForPreference):
    """TRL's collator, with `user_ids` (2B,), `rows` (B,) and `completion_mask` (2B, T)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        users = torch.tensor([example["user"] for example in examples])
        starts = [example[f"{side}_start"] for side in ("chosen", "rejected") for example in examples]
        masks = [(torch.arange(int(n)) >= start).long() for n, start in zip(_lengths(batch), starts, strict=True)]
        batch["completion_mask"] = pad(
            masks, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        batch["user_ids"] = torch.cat([users, users])
        batch["rows"] = torch.tensor([example["row"] for example in examples])
        return batch


def _lengths(batch: dict[str, Any]) -> list[int]:
    return cast(Tensor, batch["attention_mask"]).sum(1).tolist()


def reward_dataset(pairs: TokenPairs, users: UserIndex) -> Dataset:
    """Columns that the trainer reads: token ids, where each response begins, the user's row, and the comparison's."""
    columns: dict[str, Any] = {
        "chosen_ids": [list(r.prompt_ids + r.response_ids) for r in pairs.chosen],
        "rejected_ids": [list(r.prompt_ids + r.response_ids) for r in pairs.rejected],
        "chosen_start": [len(r.prompt_ids) for r in pairs.chosen],
        "rejected_start": [len(r.prompt_ids) for r in pairs.rejected],
        "user": users.rows([row.user.id for row in pairs.rows]).tolist(),
        "row": list(range(len(pairs.rows))),
        "prompt": _numbered([r.prompt_ids for r in pairs.chosen]),
        "length": [max(len(a), len(b)) for a, b in zip(pairs.chosen, pairs.rejected, strict=True)],
    }
    margins = margins_of(pairs.rows)
    return Dataset.from_dict(columns if margins is None else {**columns, "margin": margins})


def _numbered(keys: Sequence[Any]) -> list[int]:
    """Equal keys get equal numbers."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


class PromptSampler(Sampler[int]):
    """Rows in random order, those of a prompt together; another order each epoch, the same one in a resumed run.

    Args:
        prompts: (B,) number of each row's prompt.
    """

    def __init__(self, prompts: Sequence[int], seed: int):
        self.prompts, self.seed, self.epoch = np.asarray(prompts), seed, 0

    def __len__(self) -> int:
        return len(self.prompts)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        place = random.permutation(self.prompts.max() + 1)[self.prompts]
        return iter(np.lexsort((random.random(len(place)), place)).tolist())


def start_user_model(model: Any, tokenizer: Any, args: PersonalizedRewardConfig, users: int) -> UserModel:
    """The user model before training: a neutral prompt for soft prompts, the model's own head for linear heads."""
    if args.aggregator == "soft_prompt":
        start = neutral_prompt(model.get_input_embeddings(), tokenizer, args.user_tokens)
    else:
        start = model.score.weight.detach().float().reshape(-1).cpu()  # (1, D) -> (D,)
    return make_user_model(args.user_model, users, start, **args.user_options(args.seed))


class PersonalizedRewardTrainer(AlphaMix, CompleteCheckpoints, RewardTrainer):
    """Trains the user model, the head and, by LoRA or in full, the backbone on personalized comparisons.

    Args:
        model: a sequence classifier with one output; personalized here unless `reward_module` has been called on it.
        args: the configuration.
        train_dataset, eval_dataset: from `reward_dataset`.
        processing_class: the tokenizer.
        users: U, the unknown user included.
        peft_config: for LoRA and its like; `score` and the user model are always trained beside it.
        places: row of the training data -> where it came from, for messages.

    Raises:
        ValueError: a data set without the columns of `reward_dataset`, or a model that can't be personalized.
    """

    user_columns = ("user", "row", "chosen_start", "rejected_start", "length", "prompt")
    generic_metrics = ("accuracy", "margin")
    sampler: PromptSampler | None = None
    args: PersonalizedRewardConfig
    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    _tag_names = ["prlhf", "reward-trainer", "personalization"]  # noqa: RUF012  (an instance variable in TRL's typing)

    def __init__(
        self,
        model: Any,
        args: PersonalizedRewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        users: int = 1,
        peft_config: Any = None,
        places: Callable[[int], str] = str,
        **kwargs: Any,
    ):
        for name, given in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            missing = {"chosen_ids", "rejected_ids", *self.user_columns} - set(given.column_names if given else ())
            if given is not None and missing:
                raise ValueError(f"{name}: no column {', '.join(sorted(missing))}; make it with `reward_dataset`")
        if not isinstance(model, PersonalizedRewards):
            user_model = start_user_model(model, processing_class, args, users)
            reward_module(model, user_model, args.aggregator, args.pooling or "last", args.user_place)
        personal = [p for name, p in model.named_parameters() if is_personal(name) and p.requires_grad]
        self.places = places
        self._margins: dict[int, tuple[int, float, float]] = {}
        kwargs.setdefault("data_collator", None)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=_beside_users(peft_config),
            **kwargs,
        )
        for parameter in personal:  # peft has frozen whatever is not its own
            parameter.requires_grad_(parameter.numel() > 0)
        if not kwargs["data_collator"]:
            self.data_collator = PersonalizedCollator(
                self.processing_class.pad_token_id, cast(Any, args.pad_to_multiple_of)
            )
        self.add_callback(StopAtBadGradient(self))
        self.add_callback(_TellsSampler(self))

    def double(self, given: dict[str, Any]) -> dict[str, Any]:
        """With the linear head both halves read the same states, so one pass serves them."""
        if self.args.aggregator == "soft_prompt":
            return super().double(given)
        return {**given, "user_ids": and_unknown(given["user_ids"])}

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Nothing: rows are tokenized, and the length policy has met them; TRL would drop some in silence."""
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.args.group_by_prompt:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = PromptSampler(rows["prompt"], seed)
        return self.sampler

    def user_learning_rate(self) -> float:
        chosen = self.args.user_learning_rate
        return USER_LEARNING_RATE[self.args.aggregator] if chosen is None else chosen

    def record(self, rows: Tensor, inputs: dict[str, Any], halves: list[Any]) -> None:
        """Keeps the margin of every validation row, with its user and with row 0."""
        margins = [torch.sub(*out.logits.squeeze(-1).chunk(2)) for out in halves]  # two of (B,)
        numbers = torch.stack([rows, inputs["user_ids"][: len(rows)]], dim=1)  # (B, 2)
        numbers, values = self.accelerator.gather((numbers, torch.stack(margins, dim=1)))  # of all processes
        for (row, user), (own, row0) in zip(numbers.tolist(), values.tolist(), strict=True):
            self._margins[row] = (user, own, row0)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._margins = {}
        out = super().evaluation_loop(*args, **kwargs)
        if out.metrics is not None and self._margins:
            table = self.margins()
            right = correct(table["margin"])
            prefix = kwargs.get("metric_key_prefix", "eval")
            out.metrics[f"{prefix}_accuracy_average"] = float(right.groupby(table["user"]).mean().mean())
        return out

    def margins(self) -> pd.DataFrame:
        """Of the last evaluation: row, user (its number), margin and margin under row 0, in order of rows."""
        found = [(row, *self._margins[row]) for row in sorted(self._margins)]
        return pd.DataFrame(found, columns=["row", "user", "margin", "margin_row0"])

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("push the finished run with PersonalizedRewardModel.push_to_hub, which leaves users' data out")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card of the finished run says what TRL's can't."""


class _TellsSampler(TrainerCallback):
    """Tells the sampler which epoch it is: accelerate does not where processes share it and batches are skipped."""

    def __init__(self, trainer: PersonalizedRewardTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))


def correct(margins: Any) -> Any:
    """1 where the chosen response scores higher, .5 for a tie."""
    return 0.5 + 0.5 * np.sign(margins)


def _beside_users(peft_config: Any) -> Any:
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

"""PersonalizedRewardTrainer: TRL's RewardTrainer, personalized (P-RM, appendix F.2 of the paper)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from torch import Tensor
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from ..core.batch_order import PromptSampler, RowSampler
from ..core.checkpoints import CompleteCheckpoints
from ..core.pairs import TokenPairs, margins_of
from ..core.trainer import AlphaMix, and_unknown, beside_users, personal_parameters
from ..core.trainer_config import PersonalizedFields
from ..core.users import UserIndex, UserModel, make_user_model, neutral_prompt
from ..core.validation import KeepsMargins
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
    max_length: int = field(default=2048, metadata={"help": "Longest row in tokens."})
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Comparisons of a prompt come one after the other, prompts in random order: with the linear head, "
            "responses that many users judged are then run once a batch."
        },
    )


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


def start_user_model(model: Any, tokenizer: Any, args: PersonalizedRewardConfig, users: int) -> UserModel:
    """The user model before training: a neutral prompt for soft prompts, the model's own head for linear heads."""
    if args.aggregator == "soft_prompt":
        start = neutral_prompt(model.get_input_embeddings(), tokenizer, args.user_tokens)
    else:
        start = model.score.weight.detach().float().reshape(-1).cpu()  # (1, D) -> (D,)
    return make_user_model(args.user_model, users, start, **args.user_options(args.seed))


class PersonalizedRewardTrainer(KeepsMargins, AlphaMix, CompleteCheckpoints, RewardTrainer):
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
        self.check_columns("reward_dataset", train_dataset=train_dataset, eval_dataset=eval_dataset)
        if not isinstance(model, PersonalizedRewards):
            user_model = start_user_model(model, processing_class, args, users)
            reward_module(model, user_model, args.aggregator, args.pooling or "last", args.user_place)
        personal = personal_parameters(model)
        self.places = places
        self._margins = {}
        kwargs.setdefault("data_collator", None)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=beside_users(peft_config),
            **kwargs,
        )
        self.begin(personal)
        if not kwargs["data_collator"]:
            self.data_collator = PersonalizedCollator(
                self.processing_class.pad_token_id, cast(Any, args.pad_to_multiple_of)
            )

    def double(self, given: dict[str, Any]) -> dict[str, Any]:
        """With the linear head both halves read the same states, so one pass serves them."""
        if self.args.aggregator == "soft_prompt":
            return super().double(given)
        return {**given, "user_ids": and_unknown(given["user_ids"])}

    def row_order(self, rows: Any, seed: int) -> RowSampler | None:
        return PromptSampler(rows["prompt"], seed) if self.args.group_by_prompt else super().row_order(rows, seed)

    def user_learning_rate(self) -> float:
        chosen = self.args.user_learning_rate
        return USER_LEARNING_RATE[self.args.aggregator] if chosen is None else chosen

    def margins_of(self, out: Any, inputs: dict[str, Any]) -> Tensor:
        return torch.sub(*out.logits.squeeze(-1).chunk(2))

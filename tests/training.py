"""Small trainers of personalized reward models on a tiny Llama, in fp32 on the CPU."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import byte_tokenizer, checkerboard, tiny_config
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from prlhf.core.comparisons import Comparisons
from prlhf.core.pairs import token_pairs
from prlhf.core.tokenize import RowTokenizer, TextLayout
from prlhf.core.users import UserIndex
from prlhf.prm.trainer import PersonalizedRewardConfig, PersonalizedRewardTrainer, reward_dataset

QUIET: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "user_tokens": 4,
    "logging_steps": 1000,
    "disable_tqdm": True,
}


def own_pad_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose padding is not what ends a text, as stock reward models want it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def classifier(seed: int = 0) -> Any:
    """A stock reward model with random weights, those of the head included."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=258, initializer_range=0.1))


def small_config(folder: Path, **changes: Any) -> PersonalizedRewardConfig:
    return PersonalizedRewardConfig(output_dir=str(folder), **{**QUIET, **changes})


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear")


def columns(rows: Comparisons, users: UserIndex) -> Dataset:
    return reward_dataset(token_pairs(rows, RowTokenizer(own_pad_tokenizer(), TextLayout())), users)


def one_without(which: str, data: Dataset, *names: str) -> dict[str, Dataset]:
    """A trainer's two data sets, one of which lacks columns."""
    return {"train_dataset": data, "eval_dataset": data} | {which: data.remove_columns(list(names))}


def small_trainer(
    folder: Path,
    train: Comparisons | None = None,
    validation: Comparisons | None = None,
    model: Any = None,
    peft_config: Any = None,
    given: dict[str, Any] | None = None,
    **config: Any,
) -> PersonalizedRewardTrainer:
    """A trainer on a checkerboard.

    Args:
        given: further arguments of the trainer.
        config: of its configuration.
    """
    train = train or checkerboard(4)
    validation = validation or checkerboard(2, first=40)
    users = UserIndex.seen_in(train.user_ids)
    return PersonalizedRewardTrainer(
        classifier() if model is None else model,
        small_config(folder, **config),
        columns(train, users),
        columns(validation, users),
        own_pad_tokenizer(),
        users=len(users),
        peft_config=peft_config,
        places=lambda row: train[row].place,
        **(given or {}),
    )


def batch_of(trainer: Any, rows: list[int], dataset: Dataset | None = None) -> dict[str, Any]:
    """A batch as the trainer's own loader gives it."""
    given = trainer.train_dataset if dataset is None else dataset
    return trainer.data_collator([given[row] for row in rows])

"""PersonalizedDPOTrainer: TRL's DPOTrainer, personalized (P-DPO, section 4.4 of the paper; P-IPO, F.3; Remark 4.1)."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter

from ..core.backbone import PersonalizedBackbone, personalize, unwrapped
from ..core.checkpoints import CompleteCheckpoints
from ..core.pairs import TokenPairs
from ..core.token_rows import row_key
from ..core.tokenize import TokenRow
from ..core.trainer import AlphaMix, beside_users, personal_parameters
from ..core.trainer_config import PersonalizedFields
from ..core.user_scores import score_cache
from ..core.users import UserIndex, UserModel, make_user_model, neutral_prompt
from ..core.validation import KeepsMargins
from .cpu_head import lean_head
from .log_probs import cached_log_probs, log_prob_cache, log_probs
from .losses import FURTHER_LOSSES, FurtherLosses

USER_LEARNING_RATE = 1e-2
SORTING = {"aot", "aot_unpaired"}  # losses that sort a batch, so that no row's share of them can be drawn
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class PersonalizedDPOConfig(PersonalizedFields, DPOConfig):
    """TRL's DPOConfig, with how users enter; `loss_type` also takes `ipo_sum` (see `policy.losses`).

    What differs from TRL's defaults: the reference's log-probabilities are computed once and kept on disk, the
    learning rate is the paper's, rows are longer before they are cut, the best of ten validations is kept with at most
    two checkpoints, the seed is 0, nothing is reported to trackers, and the CPU is used where there is nothing else.
    """

    max_length: int = field(default=2048, metadata={"help": "Longest row in tokens."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of the language model's weights."})
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Compute the reference's log-probabilities before training; they are cached on disk by tokens and "
            "weights, so other users, losses and alphas find them there."
        },
    )
    ipo_sum_beta: float | None = field(
        default=None, metadata={"help": "beta of the loss ipo_sum, which counts nats per response; by default beta."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sorting = sorted(SORTING & set(self.loss_type))
        if self.user_loss == "sampled" and sorting:
            raise ValueError(f"user_loss sampled: the loss {sorting[0]} sorts a batch, so it must be exact")
        if self.use_weighting and set(FURTHER_LOSSES) & set(self.loss_type):
            raise ValueError("use_weighting is of TRL's own losses; leave it out, or leave out ipo_sum")
        if self.use_weighting and self.user_loss == "sampled" and "sft" in self.loss_type:
            raise ValueError("user_loss sampled: use_weighting multiplies sft by another mean, so it must be exact")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be above 0, found {self.beta}")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("the loss exo_pair needs a label_smoothing above 0, for instance 1e-3")
        if self.ipo_sum_beta is not None and not 0 < self.ipo_sum_beta < float("inf"):
            raise ValueError(f"ipo_sum_beta must be above 0, found {self.ipo_sum_beta}")


@dataclass
class PersonalizedPairCollator(DataCollatorForPreference):
    """TRL's collator, with `user_ids` (2B,) and `rows` (B,)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        users = torch.tensor([example["user"] for example in examples])
        batch["user_ids"] = torch.cat([users, users])
        batch["rows"] = torch.tensor([example["row"] for example in examples])
        return batch


def dpo_dataset(pairs: TokenPairs, users: UserIndex) -> Dataset:
    """Columns that the trainer reads: token ids, the user's row, the comparison's, and the longer side's length."""
    return Dataset.from_dict(
        {
            "prompt_ids": [list(r.prompt_ids) for r in pairs.chosen],
            "chosen_ids": [list(r.response_ids) for r in pairs.chosen],
            "rejected_ids": [list(r.response_ids) for r in pairs.rejected],
            "user": users.rows([row.user.id for row in pairs.rows]).tolist(),
            "row": list(range(len(pairs.rows))),
            "length": [max(len(a), len(b)) for a, b in zip(pairs.chosen, pairs.rejected, strict=True)],
        }
    )


def start_user_model(model: Any, tokenizer: Any, args: PersonalizedFields, users: int) -> UserModel:
    """The user model before training: everybody has the vectors of a neutral text."""
    start = neutral_prompt(model.get_input_embeddings(), tokenizer, args.user_tokens)
    return make_user_model(args.user_model, users, start, **args.user_options(cast(Any, args).seed))


class PersonalizedDPOTrainer(KeepsMargins, AlphaMix, FurtherLosses, CompleteCheckpoints, DPOTrainer):
    """Trains the user model and, by LoRA or in full, the language model on personalized comparisons.

    The reference reads the same token ids, text about the user included, and never the users' vectors, on each of its
    four paths: a model of its own (`ref_model`), LoRA switched off, the adapter "ref" (a copy of the one that a peft
    model came with), and log-probabilities that were computed before.

    Args:
        model: a causal language model; personalized here unless `personalize` has been called on it.
        args: the configuration.
        train_dataset, eval_dataset: from `dpo_dataset`.
        processing_class: the tokenizer.
        users: U, the unknown user included.
        peft_config: for LoRA and its like; the user model is always trained beside it.
        ref_model: the reference, if it is not the model that training starts from.
        reference_key: fingerprint of the reference, under which its log-probabilities are cached on disk; without one
            they are computed for this trainer alone.
        places: row of the training data -> where it came from, for messages.

    Raises:
        ValueError: a data set without the columns of `dpo_dataset`, or a model that can't be personalized.
    """

    user_columns = ("user", "row", "length", "prompt_ids")
    generic_metrics = ("rewards/accuracies", "rewards/margins")
    args: PersonalizedDPOConfig
    model: Any
    ref_model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    _tag_names = ["prlhf", "dpo", "personalization"]  # noqa: RUF012  (an instance variable in TRL's typing)

    def __init__(
        self,
        model: Any,
        args: PersonalizedDPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        users: int = 1,
        peft_config: Any = None,
        ref_model: Any = None,
        reference_key: str = "",
        places: Callable[[int], str] = str,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise ValueError("processing_class: give the tokenizer of the model")
        self.check_columns("dpo_dataset", train_dataset=train_dataset, eval_dataset=eval_dataset)
        inner = unwrapped(model)
        if not isinstance(inner.base_model, PersonalizedBackbone):
            personalize(inner, start_user_model(inner, processing_class, args, users), args.user_place)
        personal = personal_parameters(inner)
        self.places, self.reference_key = places, reference_key
        self._margins = {}
        given = kwargs.pop("data_collator", None)
        super().__init__(
            model,
            ref_model,
            args,
            data_collator=given or _collator(processing_class, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=beside_users(peft_config),
            **kwargs,
        )
        self.begin(personal)
        self._make_own()

    def _make_own(self) -> None:
        """After the stock constructor: what this trainer does in another way."""
        if not self.use_weighting:  # which needs more of the distributions than the lean head gives
            for one in (self.model, *([self.ref_model] if self.ref_model is not None else [])):
                lean_head(unwrapped(one))
        self.take_further_losses()
        self.precompute_ref_logps = True  # to the stock loss: `compute_loss` fills them in where they were not
        if self.args.sync_ref_model:
            self.remove_callback(SyncRefModelCallback)
            self.add_callback(_SyncReference(self.ref_model, self.accelerator))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if REFERENCE[0] not in inputs:
            given = {key: value for key, value in inputs.items() if key != "rows"}
            found = self.compute_ref_log_probs(self.ref_model or self.model, given)
            inputs = {**inputs, **dict(zip(REFERENCE, found, strict=True))}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The stock method, on rows that say nothing of users but in their text."""
        plain = {key: value for key, value in inputs.items() if key not in ("user_ids", "rows")}
        return super().compute_ref_log_probs(model, plain)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Adds the reference's log-probabilities (B,) of both responses, from the disk where they are there."""
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        if self.is_fsdp_enabled or self.ld_alpha is not None:
            # Shards are computed by all processes together; under LD-DPO a row's value depends on its pair.
            return super()._precompute_ref_logps(dataset, name, batch_size)
        rows = [*_rows(dataset, "chosen_ids"), *_rows(dataset, "rejected_ids")]
        shown = f"reference, {name}" if not self.args.disable_tqdm else ""
        with self.accelerator.main_process_first(), self._as_reference() as model, _scratch() as scratch:
            # A reference that follows the policy has no lasting key.
            keep = self.reference_key and not self.args.sync_ref_model
            store = log_prob_cache(self.reference_key + self._precision()) if keep else score_cache(scratch)
            values = cached_log_probs(
                [row_key(row) for row in rows],
                lambda at: [rows[i] for i in at],
                store,
                lambda some: self._as_in_training(model, some),
                shown,
            ).chunk(2)
        for column, value in zip(REFERENCE, values, strict=True):
            dataset = dataset.add_column(column, value.tolist())
        return dataset

    def _precision(self) -> str:
        """What the trainer computes in, where that is not simply the weights' dtype."""
        return "-bf16" if self.args.bf16 else "-fp16" if self.args.fp16 else ""

    def _as_in_training(self, model: Any, rows: list[TokenRow]) -> Tensor:
        with self.accelerator.autocast():
            return log_probs(model, rows)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The model that gives the reference's log-probabilities where it is given no users."""
        model = self.ref_model or self.model
        training = model.training
        model.eval()
        adapted = isinstance(model, PeftModel)
        named = "ref" if adapted and "ref" in model.peft_config else None
        inner = unwrapped(model)
        # What accelerate puts around a forward would compute in another dtype than the cache's key says.
        around = {name: vars(inner).pop(name) for name in ("forward",) if name in vars(inner)}
        try:
            with use_adapter(model, named) if adapted else contextlib.nullcontext():
                yield inner
        finally:
            vars(inner).update(around)
            model.train(training)

    def log_ratios(self, out: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """log pi - log pi_ref of chosen and rejected responses, (B,) each, as the stock loss weighs their tokens."""
        mask = inputs["completion_mask"][:, 1:]  # (2B, T - 1)
        tokens = out.log_probs[:, -mask.shape[1] :]
        if self.ld_alpha is not None:  # LD-DPO: what the longer response has more than the shorter counts less
            shared = mask.sum(1).view(2, -1).min(0).values.repeat(2)  # (2B,)
            tokens = tokens * torch.where(mask.cumsum(1) <= shared[:, None], 1.0, self.ld_alpha)
        chosen, rejected = (tokens * mask).sum(1).chunk(2)
        return chosen - inputs[REFERENCE[0]], rejected - inputs[REFERENCE[1]]

    def margins_of(self, out: Any, inputs: dict[str, Any]) -> Tensor:
        """Differences of implicit rewards."""
        return self.beta * torch.sub(*self.log_ratios(out, inputs))

    def user_learning_rate(self) -> float:
        chosen = self.args.user_learning_rate
        return USER_LEARNING_RATE if chosen is None else chosen


class _SyncReference(SyncRefModelCallback):
    """TR-DPO's reference follows the policy by names: the policy has users' vectors more."""

    @staticmethod
    def sync_target_model(model: Any, target_model: Any, alpha: float) -> None:
        policy = dict(unwrapped(model).named_parameters())
        for name, parameter in unwrapped(target_model).named_parameters():
            parameter.data.mul_(1.0 - alpha).add_(policy[name].data, alpha=alpha)


def _rows(dataset: Any, side: str) -> list[TokenRow]:
    pairs = zip(dataset["prompt_ids"], dataset[side], strict=True)
    return [TokenRow(tuple(prompt), tuple(response)) for prompt, response in pairs]


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="prlhf-") as folder:
        yield Path(folder)


def _collator(tokenizer: Any, args: PersonalizedDPOConfig) -> PersonalizedPairCollator:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return PersonalizedPairCollator(int(pad), pad_to_multiple_of=cast(Any, args.pad_to_multiple_of))

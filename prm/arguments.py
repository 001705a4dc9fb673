"""The settings of `prlhf prm train` beside those of the trainer; each field is a flag and a key of `--config`."""

from dataclasses import dataclass, field
from typing import Literal

from ..core.arguments import NOT_READ, RunArguments
from ..core.arguments import refuse_idle_flags as refuse_idle
from .head_config import HeadConfig
from .trainer import PersonalizedRewardConfig


@dataclass
class RewardArguments(RunArguments):
    """What every `train` verb has, and how frozen heads are trained."""

    tuning: Literal["frozen", "lora", "full"] = field(
        default="frozen",
        metadata={
            "help": "What is trained of the backbone. frozen with the linear head: states are computed once and "
            "cached, and all heads are fitted on them in seconds."
        },
    )
    base_strengths: list[float] = field(
        default_factory=lambda: list(HeadConfig.base_strengths),
        metadata={"help": "Candidates for how strongly e_0 is held to its start; chosen on validation rows."},
    )
    user_strengths: list[float] = field(
        default_factory=lambda: list(HeadConfig.user_strengths),
        metadata={"help": "Candidates for how strongly users are held to row 0; chosen on validation rows."},
    )
    head_learning_rate: float = field(default=HeadConfig.learning_rate, metadata={"help": "Of frozen heads."})
    head_batch_size: int = field(default=HeadConfig.batch_size, metadata={"help": "Comparisons per step of the heads."})
    head_epochs: int = field(default=HeadConfig.max_epochs, metadata={"help": "Most epochs over the cached features."})
    patience: int = field(default=HeadConfig.patience, metadata={"help": "Epochs without better validation loss."})

    def fits_heads(self, config: PersonalizedRewardConfig) -> bool:
        """Whether heads are fitted on cached states, which needs no trainer."""
        return self.tuning == "frozen" and config.aggregator == "linear_head"

    def head_config(self, config: PersonalizedRewardConfig) -> HeadConfig:
        return HeadConfig(
            user_model=config.user_model,
            user_loss_alpha=config.user_loss_alpha,
            base_strengths=tuple(self.base_strengths),
            user_strengths=tuple(self.user_strengths),
            user_options=config.user_options(config.seed),
            learning_rate=self.head_learning_rate,
            batch_size=self.head_batch_size,
            max_epochs=self.head_epochs,
            patience=self.patience,
            seed=config.seed,
        )


# What heads on cached states read of the trainer's configuration, beside where the run goes and whether it is pushed.
_OF_HEADS = {
    *("output_dir", "seed", "max_length", "aggregator", "pooling", "user_loss_alpha", "user_model", "user_clusters"),
    *("user_shared", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "use_cpu", "disable_tqdm"),
}
_HEADS_ONLY = ("base_strengths", "user_strengths", "head_learning_rate", "head_batch_size", "head_epochs", "patience")
_SOFT_ONLY = ("user_tokens", "user_place")


def refuse_idle_flags(arguments: RewardArguments, config: PersonalizedRewardConfig, named: set[str]) -> None:
    """Raises where a flag was given that would change nothing; see `core.arguments`.

    Raises:
        ValueError: names the flag and what it belongs to.
    """
    heads, soft = arguments.fits_heads(config), config.aggregator == "soft_prompt"
    if config.pooling == "best" and not heads:
        raise ValueError("--pooling best: is of heads on a frozen model; choose last or mean")

    def own(name: str, trained: bool) -> str | None:
        if not soft and name in _SOFT_ONLY:
            return "is of soft prompts; add --aggregator soft_prompt"
        if heads and trained and name not in _OF_HEADS and name not in NOT_READ:
            return "changes nothing for heads on a frozen model; add --tuning lora, or see the --head flags"
        if not heads and name in _HEADS_ONLY:
            return "is of heads on a frozen model, and this run trains by gradient steps"
        if name == "train_sampling_strategy" and config.group_by_prompt:
            return "--group-by-prompt has an order of its own; give one of them"
        return None

    refuse_idle(arguments, config, named, own)

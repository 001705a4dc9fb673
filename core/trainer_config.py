"""What every personalized trainer's configuration has beside TRL's own."""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from .backbone import Place


@dataclass
class PersonalizedFields:
    """Fields that a personalized trainer's configuration has beside those of TRL."""

    user_model: Literal["individualized", "cluster", "uniform"] = field(
        default="individualized", metadata={"help": "How users share what they like."}
    )
    user_tokens: int = field(default=10, metadata={"help": "K, vectors of a user's soft prompt."})
    user_clusters: int = field(default=10, metadata={"help": "Number of clusters of the cluster user model."})
    user_shared: bool = field(
        default=True, metadata={"help": "False: individualized users without the shared e_0 (the paper's ablation)."}
    )
    user_place: Place = field(
        default="prepend", metadata={"help": "Where a soft prompt stands: before the text, or after its BOS token."}
    )
    user_loss_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the loss with the user; the rest is row 0's."}
    )
    user_loss: Literal["exact", "sampled"] = field(
        default="exact",
        metadata={
            "help": "exact: both losses of each comparison; sampled: one of them, drawn with probability alpha, which "
            "is right on average and costs half the rows of a soft prompt."
        },
    )
    user_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the users' vectors, which have no weight decay; default by what they are."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile each layer of the backbone (torch.compile, any length): about a minute at the start, then "
            "steps in half the time on a CPU with bf16."
        },
    )

    seed: int = field(default=0, metadata={"help": "Of the order of rows, of cluster starts, of a validation split."})
    eval_strategy: str = field(default="steps", metadata={"help": "When validation rows are scored."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Below 1: share of the whole training."})
    save_strategy: str = field(default="steps", metadata={"help": "When a checkpoint is written."})
    save_steps: float = field(default=0.1, metadata={"help": "Below 1: share of the whole training."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept, the best included."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep what did best on validation rows."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "No progress bars."})
    # Every parameter is read in every pass, so DDP need not look for ones that are not.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Let DDP look for idle weights."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  (as transformers has it)
        default="none", metadata={"help": "Trackers (wandb, tensorboard, trackio, ...)."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        cast(Any, super()).__post_init__()
        if not 0 <= self.user_loss_alpha <= 1:
            raise ValueError(f"user_loss_alpha must lie between 0 and 1, found {self.user_loss_alpha}")
        if not self.user_tokens and self.user_model != "uniform":
            raise ValueError(
                "user_tokens 0 is the plain model, and the uniform user model the only one without vectors"
            )
        for name, least in (("user_tokens", 0), ("user_clusters", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if self.user_learning_rate is not None and not 0 <= self.user_learning_rate < float("inf"):
            raise ValueError(f"user_learning_rate must be at least 0, found {self.user_learning_rate}")

    def user_options(self, seed: int) -> dict[str, Any]:
        """What `make_user_model` needs beside users and start."""
        options: dict[str, dict[str, Any]] = {
            "cluster": {"clusters": self.user_clusters, "seed": seed},
            "individualized": {"shared": self.user_shared},
        }
        return options.get(self.user_model, {})

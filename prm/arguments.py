"""The settings of `prlhf prm train`; each field is a flag and a key of the `--config` file."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.tokenize import TextLayout
from .head_config import HeadConfig


@dataclass
class RewardArguments:
    """Data, model and user model of a personalized reward model on a frozen backbone."""

    model: str = field(
        metadata={"help": "Folder or hub name of a decoder, or of a stock reward model (its head is e_0)."}
    )
    data: str = field(metadata={"help": "Training comparisons: file, saved datasets folder, or hub name[:split]."})
    output_dir: str = field(metadata={"help": "Folder of the run."})
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": "Validation comparisons, on which everything is chosen; by default a tenth of the training prompts."
        },
    )
    aggregator: Literal["linear_head"] = field(default="linear_head", metadata={"help": "How user and response meet."})
    user_model: Literal["individualized", "cluster", "uniform"] = field(
        default="individualized", metadata={"help": "How users share what they like."}
    )
    user_clusters: int = field(default=10, metadata={"help": "Number of clusters of the cluster user model."})
    user_shared: bool = field(
        default=True, metadata={"help": "False: individualized users without the shared e_0 (the paper's ablation)."}
    )
    user_loss_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the loss with the user; the rest is row 0's."}
    )
    pooling: Literal["last", "mean", "best"] | None = field(
        default=None,
        metadata={
            "help": "Hidden state of a response: mean over its tokens (default), its last token (default of reward "
            "models), or whichever is best on validation rows."
        },
    )
    user_text: Literal["input", "ignore"] = field(
        default="input", metadata={"help": "Whether the text about a user is part of the input."}
    )
    chat_template: Literal["chat", "none"] = field(
        default="chat",
        metadata={"help": "Put plain prompts into the tokenizer's chat template where it has one, or not."},
    )
    max_length: int = field(default=2048, metadata={"help": "Longest row in tokens."})
    over_long: Literal["truncate", "drop", "refuse"] = field(
        default="truncate", metadata={"help": "What happens to longer rows; they are counted per user."}
    )
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "The backbone's; auto: bfloat16 where the machine multiplies it natively."}
    )
    base_strengths: list[float] = field(
        default_factory=lambda: list(HeadConfig.base_strengths),
        metadata={"help": "Candidates for how strongly e_0 is held to its start; chosen on validation rows."},
    )
    user_strengths: list[float] = field(
        default_factory=lambda: list(HeadConfig.user_strengths),
        metadata={"help": "Candidates for how strongly users are held to row 0; chosen on validation rows."},
    )
    head_learning_rate: float = field(default=HeadConfig.learning_rate, metadata={"help": "Of the heads."})
    head_batch_size: int = field(default=HeadConfig.batch_size, metadata={"help": "Comparisons per step of the heads."})
    head_epochs: int = field(default=HeadConfig.max_epochs, metadata={"help": "Most epochs over the cached features."})
    patience: int = field(default=HeadConfig.patience, metadata={"help": "Epochs without better validation loss."})
    seed: int = field(default=0, metadata={"help": "Of the order of rows, of cluster starts, of a validation split."})
    columns: list[str] = field(default_factory=list, metadata={"help": "field=column where a column has another name."})
    max_bad_rows: int = field(default=0, metadata={"help": "Unusable rows that may be left out (counted)."})
    missing_user: Literal["refuse", "generic"] = field(
        default="refuse", metadata={"help": "Rows without user id: refuse, or give them to the unknown user."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a run that output_dir already holds."})

    def layout(self) -> TextLayout:
        return TextLayout(self.chat_template, self.user_text, self.max_length, self.over_long)

    def head_config(self) -> HeadConfig:
        options: dict[str, dict[str, Any]] = {
            "cluster": {"clusters": self.user_clusters, "seed": self.seed},
            "individualized": {"shared": self.user_shared},
            "uniform": {},
        }
        return HeadConfig(
            user_model=self.user_model,
            user_loss_alpha=self.user_loss_alpha,
            base_strengths=tuple(self.base_strengths),
            user_strengths=tuple(self.user_strengths),
            user_options=options[self.user_model],
            learning_rate=self.head_learning_rate,
            batch_size=self.head_batch_size,
            max_epochs=self.head_epochs,
            patience=self.patience,
            seed=self.seed,
        )

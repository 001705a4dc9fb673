"""The settings of `prlhf prm train` beside those of the trainer; each field is a flag and a key of `--config`."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from ..core.tokenize import TextLayout
from .head_config import HeadConfig
from .trainer import PersonalizedRewardConfig


@dataclass
class RewardArguments:
    """Data, model, how text is read, and how frozen heads or LoRA are trained."""

    data: str = field(metadata={"help": "Training comparisons: file, saved datasets folder, or hub name[:split]."})
    model: str = field(
        metadata={"help": "Folder or hub name of a decoder, or of a stock reward model (its head is e_0)."}
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": "Validation comparisons, on which everything is chosen; by default a tenth of the training prompts."
        },
    )
    tuning: Literal["frozen", "lora", "full"] = field(
        default="frozen",
        metadata={
            "help": "What is trained of the backbone. frozen with the linear head: states are computed once and "
            "cached, and all heads are fitted on them in seconds."
        },
    )
    user_text: Literal["input", "ignore"] = field(
        default="input", metadata={"help": "Whether the text about a user is part of the input."}
    )
    chat_template: Literal["chat", "none"] = field(
        default="chat",
        metadata={"help": "Put plain prompts into the tokenizer's chat template where it has one, or not."},
    )
    over_long: Literal["truncate", "drop", "refuse"] = field(
        default="truncate", metadata={"help": "What happens to longer rows; they are counted per user."}
    )
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto",
        metadata={
            "help": "The backbone's; auto: bfloat16 where the machine multiplies it natively, float32 for --tuning "
            "full."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA; needs --disable-dropout False."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that get LoRA, or all-linear."}
    )
    lora_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Layers that get LoRA, by number; by default all. With the linear head and "
            "--gradient-checkpointing False nothing is run backward below the lowest. Needs --lora-target-modules with "
            "names."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilized LoRA."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA)."})
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
    columns: list[str] = field(default_factory=list, metadata={"help": "field=column where a column has another name."})
    max_bad_rows: int = field(default=0, metadata={"help": "Unusable rows that may be left out (counted)."})
    missing_user: Literal["refuse", "generic"] = field(
        default="refuse", metadata={"help": "Rows without user id: refuse, or give them to the unknown user."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a run that output_dir already holds."})
    publish_users: bool = field(
        default=False, metadata={"help": "With --push-to-hub: publish users' ids and vectors too."}
    )

    def fits_heads(self, config: PersonalizedRewardConfig) -> bool:
        """Whether heads are fitted on cached states, which needs no trainer."""
        return self.tuning == "frozen" and config.aggregator == "linear_head"

    def layout(self, config: PersonalizedRewardConfig) -> TextLayout:
        return TextLayout(self.chat_template, self.user_text, config.max_length, self.over_long)

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

    def lora(self) -> Any:
        """The peft configuration, or None."""
        if self.tuning != "lora":
            return None
        from peft import LoraConfig

        whole = self.lora_target_modules == ["all-linear"]
        if whole and self.lora_layers:
            raise ValueError(
                "--lora-layers: name the modules too, as in --lora-target-modules q_proj v_proj (not all-linear)"
            )
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if whole else self.lora_target_modules,
            layers_to_transform=self.lora_layers or None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


# What heads on cached states read of the trainer's configuration, beside where the run goes and whether it is pushed.
_OF_HEADS = {
    *("output_dir", "seed", "max_length", "aggregator", "pooling", "user_loss_alpha", "user_model", "user_clusters"),
    *("user_shared", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "use_cpu", "disable_tqdm"),
}
_HEADS_ONLY = ("base_strengths", "user_strengths", "head_learning_rate", "head_batch_size", "head_epochs", "patience")
_LORA_ONLY = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers", "use_rslora", "use_dora")
# Of TRL's configuration: what it would do is done here in another place, or is not done at all.
_NOT_READ = {
    "chat_template_path": "the tokenizer's own template is used; see --chat-template",
    "eos_token": "the tokenizer's own is used",
    "pad_token": "the tokenizer's own is used",
    "model_init_kwargs": "see --dtype",
    "trust_remote_code": "no code of a model is ever run",
    "dataset_num_proc": "rows are tokenized in one process",
    "remove_unused_columns": "rows hold what the trainer reads and nothing else",
    "label_smoothing_factor": "no loss of TRL's reward trainer reads it",
    "hub_strategy": "checkpoints are never pushed, they hold users' vectors",
    "hub_always_push": "checkpoints are never pushed, they hold users' vectors",
    "hub_revision": "the main branch is pushed to",
    "do_train": "the command trains",
    "do_predict": "see `prlhf eval preference`",
}
_SOFT_ONLY = ("user_tokens", "user_place")
_HUB_ONLY = ("publish_users", "hub_model_id", "hub_token", "hub_private_repo")


def refuse_idle_flags(arguments: RewardArguments, config: PersonalizedRewardConfig, named: set[str]) -> None:
    """Raises where a flag was given that would change nothing.

    Args:
        named: fields that the command line and the configuration file name; others may have been derived from these.

    Raises:
        ValueError: names the flag and what it belongs to.
    """
    given, trained = _changed(arguments) & named, _changed(config) & named
    heads, soft = arguments.fits_heads(config), config.aggregator == "soft_prompt"
    if config.pooling == "best" and not heads:
        raise ValueError("--pooling best: is of heads on a frozen model; choose last or mean")
    for name in sorted(given | trained):
        flag = "--" + name.replace("_", "-")
        if name in trained and name in _NOT_READ:
            raise ValueError(f"{flag}: not read here: {_NOT_READ[name]}")
        if not soft and name in _SOFT_ONLY:
            raise ValueError(f"{flag}: is of soft prompts; add --aggregator soft_prompt")
        if heads and name in trained - _OF_HEADS:
            raise ValueError(
                f"{flag}: changes nothing for heads on a frozen model; add --tuning lora, or see the --head flags"
            )
        if not heads and name in _HEADS_ONLY:
            raise ValueError(f"{flag}: is of heads on a frozen model, and this run trains by gradient steps")
        if arguments.tuning != "lora" and name in _LORA_ONLY:
            raise ValueError(f"{flag}: is of LoRA; add --tuning lora")
        if name == "lora_dropout" and config.disable_dropout:
            raise ValueError(f"{flag}: TRL sets every dropout to 0; add --disable-dropout False")
        if name == "user_clusters" and config.user_model != "cluster":
            raise ValueError(f"{flag}: is of clusters; add --user-model cluster")
        if name == "user_shared" and config.user_model != "individualized":
            raise ValueError(f"{flag}: is of individualized users; the {config.user_model} user model has no e_0")
        if name == "user_loss" and config.user_loss_alpha in (0, 1):
            raise ValueError(f"{flag}: changes nothing where --user-loss-alpha is {config.user_loss_alpha:g}")
        if name == "train_sampling_strategy" and config.group_by_prompt:
            raise ValueError(f"{flag}: --group-by-prompt has an order of its own; give one of them")
        if name in _HUB_ONLY and not config.push_to_hub:
            raise ValueError(f"{flag}: is of publishing; add --push-to-hub")


def _changed(arguments: Any) -> set[str]:
    """Fields that are not what they are by default."""
    plain = None
    if isinstance(arguments, PersonalizedRewardConfig):
        plain = PersonalizedRewardConfig(output_dir=arguments.output_dir)
    found = set()
    for one in fields(arguments):
        default = getattr(plain, one.name) if plain else one.default
        if not plain and one.default_factory is not MISSING:
            default = one.default_factory()
        if one.init and default is not MISSING and getattr(arguments, one.name) != default:
            found.add(one.name)
    return found

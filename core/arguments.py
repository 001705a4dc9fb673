"""The settings of every `train` verb beside those of its trainer; each field is a flag and a key of `--config`."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from .tokenize import TextLayout


@dataclass
class RunArguments:
    """Data, model, how text is read, and LoRA."""

    data: str = field(metadata={"help": "Training comparisons: file, saved datasets folder, or hub name[:split]."})
    model: str = field(
        metadata={"help": "Folder or hub name of a decoder; for a reward model also a stock one, whose head is e_0."}
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": "Validation comparisons, on which everything is chosen; by default a tenth of the training prompts."
        },
    )
    tuning: Literal["frozen", "lora", "full"] = field(
        default="lora", metadata={"help": "What is trained of the language model beside the users' vectors."}
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
            "help": "Layers that get LoRA, by number; by default all. With linear heads and "
            "--gradient-checkpointing False nothing is run backward below the lowest. Needs --lora-target-modules with "
            "names."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilized LoRA."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA)."})
    columns: list[str] = field(default_factory=list, metadata={"help": "field=column where a column has another name."})
    max_bad_rows: int = field(default=0, metadata={"help": "Unusable rows that may be left out (counted)."})
    missing_user: Literal["refuse", "generic"] = field(
        default="refuse", metadata={"help": "Rows without user id: refuse, or give them to the unknown user."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a run that output_dir already holds."})
    publish_users: bool = field(
        default=False, metadata={"help": "With --push-to-hub: publish users' ids and vectors too."}
    )

    def layout(self, config: Any) -> TextLayout:
        return TextLayout(self.chat_template, self.user_text, config.max_length, self.over_long)

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


_LORA_ONLY = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers", "use_rslora", "use_dora")
# Of TRL's configuration: what it would do is done here in another place, or is not done at all.
NOT_READ = {
    "chat_template_path": "the tokenizer's own template is used; see --chat-template",
    "eos_token": "the tokenizer's own is used",
    "pad_token": "the tokenizer's own is used",
    "model_init_kwargs": "see --dtype",
    "trust_remote_code": "no code of a model is ever run",
    "dataset_num_proc": "rows are tokenized in one process",
    "remove_unused_columns": "rows hold what the trainer reads and nothing else",
    "label_smoothing_factor": "no loss of TRL's trainers reads it",
    "hub_strategy": "checkpoints are never pushed, they hold users' vectors",
    "hub_always_push": "checkpoints are never pushed, they hold users' vectors",
    "hub_revision": "the main branch is pushed to",
    "use_liger_kernel": "TRL is about to drop it",
    "do_train": "the command trains",
    "do_predict": "see `prlhf eval preference`",
}
_HUB_ONLY = ("publish_users", "hub_model_id", "hub_token", "hub_private_repo")


def refuse_idle_flags(
    arguments: Any, config: Any, named: set[str], own: Callable[[str, bool], str | None] = lambda name, trained: None
) -> None:
    """Raises where a flag was given that would change nothing.

    Args:
        named: fields that the command line and the configuration file name; others may have been derived from these.
        own: of the verb: name of a flag, and whether it is the trainer's -> why it changes nothing, or None.

    Raises:
        ValueError: names the flag and what it belongs to.
    """
    given, trained = _changed(arguments) & named, _changed(config) & named
    for name in sorted(given | trained):
        why = own(name, name in trained) or _idle(name, name in trained, arguments, config)
        if why:
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


def _idle(name: str, trained: bool, arguments: Any, config: Any) -> str | None:
    if trained and name in NOT_READ:
        return f"not read here: {NOT_READ[name]}"
    for is_so, why in (
        (arguments.tuning != "lora" and name in _LORA_ONLY, "is of LoRA; add --tuning lora"),
        (
            name == "lora_dropout" and config.disable_dropout,
            "TRL sets every dropout to 0; add --disable-dropout False",
        ),
        (name == "user_clusters" and config.user_model != "cluster", "is of clusters; add --user-model cluster"),
        (
            name == "user_shared" and config.user_model != "individualized",
            f"is of individualized users; the {config.user_model} user model has no e_0",
        ),
        (
            name == "user_loss" and config.user_loss_alpha in (0, 1),
            f"changes nothing where --user-loss-alpha is {config.user_loss_alpha:g}",
        ),
        (name in _HUB_ONLY and not config.push_to_hub, "is of publishing; add --push-to-hub"),
    ):
        if is_so:
            return why
    return None


def _changed(arguments: Any) -> set[str]:
    """Fields that are not what they are by default."""
    plain = type(arguments)(output_dir=arguments.output_dir) if hasattr(arguments, "output_dir") else None
    found = set()
    for one in fields(arguments):
        default = getattr(plain, one.name) if plain else one.default
        if not plain and one.default_factory is not MISSING:
            default = one.default_factory()
        if one.init and default is not MISSING and getattr(arguments, one.name) != default:
            found.add(one.name)
    return found

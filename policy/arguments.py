"""The settings of `prlhf policy train` beside those of the trainer; each field is a flag and a key of `--config`."""

from dataclasses import dataclass, field

from ..core.arguments import RunArguments
from ..core.arguments import refuse_idle_flags as refuse_idle
from .trainer import PersonalizedDPOConfig


@dataclass
class PolicyArguments(RunArguments):
    """What every `train` verb has, and the reference."""

    ref_model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of the reference; by default the model that training starts from."},
    )


_NOT_READ = {
    "truncation_mode": "see --over-long",
    "padding_free": "TRL has it switched off for the time being",
    "precompute_ref_batch_size": "the reference's batches are as large as their tokens allow",
}
_SYNC_ONLY = ("ref_model_mixup_alpha", "ref_model_sync_steps")


def refuse_idle_flags(arguments: PolicyArguments, config: PersonalizedDPOConfig, named: set[str]) -> None:
    """Raises where a flag was given that would change nothing; see `core.arguments`.

    Raises:
        ValueError: names the flag and what it belongs to.
    """
    losses = set(config.loss_type)

    def own(name: str, trained: bool) -> str | None:
        if trained and name in _NOT_READ and (config.ld_alpha is None or name != "precompute_ref_batch_size"):
            return f"not read here: {_NOT_READ[name]}"
        for is_so, why in (
            (name in _SYNC_ONLY and not config.sync_ref_model, "is of a reference that follows; add --sync-ref-model"),
            (
                name == "sync_ref_model" and arguments.tuning == "lora",
                "is of --tuning full: with LoRA the reference is the model below the adapter",
            ),
            (
                name == "learning_rate" and arguments.tuning == "frozen",
                "nothing of the language model is trained; see --user-learning-rate",
            ),
            (name == "ipo_sum_beta" and "ipo_sum" not in losses, "is of the loss ipo_sum, and --loss-type has none"),
            (name == "discopop_tau" and "discopop" not in losses, "is of the loss discopop, and --loss-type has none"),
            (
                name == "f_alpha_divergence_coef" and config.f_divergence_type != "alpha_divergence",
                "is of --f-divergence-type alpha_divergence",
            ),
            (
                name == "label_smoothing" and not losses & {"robust", "exo_pair", "aot", "aot_unpaired"},
                "no loss of --loss-type reads it; robust, exo_pair, aot and aot_unpaired do",
            ),
            (name == "user_place" and not config.user_tokens, "changes nothing without user vectors (--user-tokens 0)"),
        ):
            if is_so:
                return why
        return None

    refuse_idle(arguments, config, named, own)

"""What training a reward model and training a policy share: the rows, and what a run records of itself."""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from .backbone import unwrapped
from .comparisons import Comparison, Comparisons, DataError
from .compiled import compiled_layers
from .figures import wilson
from .pairs import TokenPairs, token_pairs
from .pretrained import Backbone
from .sharded import check_sharding
from .splits import data_hash
from .texts import over_long_by_user, over_long_notice
from .tokenize import RowTokenizer, TextLayout
from .tuned import TUNINGS
from .users import UserIndex, UserModel
from .validation import correct


@dataclass
class TrainingRows:
    """Training and validation rows as token ids, their users, and what the length policy met."""

    pairs: list[TokenPairs]
    over_long: list[dict[str, int]]
    users: UserIndex

    @classmethod
    def of(
        cls, train: Comparisons, validation: Comparisons, backbone: Backbone, layout: TextLayout, args: Any
    ) -> "TrainingRows":
        tokenizer = RowTokenizer(backbone.tokenizer, layout)
        pairs = [token_pairs(rows, tokenizer) for rows in (train, validation)]
        over_long = [over_long_by_user(rows, p.over) for rows, p in zip((train, validation), pairs, strict=True)]
        tell_over_long(over_long, layout)
        users = users_of(pairs[0].rows, train.source, args.user_model)
        users.facts = user_facts(pairs[0].rows, over_long[0])
        if args.user_place == "after_bos":
            check_bos(pairs[0], backbone.tokenizer.bos_token_id)
        return cls(pairs, over_long, users)

    def figures(self) -> dict[str, Any]:
        names = ("train", "validation")
        return {
            "rows": {name: len(part.rows) for name, part in zip(names, self.pairs, strict=True)},
            "over_long": {name: sum(c.values()) for name, c in zip(names, self.over_long, strict=True)},
        }


def check_bos(pairs: TokenPairs, bos: int | None) -> None:
    for row, tokens in zip(pairs.rows, pairs.chosen, strict=True):
        if bos is None or tokens.prompt_ids[:1] != (bos,):
            raise DataError(
                f"{row.place}: does not begin with the BOS token, so --user-place after_bos has no place for the user; "
                "use prepend"
            )


def run_trainer(trainer: Any, rows: TrainingRows, parts: Sequence[Comparisons]) -> dict[str, Any]:
    """Trains, evaluates what was kept, and gives the run's figures.

    Args:
        parts: training and validation comparisons as they were given.
    """
    args = trainer.args
    told = json.dumps([rows.users.ids, *(data_hash(part.rows) for part in rows.pairs)])
    trainer.data_key = hashlib.sha256(told.encode()).hexdigest()[:16]
    check_sharding(trainer)
    if not any(p.requires_grad for p in trainer.model.parameters()):
        raise ValueError("nothing is left to train: a frozen language model, and users without vectors")
    begun = time.time()
    with compiled_layers(trainer.model, args.compile_layers):
        trainer.train(args.resume_from_checkpoint)
        trainer.evaluate()
    spent = {"training_seconds": round(time.time() - begun, 1), **costs(trainer)}
    if args.resume_from_checkpoint:
        spent["resumed_from"] = str(args.resume_from_checkpoint).rpartition("-")[2]  # the seconds are those since then
    left_out = {name: part.dropped_counts for name, part in zip(("train", "validation"), parts, strict=True)}
    return {**rows.figures(), "left_out": left_out, **validation_figures(trainer.margins(), rows.users), **spent}


def trainer_settings(trainer: Any, user_model: UserModel, tuning: str) -> dict[str, Any]:
    """What a run records of how it was trained."""
    args = trainer.args
    return {
        "tuning": tuning,
        "user_model": args.user_model,
        "user_options": user_model.options(),
        "user_tokens": args.user_tokens,
        "user_place": args.user_place,
        "user_loss_alpha": args.user_loss_alpha,
        "user_loss": args.user_loss,
        "user_learning_rate": trainer.user_learning_rate(),
        "learning_rate": args.learning_rate,
        "epochs": args.num_train_epochs,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes,
        "seed": args.seed,
    }


def check_tuning(tuning: str, peft_config: Any) -> None:
    """Raises where there is no such tuning, or a peft configuration is missing or idle."""
    if tuning not in TUNINGS or (tuning == "lora") != (peft_config is not None):
        raise ValueError(f"tuning {tuning!r}: must be one of {', '.join(TUNINGS)}; lora needs a peft_config")


def resolved_layout(backbone: Backbone, layout: TextLayout, user_tokens: int = 0) -> TextLayout:
    """The layout with its defaults filled in, within what the model can read beside the users' vectors."""
    resolved = RowTokenizer(backbone.tokenizer, layout).layout
    return replace(resolved, max_length=min(resolved.max_length, backbone.max_length - user_tokens))


def plain_forward(module: Any) -> None:
    """Takes off what accelerate and TRL put around a module's forward, under which scores differ from a loaded run's.

    That is accelerate's autocast, and TRL's fused LM head.
    """
    for inner in (module, unwrapped(module)):
        for name in ("forward", "_original_forward"):
            vars(inner).pop(name, None)
    module.eval().requires_grad_(False)


def costs(trainer: Any) -> dict[str, Any]:
    state = trainer.state
    kept = state.best_model_checkpoint or ""
    return {
        "steps": state.global_step,
        "best_step": int(kept.rpartition("-")[2]) if kept else state.global_step,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_memory_gb": _peak_memory(),
        "log": [dict(entry) for entry in state.log_history],
    }


def _peak_memory() -> float | None:
    """Most memory that this process held, on the GPU where there is one, in GiB; None where nobody counts it."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(peak / 2**30, 2)


def validation_figures(margins: pd.DataFrame, users: UserIndex) -> dict[str, Any]:
    """Log loss and accuracy on validation rows with the user and with row 0; each user's own go to the users' facts."""
    sides = {"personal": margins["margin"].to_numpy(), "row0": margins["margin_row0"].to_numpy()}
    right = {name: correct(m) for name, m in sides.items()}
    table = pd.DataFrame({"user": margins["user"], **right}).groupby("user")
    for number, part in table:
        user: int = number  # type: ignore[assignment]
        facts = users.facts.setdefault(users.ids[user - 1] if user else "", {})
        facts["validation"] = {"n": len(part), **{name: round(float(part[name].mean()), 4) for name in right}}
    return {
        "validation_log_loss": {name: float(np.logaddexp(0, -m).mean()) for name, m in sides.items()},
        "validation_accuracy": {name: wilson(float(values.sum()), len(values)) for name, values in right.items()},
    }


def tell_over_long(by_part: Sequence[dict[str, int]], layout: TextLayout) -> None:
    """Says on the terminal which training and validation rows the length policy met."""
    for name, by_user in zip(("train", "validation"), by_part, strict=True):
        if by_user:
            verb = {"truncate": "truncated", "drop": "dropped"}[layout.over_long]
            print(over_long_notice(name, by_user, layout, verb), file=sys.stderr)


def users_of(rows: Sequence[Comparison], source: str, user_model: str) -> UserIndex:
    """The users of the rows.

    Raises:
        DataError: there are none, and the user model needs some.
    """
    users = UserIndex.seen_in(row.user.id for row in rows)
    if user_model != "uniform" and len(users) == 1:
        raise DataError(f"{source}: no row has a user id, so there is no user to learn; use --user-model uniform")
    return users


def user_facts(rows: Sequence[Comparison], over_long: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Per user id ("" for rows without one): comparisons, over-long ones, how often the longer response was chosen."""
    by_user: dict[str, list[Comparison]] = defaultdict(list)
    for row in rows:
        by_user[row.user.id or ""].append(row)
    return {
        user: {**length_facts(mine), "over_long": over_long.get(user, 0), "origin": "trained"}
        for user, mine in sorted(by_user.items())
    }


def length_facts(rows: Sequence[Comparison]) -> dict[str, int]:
    """What the length rules of the evaluation need to know of a user's training rows."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts["longer_chosen"] += len(row.chosen) > len(row.rejected)
        counts["shorter_chosen"] += len(row.chosen) < len(row.rejected)
    return {"comparisons": len(rows), **counts}


def common_settings(backbone: Backbone, layout: TextLayout, train: Comparisons) -> dict[str, Any]:
    """What every run records of the model it started from, of its data, and of how it reads text."""
    return {
        "layout": layout.to_dict(),
        "reads_user_text": layout.user_text == "input" and any(row.user.text for row in train),
        "model": model_facts(backbone),
        "data": {"source": train.source, "hash": data_hash(list(train))},
    }


def model_facts(backbone: Backbone) -> dict[str, Any]:
    """What a run records of a model, by which it is found again and checked."""
    source = backbone.source
    return {
        "name": source.name,
        "path": str(source.path.resolve()) if source.is_folder else "",
        "label": source.label,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "fingerprint": backbone.fingerprint,
        "text_hash": backbone.text_hash,
    }

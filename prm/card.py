"""The model card of a run: what it is, what it was trained on, how far users differ."""

from typing import Any

import numpy as np

_CARD = """---
library_name: prlhf
tags: [prlhf, reward-model, personalization]
---

# Personalized reward model

{what} **{label}**, user model `{user_model}`, `{pooling}` pooling (P-RM, arXiv 2402.05133, F.2).

```python
from prlhf import PersonalizedRewardModel

model = PersonalizedRewardModel.from_pretrained("THIS FOLDER")
model.rank("prompt", ["one response", "another"], users=["a user id"])[0].best
```

| | |
| --- | --- |
{rows}

Validation figures chose {chosen}, so they flatter; measure on other rows with `prlhf eval preference`.
The user vectors are personal data.
"""
_WHAT = {
    ("linear_head", "frozen"): "Linear heads on the frozen",
    ("linear_head", "lora"): "Linear heads, trained with LoRA on",
    ("linear_head", "full"): "Linear heads, trained together with",
    ("soft_prompt", "frozen"): "Soft prompts of {user_tokens} vectors before the frozen",
    ("soft_prompt", "lora"): "Soft prompts of {user_tokens} vectors, trained with LoRA on",
    ("soft_prompt", "full"): "Soft prompts of {user_tokens} vectors, trained together with",
}


def card(settings: dict[str, Any], figures: dict[str, Any], spread: np.ndarray) -> str:
    """README.md of a run.

    Args:
        spread: (U - 1,) distance of each user's vector from row 0, relative to row 0's norm.
    """
    heads = "base_strength" in figures
    losses = figures["validation_log_loss"]
    shown = ", ".join(f"{losses[key]:.4f} {word}" for key, word in _LOSSES.items() if key in losses)
    rows = {
        "trained on": f"{figures['rows']['train']:,} comparisons; {len(spread):,} users now known; "
        f"data hash `{settings['data']['hash']}`",
        "chosen on": f"{figures['rows']['validation']:,} validation comparisons",
        "validation log loss": shown,
        "weight of the user's loss (alpha)": str(settings["user_loss_alpha"]),
        **(_strengths(figures) if heads else _training(settings, figures)),
        "how far users are from row 0, relative to its norm": _spread(spread),
    }
    what = _WHAT[settings["aggregator"], settings.get("tuning", "frozen")]
    return _CARD.format(
        what=what.format(user_tokens=settings.get("user_tokens")),
        label=settings["model"]["label"],
        user_model=settings["user_model"],
        pooling=settings["pooling"],
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        chosen="the strengths above" if heads else "the step that was kept",
    )


_LOSSES = {"personal": "personal", "uniform": "uniform", "row0": "row 0"}


def _strengths(figures: dict[str, Any]) -> dict[str, str]:
    return {"strengths": f"e_0 {figures['base_strength']:g}, users {figures['user_strength']:g}"}


def _training(settings: dict[str, Any], figures: dict[str, Any]) -> dict[str, str]:
    since = f" since step {figures['resumed_from']}" if "resumed_from" in figures else ""
    return {
        "steps": f"{figures['steps']:,} of {settings['batch_size']} comparisons, kept: step {figures['best_step']:,}",
        "learning rates": f"{settings['learning_rate']:g}, users {settings['user_learning_rate']:g}",
        "cost": f"{figures['trainable_parameters']:,} trainable parameters, {figures['training_seconds']:,.0f} s"
        f"{since}, {figures['peak_memory_gb'] or float('nan'):.1f} GB",
    }


def _spread(spread: np.ndarray) -> str:
    """Quantiles over users: whether the vectors differ at all, and whether a few people stand far out."""
    if not len(spread):
        return "no users"
    low, middle, high = np.quantile(spread, [0.1, 0.5, 0.9])
    return f"median {middle:.2f}, a tenth below {low:.2f}, a tenth above {high:.2f}, largest {spread.max():.2f}"

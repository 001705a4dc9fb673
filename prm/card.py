"""The model card of a reward model: what it is, what it was trained on, how far users differ."""

from typing import Any

import numpy as np

from ..core.card import card_rows

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
    rows = card_rows(settings, figures, spread)
    what = _WHAT[settings["aggregator"], settings.get("tuning", "frozen")]
    return _CARD.format(
        what=what.format(user_tokens=settings.get("user_tokens")),
        label=settings["model"]["label"],
        user_model=settings["user_model"],
        pooling=settings["pooling"],
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        chosen="the strengths above" if "base_strength" in figures else "the step that was kept",
    )

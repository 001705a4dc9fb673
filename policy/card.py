"""The model card of a policy: what it is, what it was trained on, how far users differ."""

from typing import Any

import numpy as np

from ..core.card import card_rows

_CARD = """---
library_name: prlhf
tags: [prlhf, dpo, personalization]
---

# Personalized policy

Soft prompts of {tokens} vectors {tuning} **{label}**, user model `{user_model}` (P-DPO, arXiv 2402.05133, 4.4).

```python
from prlhf import GenerateRequest, PersonalizedPolicy, User

policy = PersonalizedPolicy.from_pretrained("THIS FOLDER")
for candidate in policy.generator().generate([GenerateRequest("prompt", user=User("a user id"))]):
    print(candidate.text)
```

| | |
| --- | --- |
{rows}

Validation figures chose the step that was kept, so they flatter; measure on other rows with `prlhf eval preference`.
The user vectors are personal data.
"""
_TUNING = {
    "frozen": "before the frozen",
    "lora": "trained with LoRA on",
    "full": "trained together with",
}


def card(settings: dict[str, Any], figures: dict[str, Any], spread: np.ndarray) -> str:
    """README.md of a run.

    Args:
        spread: (U - 1,) distance of each user's vectors from row 0, relative to row 0's norm.
    """
    losses = zip(settings["loss_type"], settings["loss_weights"], strict=True)
    own = {
        "loss": ", ".join(f"{weight:g} x {name}" for name, weight in losses),
        "beta": f"{settings['beta']:g}",
        "reference": settings["reference"]["name"] if settings["reference"]["separate"] else "the starting model",
    }
    rows = {**own, **card_rows(settings, figures, spread)}
    return _CARD.format(
        tokens=settings["user_tokens"],
        tuning=_TUNING[settings["tuning"]],
        label=settings["model"]["label"],
        user_model=settings["user_model"],
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )

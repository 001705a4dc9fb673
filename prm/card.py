"""The model card of a run: what it is, what it was trained on, how far users differ."""

from typing import Any

import numpy as np

_CARD = """---
library_name: prlhf
tags: [prlhf, reward-model, personalization]
---

# Personalized reward model

Linear heads on the frozen **{label}**, user model `{user_model}`, `{pooling}` pooling (P-RM, arXiv 2402.05133, F.2).

```python
from prlhf import PersonalizedRewardModel

model = PersonalizedRewardModel.from_pretrained("THIS FOLDER")
model.rank("prompt", ["one response", "another"], users=["a user id"])[0].best
```

| | |
| --- | --- |
| trained on | {train:,} comparisons; {users:,} users now known; data hash `{data}` |
| chosen on | {validation:,} validation comparisons |
| validation log loss | {personal:.4f} personal, {uniform:.4f} uniform |
| weight of the user's loss (alpha) | {alpha} |
| strengths | e_0 {base_strength:g}, users {user_strength:g} |
| how far users are from row 0, relative to its norm | median {median:.2f}, largest {largest:.2f} |

Validation figures chose the strengths above, so they flatter; measure on other rows with `prlhf eval preference`.
The user vectors are personal data.
"""


def card(settings: dict[str, Any], figures: dict[str, Any], spread: np.ndarray) -> str:
    """README.md of a run.

    Args:
        spread: (U - 1,) distance of each user's vector from row 0, relative to row 0's norm.
    """
    return _CARD.format(
        label=settings["model"]["label"],
        user_model=settings["user_model"],
        pooling=settings["pooling"],
        users=len(spread),
        data=settings["data"]["hash"],
        alpha=settings["user_loss_alpha"],
        median=float(np.median(spread)) if len(spread) else 0.0,
        largest=float(spread.max()) if len(spread) else 0.0,
        base_strength=figures["base_strength"],
        user_strength=figures["user_strength"],
        **figures["rows"],
        **figures["validation_log_loss"],
    )

"""The model card of a run: what it is, what it was trained on, how far users differ."""

from typing import Any

import numpy as np

from .reward_model import PersonalizedRewardModel

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
| trained on | {train:,} comparisons, {users:,} users, data hash `{data}` |
| chosen on | {validation:,} validation comparisons |
| validation log loss | {personal:.4f} personal, {uniform:.4f} uniform |
| weight of the user's loss (alpha) | {alpha} |
| strengths | e_0 {base_strength:g}, users {user_strength:g} |
| how far users are from row 0, relative to its norm | median {median:.2f}, largest {largest:.2f} |

Validation figures chose the strengths above, so they flatter; measure on other rows with `prlhf eval preference`.
The user vectors are personal data.
"""


def card(model: PersonalizedRewardModel, figures: dict[str, Any]) -> str:
    """README.md of a run."""
    spread = model.user_model.spread()[1:].numpy()
    made = model.settings
    return _CARD.format(
        label=made["model"]["label"],
        user_model=made["user_model"],
        pooling=made["pooling"],
        users=len(model.users) - 1,
        data=made["data"]["hash"],
        alpha=made["user_loss_alpha"],
        median=float(np.median(spread)) if len(spread) else 0.0,
        largest=float(spread.max()) if len(spread) else 0.0,
        base_strength=figures["base_strength"],
        user_strength=figures["user_strength"],
        **figures["rows"],
        **figures["validation_log_loss"],
    )

"""How heads are trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HeadConfig:
    """How heads are trained.

    Attributes:
        user_model: `uniform`, `individualized` or `cluster`.
        user_loss_alpha: weight of the loss with the user, against that of the unknown user.
        base_strengths, user_strengths: candidates for the strength with which e_0 is held to its starting value and
            offsets (or centres, to their mean) to zero; chosen by log loss on validation rows.
        user_options: further options of the user model (`clusters`, `shared`).
        max_epochs, patience: training stops when validation log loss has not improved for `patience` epochs.
    """

    user_model: str = "individualized"
    user_loss_alpha: float = 0.5
    base_strengths: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    user_strengths: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    user_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.01
    batch_size: int = 256
    max_epochs: int = 100
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.user_loss_alpha <= 1:
            raise ValueError(f"user_loss_alpha must lie between 0 and 1, found {self.user_loss_alpha}")
        for name in ("base_strengths", "user_strengths"):
            values = getattr(self, name)
            if not values or not all(0 <= value < float("inf") for value in values):
                raise ValueError(f"{name} must be numbers of at least 0, found {list(values)}")
        for name, least in (("batch_size", 1), ("max_epochs", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of the heads must be at least {least}, found {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate of the heads must be greater than 0, found {self.learning_rate}")

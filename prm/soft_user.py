"""A new user's soft prompt: their own vectors are fitted by gradient, with everything else frozen.

How many passes over their comparisons are right is chosen by cross-validation on these comparisons, none being among
the candidates, which leaves the user at row 0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from ..core.backbone import unwrapped
from ..core.comparisons import Comparison, Comparisons
from ..core.pairs import token_pairs
from ..core.tokenize import TokenRow
from ..core.users import ClusterUsers, UserModel
from .module import row_inputs

if TYPE_CHECKING:
    from .reward_model import PersonalizedRewardModel

EPOCHS = 4
BATCH = 8  # comparisons


class OneUser(UserModel):
    """Row 0 of a user model plus one user's own part, the only parameter: an offset, or cluster logits."""

    name = "one user"
    start: Tensor
    centres: Tensor | None

    def __init__(self, users: UserModel):
        super().__init__(1, users.row0().detach())
        centres = users.centres.detach() if isinstance(users, ClusterUsers) else None  # (C, K*D)
        start = users.row0().detach().reshape(-1)
        self.register_buffer("start", start)
        self.register_buffer("centres", centres)
        own = users.logits.weight[0].detach().clone() if isinstance(users, ClusterUsers) else torch.zeros_like(start)
        self.own = nn.Parameter(own)

    def forward(self, user_ids: Tensor) -> Tensor:
        flat: Tensor = self.start + self.own if self.centres is None else self.own.softmax(0) @ self.centres
        return flat.reshape(self.shape).expand(len(user_ids), *self.shape)


@dataclass
class _Fits:
    """A new user's comparisons, and fits on some of them.

    Attributes:
        sides: token rows of all chosen responses, then of all rejected ones.
    """

    module: Any
    users: UserModel
    sides: list[TokenRow]
    learning_rate: float
    bar: Any

    def margins(self, own: OneUser, which: np.ndarray) -> Tensor:
        """Margins (len(which),) of comparisons under one user's vectors."""
        half = len(self.sides) // 2
        rows = [self.sides[i] for i in (*which, *(which + half))]
        with attached(self.module, own):
            out = self.module(**row_inputs(rows, own.device), user_ids=torch.zeros(len(rows), dtype=torch.int64))
        chosen, rejected = out.logits[:, 0].chunk(2)
        return chosen - rejected

    def steps(self, train: np.ndarray, judged: np.ndarray, epochs: int) -> tuple[OneUser, np.ndarray]:
        """Fits on some comparisons; the fit, and margins (epochs + 1, len(judged)) of others after each epoch."""
        own = OneUser(self.users).to(self.users.device)
        optimizer = torch.optim.Adam([own.own], lr=self.learning_rate)
        found = np.zeros((epochs + 1, len(judged)))
        for epoch in range(epochs + 1):
            with torch.no_grad():
                found[epoch] = np.concatenate(
                    [np.zeros(0), *(self.margins(own, part).numpy() for part in _batches(judged))]
                )
            for part in _batches(train, epoch) if epoch < epochs else ():
                optimizer.zero_grad()
                softplus(-self.margins(own, part)).mean().backward()
                optimizer.step()
            self.bar.update(epoch < epochs)
        return own, found


def fit_soft_user(
    model: "PersonalizedRewardModel", rows: Sequence[Comparison], parts: np.ndarray
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Fits a new user's own part.

    Args:
        parts: (k,) fold of each comparison.

    Returns:
        offset (K*D,) or cluster logits (C,); margins (k,) of each comparison when it was held out, and under row 0.
    """
    pairs = token_pairs(Comparisons(list(rows), "the new user's rows"), model.reader.tokenizer)
    everything, folds = np.arange(len(pairs.rows)), int(parts.max()) + 1
    total = EPOCHS * (folds + 1) if folds > 1 else 0
    with tqdm(total=total, desc="new user", unit="pass", disable=not model.show) as bar:
        sides = [*pairs.chosen, *pairs.rejected]
        fits = _Fits(unwrapped(model.module), model.user_model, sides, model.settings["user_learning_rate"], bar)
        held = np.zeros((EPOCHS + 1, len(everything)))
        for fold in range(folds if folds > 1 else 0):
            out = parts == fold
            _, held[:, out] = fits.steps(everything[~out], everything[out], EPOCHS)
        # One comparison, or comparisons of one kind, can't tell how far to go, so such a user stays at row 0.
        best = int(np.logaddexp(0, -held).mean(1).argmin()) if folds > 1 else 0
        own, row0 = fits.steps(everything, everything, best)
    return own.own.detach().cpu(), held[best] if folds > 1 else row0[0], row0[0]


def _batches(which: np.ndarray, epoch: int | None = None) -> list[np.ndarray]:
    """Batches of comparisons, in random order where an epoch is given."""
    order = which if epoch is None else np.random.default_rng(epoch).permutation(which)
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


@contextmanager
def attached(module: Any, users: UserModel) -> Iterator[None]:
    """The module reads these vectors for as long as the context lasts."""
    backbone = module.base_model
    kept = backbone.user_model
    backbone.user_model = users
    try:
        yield
    finally:
        backbone.user_model = kept

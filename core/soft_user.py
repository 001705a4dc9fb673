"""A new user's soft prompt: their own vectors are fitted by gradient, with everything else frozen.

How many passes over their comparisons are right is chosen by cross-validation on these comparisons, none being among
the candidates, which leaves the user at row 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from .mixture import fit_mixture
from .users import ClusterUsers, UniformUsers, UserModel

EPOCHS = 4
BATCH = 8  # comparisons
MIXTURE_STRENGTH = 1.0  # of row 0's mixture, in comparisons, where a cluster user's fit begins


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


Margins = Callable[[Sequence[int]], Tensor]
"""Numbers of comparisons -> score(chosen) - score(rejected) of each under row 0 of what the module reads now."""


@dataclass
class _Fits:
    """Fits on some of a new user's comparisons."""

    module: Any
    users: UserModel
    margins_now: Margins
    learning_rate: float
    bar: Any

    def margins(self, users: UserModel, which: np.ndarray) -> Tensor:
        """Margins (len(which),) of comparisons under row 0 of a user model."""
        with attached(self.module, users):
            return self.margins_now(which.tolist())

    @torch.no_grad()
    def judged(self, users: UserModel, which: np.ndarray) -> np.ndarray:
        """The same for any number of comparisons, without a gradient."""
        return np.concatenate([np.zeros(0), *(self.margins(users, part).cpu().numpy() for part in _batches(which))])

    def start(self, per_centre: np.ndarray | None, which: np.ndarray) -> OneUser:
        """Where a fit on some comparisons begins: row 0, or the mixture whose centres' margins fit them best.

        A trained mixture is nearly one centre, so a gradient in its logits nearly vanishes and finds no other one.
        """
        own = OneUser(self.users).to(self.users.device)
        if per_centre is not None:
            prior = own.own.detach().cpu().numpy()
            with torch.no_grad():
                own.own.copy_(torch.from_numpy(fit_mixture(per_centre[which], prior, MIXTURE_STRENGTH)))
        return own

    def steps(self, own: OneUser, train: np.ndarray, held: np.ndarray, epochs: int) -> np.ndarray:
        """Fits on some comparisons; margins (epochs + 1, len(held)) of others before and after each epoch."""
        optimizer = torch.optim.Adam([own.own], lr=self.learning_rate)
        found = [self.judged(own, held)]
        for epoch in range(epochs):
            for part in _batches(train, epoch):
                optimizer.zero_grad()
                softplus(-self.margins(own, part)).mean().backward()
                optimizer.step()
            found.append(self.judged(own, held))
            self.bar.update()
        return np.stack(found)


def fit_soft_user(
    module: Any, users: UserModel, margins: Margins, parts: np.ndarray, learning_rate: float, show: bool = False
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Fits a new user's own part.

    Args:
        module: a transformers model over a personalized backbone.
        margins: of comparisons by their numbers, below k.
        parts: (k,) fold of each comparison.

    Returns:
        offset (K*D,) or cluster logits (C,); margins (k,) of each comparison when it was held out, and under row 0.
    """
    everything, folds = np.arange(len(parts)), int(parts.max()) + 1
    with tqdm(total=EPOCHS * (folds + 1), desc="new user", unit="pass", disable=not show) as bar:
        fits = _Fits(module, users, margins, learning_rate, bar)
        row0 = fits.judged(OneUser(users).to(users.device), everything)
        if folds == 1:  # comparisons of one prompt can't tell how far to go, so such a user stays at row 0
            return OneUser(users).own.detach().cpu(), row0, row0
        per_centre = _per_centre(fits, users, everything)
        held = np.zeros((EPOCHS + 2, len(parts)))
        held[0] = row0  # a candidate too
        for fold in range(folds):
            out = parts == fold
            own = fits.start(per_centre, everything[~out])
            held[1:, out] = fits.steps(own, everything[~out], everything[out], EPOCHS)
        best = int(np.logaddexp(0, -held).mean(1).argmin())
        own = OneUser(users) if not best else fits.start(per_centre, everything)
        fits.steps(own, everything, everything[:0], max(best - 1, 0))
    return own.own.detach().cpu(), held[best], row0


def _per_centre(fits: _Fits, users: UserModel, which: np.ndarray) -> np.ndarray | None:
    """Margins (k, C) of comparisons under each centre of a cluster model; None for others."""
    if not isinstance(users, ClusterUsers):
        return None
    centres = [UniformUsers(1, centre.reshape(users.shape)).to(users.device) for centre in users.centres]
    return np.stack([fits.judged(centre, which) for centre in centres], axis=1)


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

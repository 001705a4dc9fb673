"""The linear head: a user's vector is the head, `r = <e_u, h>`, over states that do not depend on the user."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.comparisons import Comparison
from ..core.mixture import fit_mixture
from ..core.scoring import ScoreRequest
from ..core.texts import Text, texts_of, texts_of_requests
from ..core.users import ClusterUsers, UserIndex, UserModel
from .new_user import OffsetPrior, fit_offsets

if TYPE_CHECKING:
    from .reward_model import PersonalizedRewardModel

CHUNK = 16384  # requests that are scored together


@dataclass
class LinearHead:
    """What a linear-head model holds beside the users' vectors.

    Attributes:
        uniform: (D,) head of the uniform model trained on the same rows, the baseline of every figure; None where the
            backbone was trained too, and a uniform model would be another run.
        scale: differences of hidden states are divided by it where heads are fitted.
        prior: of a new user's offset, in units of scaled features; None where users have no offsets.
    """

    uniform: Tensor | None
    scale: float
    prior: OffsetPrior | None

    aggregator = "linear_head"

    def tensors(self) -> dict[str, Tensor]:
        prior = self.prior or OffsetPrior(0.0, np.zeros((0, 0), dtype=np.float32))
        own = {} if self.uniform is None else {"uniform": self.uniform.contiguous()}
        return {
            **own,
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "prior_isotropic": torch.tensor(prior.isotropic if self.prior else -1.0, dtype=torch.float64),
            "prior_factor": torch.from_numpy(np.ascontiguousarray(prior.factor)),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "LinearHead":
        isotropic = float(tensors["prior_isotropic"])
        prior = OffsetPrior(isotropic, tensors["prior_factor"].numpy()) if isotropic >= 0 else None
        return cls(tensors.get("uniform"), float(tensors["scale"]), prior)

    def without_users(self) -> "LinearHead":
        """The same head without what users' vectors can be read from."""
        prior = OffsetPrior(self.prior.isotropic, self.prior.factor[:0]) if self.prior else None
        return LinearHead(self.uniform, self.scale, prior)

    def prepare(self, model: "PersonalizedRewardModel", requests: Sequence[ScoreRequest], show: bool) -> None:
        """Computes and caches the states that scoring the requests will need, with one progress bar for all of them."""
        model.reader.positions(texts_of_requests(requests), show)

    def prepare_rows(self, model: "PersonalizedRewardModel", rows: Sequence[Comparison]) -> None:
        """Computes and caches the states that a fit on comparisons will need."""
        model.reader.positions(texts_of(rows), model.show)

    @torch.no_grad()
    def score(
        self,
        model: "PersonalizedRewardModel",
        requests: Sequence[ScoreRequest],
        user_model: UserModel,
        index: UserIndex,
    ) -> list[Tensor]:
        """Scores (N,) of each request; a response is run through the backbone once, however many users it has."""
        self.prepare(model, requests, model.show)
        scores: list[Tensor] = []
        for start in range(0, len(requests), CHUNK):
            chunk = requests[start : start + CHUNK]
            texts: list[Text] = texts_of_requests(chunk)
            distinct, places = np.unique(model.reader.positions(texts), return_inverse=True)
            states = model.reader.gather(distinct, model.settings["pooling"])  # (n, D)
            rows, which = index.rows([r.user.id for r in chunk]).unique(return_inverse=True)
            vectors = user_model(rows.to(user_model.device)).cpu()  # (users of the chunk, D)
            of_request = torch.from_numpy(places).split([len(r.responses) for r in chunk])
            # Row by row, not as one product, whose rounding depends on the row's place: equal responses tie exactly.
            scores += [(states[at] * vectors[i]).sum(1) for at, i in zip(of_request, which.tolist(), strict=True)]
        return scores

    def fit_user(
        self, model: "PersonalizedRewardModel", rows: Sequence[Comparison], parts: np.ndarray
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """A convex fit of a new user's own part on their comparisons.

        Args:
            parts: (k,) fold of each comparison; each fold is judged by a fit on the others.

        Returns:
            the user's own row of the table, offset (D,) or cluster logits (C,); margins (k,) of each comparison when it
            was held out, and under row 0.
        """
        z = self.scaled_differences(model, rows)
        row0 = self._row0(model)
        held = np.empty(len(z))
        for fold in range(parts.max() + 1):
            out = parts == fold
            held[out] = z[out] @ self._vector(model, self._fit(model, z[~out], row0))
        return torch.from_numpy(self._fit(model, z, row0)).float(), held, z @ row0

    def scaled_differences(self, model: "PersonalizedRewardModel", rows: Sequence[Comparison]) -> np.ndarray:
        """(B, D) differences chosen - rejected of pooled hidden states, in the units that heads are fitted in."""
        return model.reader.differences(rows, model.settings["pooling"], model.show).div_(self.scale).numpy()

    @torch.no_grad()
    def _row0(self, model: Any) -> np.ndarray:
        """e_0 in units of scaled features, (D,)."""
        return (model.user_model.row0().cpu() * self.scale).numpy()

    def _fit(self, model: Any, z: np.ndarray, row0: np.ndarray) -> np.ndarray:
        """A new user's own row of the table: offset (D,) or cluster logits (C,), from z (k, D)."""
        users = model.user_model
        if isinstance(users, ClusterUsers):
            centres = users.centres.detach().cpu().numpy() * self.scale  # (C, D)
            prior = users.logits.weight[0].detach().cpu().numpy()
            return fit_mixture(z @ centres.T, prior, model.settings["mixture_strength"])
        assert self.prior is not None  # individualized runs always have one
        return fit_offsets(z[None], (z @ row0)[None], self.prior)[0] / self.scale

    @torch.no_grad()
    def _vector(self, model: Any, own: np.ndarray) -> np.ndarray:
        """The vector (D,) that a fitted row stands for, in units of scaled features."""
        if isinstance(model.user_model, ClusterUsers):
            weights = torch.from_numpy(own).float().softmax(0)
            return (weights @ model.user_model.centres.cpu()).numpy() * self.scale
        return own * self.scale + self._row0(model)

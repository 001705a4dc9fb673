"""The soft prompt: a user's vectors stand before the text, one head reads the state, `r = <w, h(e_u, text)>`.

States depend on the user, so every response is run once for every user who is asked about; its score is cached.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.comparisons import Comparison
from ..core.pretrained import cache_dir
from ..core.scoring import ScoreRequest
from ..core.users import UserIndex, UserModel
from .features import KEY_BYTES, LAYOUT, FeatureStore, fill, texts_of_requests
from .module import rewards
from .soft_user import fit_soft_user

if TYPE_CHECKING:
    from .reward_model import PersonalizedRewardModel


@dataclass
class SoftPrompt:
    """What a soft-prompt model holds beside the users' vectors: the head w (D,)."""

    weight: Tensor

    aggregator = "soft_prompt"

    def tensors(self) -> dict[str, Tensor]:
        return {"score": self.weight.contiguous()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "SoftPrompt":
        return cls(tensors["score"])

    def without_users(self) -> "SoftPrompt":
        return self

    def prepare(self, model: "PersonalizedRewardModel", requests: Sequence[ScoreRequest], show: bool) -> None:
        """Computes and caches the scores of the requests, with one progress bar for all of them."""
        self._positions(model, requests, model.user_model, model.users, show)

    def prepare_rows(self, model: "PersonalizedRewardModel", rows: Sequence[Comparison]) -> None:
        """Nothing: a fit changes what every pass reads."""

    def score(
        self,
        model: "PersonalizedRewardModel",
        requests: Sequence[ScoreRequest],
        user_model: UserModel,
        index: UserIndex,
    ) -> list[Tensor]:
        """Scores (N,) of each request; every batch is on disk before the next begins, so a killed run goes on."""
        store, positions = self._positions(model, requests, user_model, index, model.show)
        scores = store.gather(positions, "score")[:, 0]
        return list(scores.split([len(r.responses) for r in requests]))

    def _positions(
        self, model: Any, requests: Sequence[ScoreRequest], user_model: UserModel, index: UserIndex, show: bool
    ) -> tuple[FeatureStore, np.ndarray]:
        store = FeatureStore(
            cache_dir() / "features" / f"{LAYOUT}-{model.backbone.fingerprint}-score", 1, poolings=("score",)
        )
        texts = texts_of_requests(requests)
        users = [row for r in requests for row in [index.row(r.user.id)] * len(r.responses)]
        marks = {row: self._mark(model, user_model, row) for row in set(users)}
        keys = [_joined(key, marks[row]) for key, row in zip(model.reader.keys(texts), users, strict=True)]
        missing = list({key: i for i, key in enumerate(keys) if key not in store}.values())
        if missing and len(set(keys)) > len(missing) and show:
            print(f"scores: {len(set(keys)) - len(missing):,} of {len(set(keys)):,} are cached", file=sys.stderr)
        rows = model.reader.tokenize([texts[i] for i in missing])

        def compute(batch: list[int]) -> np.ndarray:
            ids = torch.tensor([users[missing[i]] for i in batch])
            return rewards(model.module, [rows[i] for i in batch], ids)[:, None, None].numpy()

        fill(store, [keys[i] for i in missing], rows, compute, "scores" if show else "")
        return store, store.positions(keys)

    @torch.no_grad()
    def _mark(self, model: Any, user_model: UserModel, row: int) -> bytes:
        """What a score depends on beside the tokens and the backbone: the user's vectors, their place, the head."""
        vectors = user_model(torch.tensor([row], device=user_model.device))[0].cpu()  # (K, D)
        digest = hashlib.blake2b(f"{model.settings['user_place']} {model.settings['pooling']}".encode())
        for tensor in (vectors, self.weight):
            digest.update(tensor.float().contiguous().numpy().tobytes())
        return digest.digest()

    def fit_user(
        self, model: "PersonalizedRewardModel", rows: Sequence[Comparison], parts: np.ndarray
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """A new user's own part, by gradient with everything else frozen; see `LinearHead.fit_user` and `soft_user`."""
        return fit_soft_user(model, rows, parts)


def _joined(key: bytes, mark: bytes) -> bytes:
    return hashlib.blake2b(key + mark, digest_size=KEY_BYTES).digest()

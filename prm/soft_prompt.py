"""The soft prompt: a user's vectors stand before the text, one head reads the state, `r = <w, h(e_u, text)>`.

States depend on the user, so every response is run once for every user who is asked about; its score is cached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..core.backbone import unwrapped
from ..core.comparisons import Comparison
from ..core.pretrained import cache_dir
from ..core.row_cache import LAYOUT
from ..core.scoring import ScoreRequest
from ..core.soft_user import fit_soft_user
from ..core.texts import texts_of
from ..core.token_rows import row_inputs
from ..core.tokenize import TokenRow
from ..core.user_scores import mark_of, score_cache, user_scores
from ..core.users import UserIndex, UserModel
from .module import rewards

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
        self._scores(model, requests, model.user_model, model.users, show)

    def prepare_rows(self, model: "PersonalizedRewardModel", rows: Sequence[Comparison]) -> None:
        """Nothing: a fit changes what every pass reads."""

    def score(
        self,
        model: "PersonalizedRewardModel",
        requests: Sequence[ScoreRequest],
        user_model: UserModel,
        index: UserIndex,
    ) -> list[Tensor]:
        """Scores (N,) of each request, from the cache where they are there."""
        return self._scores(model, requests, user_model, index, model.show)

    def _scores(
        self,
        model: "PersonalizedRewardModel",
        requests: Sequence[ScoreRequest],
        user_model: UserModel,
        index: UserIndex,
        show: bool,
    ) -> list[Tensor]:
        store = score_cache(cache_dir() / "features" / f"{LAYOUT}-{model.backbone.fingerprint}-score")
        made = f"{model.settings['user_place']} {model.settings['pooling']}"
        return user_scores(
            model.reader,
            requests,
            index,
            store,
            lambda row: mark_of(user_model, row, made, self.weight),
            lambda rows, ids: rewards(model.module, rows, ids),
            show,
        )

    def fit_user(
        self, model: "PersonalizedRewardModel", rows: Sequence[Comparison], parts: np.ndarray
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """A new user's own part, by gradient with everything else frozen; see `LinearHead.fit_user` and `soft_user`."""
        sides, module = model.reader.tokenize(texts_of(rows)), unwrapped(model.module)

        def margins(which: Sequence[int]) -> Tensor:
            some: list[TokenRow] = [sides[i] for i in (*which, *(len(rows) + i for i in which))]
            nobody = torch.zeros(len(some), dtype=torch.int64, device=module.score.weight.device)
            return torch.sub(*module(**row_inputs(some, nobody.device), user_ids=nobody).logits[:, 0].chunk(2))

        return fit_soft_user(module, model.user_model, margins, parts, model.settings["user_learning_rate"], model.show)

"""PersonalizedRewardModel: scores and ranks responses per user (P-RM, appendix F.2 of the paper)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.comparisons import Comparison
from ..core.personal import PersonalizedModel
from ..core.pretrained import load_backbone
from ..core.scoring import Scorer, ScoreRequest
from ..core.tuned import load_tuned, tuned_backbone
from ..core.users import UniformUsers, UserIndex
from .card import card
from .features import FeatureReader, feature_reader
from .linear_head import LinearHead
from .soft_prompt import SoftPrompt

HEADS: dict[str, Any] = {head.aggregator: head for head in (LinearHead, SoftPrompt)}


@dataclass(kw_only=True)
class PersonalizedRewardModel(PersonalizedModel):
    """Reward `r(x, y, u)` of response y to prompt x for user u, and for the unknown user (row 0).

    With the linear head, `r = <e_u, h>`: h (D,) is the pooled last hidden state of the backbone, e_u the user's
    vector. With the soft prompt, e_u (K, D) stands before the text, and one head reads the pooled state. The backbone
    is frozen, or was trained too (by LoRA or in full).
    """

    kind: ClassVar[str] = "reward_model"
    head: LinearHead | SoftPrompt

    @classmethod
    def _parts(cls, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
        return {"head": HEADS[made["aggregator"]].of(load_file(folder / "head.safetensors"))}

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        text = card(self.settings, self.figures, self.user_model.spread()[1:].numpy())
        return {
            "head.safetensors": lambda path: save_file(self.head.tensors(), path),
            "README.md": lambda path: path.write_text(text, encoding="utf-8"),
        }

    def parts_without_users(self) -> dict[str, Any]:
        return {"head": self.head.without_users()}

    def _load(self) -> None:
        base = self._base(load_backbone)
        if self.tuning == "frozen" and self.head.aggregator == "linear_head":
            self._backbone = base
            return
        from .module import classifier_of, reward_module

        module = classifier_of(base)
        if isinstance(self.head, SoftPrompt):
            with torch.no_grad():
                module.score.weight.copy_(self.head.weight)
            made = self.settings
            reward_module(module, self.user_model, "soft_prompt", made["pooling"], made["user_place"])
        module.eval().requires_grad_(False)
        if self.tuning == "lora":
            assert self.folder is not None
            module = load_tuned(module, self.folder)
        self._module, self._backbone = module, tuned_backbone(base, module, self.tuning)
        self.check("trained weights", self._backbone.fingerprint, self.settings["fingerprint"])

    @property
    def reader(self) -> FeatureReader:
        return feature_reader(self.backbone, self.layout)

    def prepare(self, requests: Sequence[ScoreRequest]) -> None:
        """Computes and caches what scoring the requests will need, with one progress bar for all of them."""
        self.head.prepare(self, requests, self.show)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Tensor]:
        """Scores of each request's responses, one (N,) fp32 tensor each; unknown users by row 0.

        What is computed is cached on disk batch by batch. With the linear head a response is run through the backbone
        once, however many users and requests it occurs in, as long as no text about a user is part of the input.
        """
        return self.head.score(self, requests, self.user_model, self.users)

    def uniform_scorer(self) -> Scorer | None:
        """The uniform model that was trained on the same rows; None where the backbone was trained as well."""
        head = self.head
        if not isinstance(head, LinearHead) or head.uniform is None:
            return None
        uniform, nobody = UniformUsers(1, head.uniform), UserIndex()
        return lambda requests: head.score(self, requests, uniform, nobody)

    @property
    def folds(self) -> int:  # type: ignore[override]
        return 10 if self.head.aggregator == "linear_head" else 4

    def _prepare_fit(self, rows: Sequence[Comparison]) -> None:
        self.head.prepare_rows(self, rows)

    def _fit_user(self, rows: Sequence[Comparison], parts: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        return self.head.fit_user(self, rows, parts)

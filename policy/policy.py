"""PersonalizedPolicy: a language model that answers, and ranks responses, per user (P-DPO, section 4.4)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..core.backbone import personalize, unwrapped
from ..core.comparisons import Comparison, User
from ..core.generation import SEQUENCES_AT_ONCE, LocalGenerator
from ..core.personal import PersonalizedModel
from ..core.pretrained import Backbone, find_model, load_language_model
from ..core.scoring import ScoreRequest
from ..core.texts import TextReader
from ..core.tokenize import RowTokenizer
from ..core.tuned import load_tuned, tuned_fingerprint
from .card import card
from .implicit_reward import fit_policy_user, implicit_rewards


@dataclass(kw_only=True)
class PersonalizedPolicy(PersonalizedModel):
    """Policy `pi(y | x, u)`, and for the unknown user (row 0); scores are its implicit rewards."""

    kind: ClassVar[str] = "policy"
    _reference: Backbone | None = None

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        text = card(self.settings, self.figures, self.user_model.spread()[1:].numpy())
        return {"README.md": lambda path: path.write_text(text, encoding="utf-8")}

    @property
    def beta(self) -> float:
        """How strongly the policy was held to its reference; the unit of implicit rewards."""
        return float(self.settings["beta"])

    def _load(self) -> None:
        base = self._base(load_language_model)
        module = personalize(base.model, self.user_model, self.settings["user_place"])
        module.eval().requires_grad_(False)
        if self.tuning == "lora":
            assert self.folder is not None
            module = load_tuned(module, self.folder)
        self._module, self._backbone = module, trained_model(base, module, self.tuning)
        self.check("trained weights", self._backbone.fingerprint, self.settings["fingerprint"])

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model that implicit rewards are relative to; it is given no users.

        Where the reference is what training started from, and that is still there below the adapter, it costs nothing.
        """
        if not self.settings["reference"]["separate"] and self.tuning != "full":
            off = self.module.disable_adapter() if self.tuning == "lora" else contextlib.nullcontext()
            with off:
                yield unwrapped(self.module)
            return
        if self._reference is None:
            self._reference = self._load_reference()
        yield self._reference.model

    def _load_reference(self) -> Backbone:
        made = self.settings["reference"]
        if not made["separate"]:
            return self._start(load_language_model)
        found = load_language_model(find_model(made["path"] or made["name"]), made["dtype"], self.device)
        self.check("reference's weights", found.fingerprint, made["fingerprint"])
        return found

    @cached_property
    def reader(self) -> TextReader:
        return TextReader(self.backbone.tokenizer, self.layout)

    def prepare(self, requests: Sequence[ScoreRequest]) -> None:
        self.score(requests)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Tensor]:
        """Implicit rewards of each request's responses, one (N,) fp32 tensor each; unknown users by row 0.

        Every log-probability is cached on disk, the reference's once for all users.
        """
        return implicit_rewards(self, requests)

    def _fit_user(self, rows: Sequence[Comparison], parts: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        return fit_policy_user(self, rows, parts)

    def generator(self, strength: float = 1.0, sequences: int = SEQUENCES_AT_ONCE) -> LocalGenerator:
        """Draws responses for users.

        Args:
            strength: of personalization: logits are `row0 + strength * (user - row0)`.
            sequences: how many responses are drawn side by side.
        """
        tokenizer = RowTokenizer(self.backbone.tokenizer, self.layout)
        return LocalGenerator(unwrapped(self.module), tokenizer, sequences, self.row_of, strength)

    def row_of(self, user: User) -> int:
        """Row of a user; 0 for those who are not known."""
        return self.users.row(user.id)


def trained_model(base: Backbone, module: Any, tuning: str) -> Backbone:
    """The whole language model of a trained module, under a fingerprint of its own."""
    return base.trained(unwrapped(module), tuned_fingerprint(base, module, tuning))

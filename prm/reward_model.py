"""PersonalizedRewardModel: scores and ranks responses per user (P-RM, appendix F.2 of the paper)."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import artefact
from ..core.artefact import ArtefactError
from ..core.comparisons import Comparison, Prompt, User
from ..core.pretrained import Backbone, find_model, load_backbone
from ..core.scoring import Ranking, Scorer, ScoreRequest, ranking
from ..core.splits import group_key
from ..core.tokenize import TextLayout
from ..core.users import ClusterUsers, UniformUsers, UserIndex, UserModel, make_user_model
from .card import card
from .features import FeatureReader, Text, feature_reader, over_long_by_user
from .new_user import OffsetPrior, fit_mixture, fit_offsets

KIND = "reward_model"
CHUNK = 16384  # requests that are scored together


@dataclass
class LinearHead:
    """What a linear-head model holds beside the users' vectors.

    Attributes:
        uniform: (D,) head of the uniform model trained on the same rows, the baseline of every figure.
        scale: differences of hidden states are divided by it where heads are fitted.
        prior: of a new user's offset, in units of scaled features; None where users have no offsets.
    """

    uniform: Tensor
    scale: float
    prior: OffsetPrior | None

    def tensors(self) -> dict[str, Tensor]:
        prior = self.prior or OffsetPrior(0.0, np.zeros((0, len(self.uniform)), dtype=np.float32))
        return {
            "uniform": self.uniform.contiguous(),
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "prior_isotropic": torch.tensor(prior.isotropic if self.prior else -1.0, dtype=torch.float64),
            "prior_factor": torch.from_numpy(np.ascontiguousarray(prior.factor)),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "LinearHead":
        isotropic = float(tensors["prior_isotropic"])
        prior = OffsetPrior(isotropic, tensors["prior_factor"].numpy()) if isotropic >= 0 else None
        return cls(tensors["uniform"], float(tensors["scale"]), prior)


@dataclass
class AddedUser:
    """What `add_user` did.

    Attributes:
        margins, row0_margins: of each of the user's comparisons when it was held out of the fit, and under row 0.
        seconds: the fit alone.
    """

    user_id: str
    comparisons: int
    margins: np.ndarray
    row0_margins: np.ndarray
    seconds: float


@dataclass
class PersonalizedRewardModel:
    """Reward `r(x, y, u)` of response y to prompt x for user u, and for the unknown user (row 0).

    With the linear head, `r = <e_u, h>`: h (D,) is the pooled last hidden state of a frozen backbone, e_u the user's
    vector. A model is also a `Scorer`: call it with requests.

    Attributes:
        settings: how it was trained, resolved; kept in the artefact, like
        figures: what training measured, on its validation rows.
        show: whether long work shows its progress.
    """

    users: UserIndex
    user_model: UserModel
    head: LinearHead
    settings: dict[str, Any]
    figures: dict[str, Any]
    device: str | None = None
    show: bool = False
    _backbone: Backbone | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | None = None, show: bool = False, model: str | None = None
    ) -> "PersonalizedRewardModel":
        """Loads a trained run.

        Args:
            model: where the backbone is, if not where training found it; its weights are checked either way.

        Raises:
            ArtefactError: the folder holds no complete run; names the file. Nothing is ever initialised anew.
        """
        folder = Path(folder)
        manifest = artefact.load(folder, KIND)
        users = UserIndex.load(folder / "users.json")
        weights = load_file(folder / "user_model.safetensors")
        head = LinearHead.of(load_file(folder / "head.safetensors"))
        made = manifest["settings"]
        start = torch.zeros_like(head.uniform)
        if model:
            made["model"] = {**made["model"], "name": model, "path": model if Path(model).is_dir() else ""}
        user_model = make_user_model(made["user_model"], len(users), start, **made["user_options"])
        try:
            user_model.load_state_dict(weights)
        except RuntimeError as error:
            raise ArtefactError(f"{folder / 'user_model.safetensors'}: does not fit users.json: {error}") from None
        return cls(users, user_model, head, made, manifest["figures"], device, show)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the run with its model card: all of it, or nothing (see `core.artefact`)."""
        spread = self.user_model.spread()[1:].numpy()
        text = card(self.settings, self.figures, spread)
        files: dict[str, Callable[[Path], Any]] = {
            "users.json": self.users.save,
            "user_model.safetensors": lambda path: save_file(dict(self.user_model.state_dict()), path),
            "head.safetensors": lambda path: save_file(self.head.tensors(), path),
            "README.md": lambda path: path.write_text(text, encoding="utf-8"),
        }
        artefact.save(Path(folder), KIND, {"settings": self.settings, "figures": self.figures}, files)

    @property
    def layout(self) -> TextLayout:
        return TextLayout(**self.settings["layout"])

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone, loaded when it is first needed.

        Raises:
            ArtefactError: its weights are not those that the heads were trained on.
        """
        if self._backbone is None:
            made = self.settings["model"]
            source = find_model(made["path"] or made["name"])
            if self.show:
                print(source.origin, file=sys.stderr)
            found = load_backbone(source, made["dtype"], self.device)
            for what, seen, wanted in (
                ("weights and configuration", found.fingerprint, made["fingerprint"]),
                ("tokenizer and chat template", found.text_hash, made["text_hash"]),
            ):
                if seen != wanted:
                    raise ArtefactError(
                        f"model {made['name']}: its {what} have the hash {seen}, but this run was trained on {wanted} "
                        f"({made['label']}, {made['dtype']})"
                    )
            self._backbone = found
        return self._backbone

    def over_long(self, requests: Sequence[ScoreRequest]) -> int:
        """How many distinct texts are over the layout's `max_length`; scoring truncates them, whatever training did."""
        texts = list(
            {
                (str(prompt), about, response): (prompt, about, response)
                for prompt, about, response in _texts(requests)
            }.values()
        )
        return int((self.reader.cut(texts) > 0).sum())

    def over_long_by_user(self, rows: Sequence[Comparison]) -> dict[str, int]:
        """How many comparisons of each user are over the layout's `max_length`; scoring truncates them."""
        return over_long_by_user(rows, self.reader.over(rows))

    def knows(self, user: User) -> bool:
        return user.id in self.users

    @property
    def reader(self) -> FeatureReader:
        return feature_reader(self.backbone, self.layout)

    def prepare(self, requests: Sequence[ScoreRequest]) -> None:
        """Computes and caches what scoring the requests will need, with one progress bar for all of them."""
        self.reader.positions(_texts(requests), self.show)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Tensor]:
        """Scores of each request's responses, one (N,) fp32 tensor each; unknown users by row 0.

        A response is run through the backbone once, however many users and requests it occurs in, as long as no text
        about a user is part of the input.
        """
        return self._score(requests, self.user_model)

    __call__ = score

    def uniform_scorer(self) -> Scorer:
        """The uniform model that was trained on the same rows."""
        uniform = UniformUsers(1, self.head.uniform)
        nobody = UserIndex()
        return lambda requests: self._score(requests, uniform, nobody)

    @torch.no_grad()
    def _score(
        self, requests: Sequence[ScoreRequest], model: UserModel, users: UserIndex | None = None
    ) -> list[Tensor]:
        index = users if users is not None else self.users
        self.prepare(requests)
        scores: list[Tensor] = []
        for start in range(0, len(requests), CHUNK):
            chunk = requests[start : start + CHUNK]
            distinct, places = np.unique(self.reader.positions(_texts(chunk)), return_inverse=True)
            states = self.reader.gather(distinct, self.settings["pooling"])  # (n, D)
            rows, which = index.rows([r.user.id for r in chunk]).unique(return_inverse=True)
            vectors = model(rows)  # (users of the chunk, D)
            of_request = torch.from_numpy(places).split([len(r.responses) for r in chunk])
            # Row by row, not as one product, whose rounding depends on the row's place: equal responses tie exactly.
            scores += [(states[at] * vectors[i]).sum(1) for at, i in zip(of_request, which.tolist(), strict=True)]
        return scores

    def rank(self, prompt: Prompt, responses: Sequence[str], users: Iterable[str | User | None]) -> list[Ranking]:
        """The responses in the order that each user likes them; `user_known` is False where row 0 decided."""
        asked = [user if isinstance(user, User) else User(user) for user in users]
        requests = [ScoreRequest(user, prompt, responses) for user in asked]
        scored = zip(requests, self.score(requests), strict=True)
        return [ranking(request, scores, self.knows(request.user)) for request, scores in scored]

    def add_user(self, user_id: str, rows: Sequence[Comparison], replace: bool = False, folds: int = 10) -> AddedUser:
        """Adds a user by a convex fit of their own part on their comparisons, everything else frozen.

        Raises:
            ValueError: the user is there already and `replace` is off, no comparisons, or the run has no user vectors.
        """
        if isinstance(self.user_model, UniformUsers):
            raise ValueError("this run has one vector for all users (user model uniform), so no user can be added")
        if user_id in self.users and not replace:
            raise ValueError(f"user {user_id!r} is in this run already; fit them anew with --replace")
        if not rows:
            raise ValueError(f"user {user_id!r}: no comparisons to fit on")
        z = self.scaled_differences(rows)
        begun = time.perf_counter()
        own = self._fit(z)
        seconds = time.perf_counter() - begun
        held = np.empty(len(z))
        parts = _folds(rows, folds)
        for fold in range(parts.max() + 1):
            out = parts == fold
            held[out] = z[out] @ self._vector(self._fit(z[~out]))
        at = self.users.row(user_id) or self.users.add(user_id)
        self.user_model.put_row(at, torch.from_numpy(own).float())
        self.users.facts[user_id] = {**length_facts(rows), "origin": "added"}
        return AddedUser(user_id, len(z), held, z @ self._row0(), seconds)

    def scaled_differences(self, rows: Sequence[Comparison]) -> np.ndarray:
        """(B, D) differences chosen - rejected of pooled hidden states, in the units that heads are fitted in."""
        differences = self.reader.differences(rows, self.settings["pooling"], self.show)
        return differences.div_(self.head.scale).numpy()

    @torch.no_grad()
    def _row0(self) -> np.ndarray:
        """e_0 in units of scaled features, (D,)."""
        return (self.user_model.row0() * self.head.scale).numpy()

    def _fit(self, z: np.ndarray) -> np.ndarray:
        """A new user's own row of the table: offset (D,) or cluster logits (C,), from z (k, D)."""
        if isinstance(self.user_model, ClusterUsers):
            centres = self.user_model.centres.detach().numpy() * self.head.scale  # (C, D)
            prior = self.user_model.logits.weight[0].detach().numpy()
            return fit_mixture(z @ centres.T, prior, self.settings["mixture_strength"])
        assert self.head.prior is not None  # individualized runs always have one
        offset = fit_offsets(z[None], (z @ self._row0())[None], self.head.prior)[0]
        return offset / self.head.scale

    @torch.no_grad()
    def _vector(self, own: np.ndarray) -> np.ndarray:
        """The vector (D,) that a fitted row stands for, in units of scaled features."""
        if isinstance(self.user_model, ClusterUsers):
            weights = torch.from_numpy(own).float().softmax(0)
            return (weights @ self.user_model.centres).numpy() * self.head.scale
        return own * self.head.scale + self._row0()


def _texts(requests: Sequence[ScoreRequest]) -> list[Text]:
    return [(r.prompt, r.user.text, response) for r in requests for response in r.responses]


def _folds(rows: Sequence[Comparison], folds: int) -> np.ndarray:
    """Fold of each row (B,); rows of one prompt, or of one pair where all share a prompt, are in the same fold."""
    for by in ("prompt", "pair"):
        keys = [group_key(row, by) for row in rows]
        if len(set(keys)) > 1:
            break
    number = {key: i % folds for i, key in enumerate(dict.fromkeys(keys))}
    return np.asarray([number[key] for key in keys])


def length_facts(rows: Sequence[Comparison]) -> dict[str, int]:
    """What the length rules of the evaluation need to know of a user's training rows."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts["longer_chosen"] += len(row.chosen) > len(row.rejected)
        counts["shorter_chosen"] += len(row.chosen) < len(row.rejected)
    return {"comparisons": len(rows), **counts}

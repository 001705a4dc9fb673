"""PersonalizedRewardModel: scores and ranks responses per user (P-RM, appendix F.2 of the paper)."""

import json
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
from ..core.users import UniformUsers, UserIndex, UserModel, make_user_model
from .card import card
from .features import FeatureReader, feature_reader, over_long_by_user, texts_of_requests
from .linear_head import LinearHead
from .soft_prompt import SoftPrompt
from .tuned import full_source, load_tuned, tuned_backbone, weight_files

KIND = "reward_model"
HEADS: dict[str, Any] = {head.aggregator: head for head in (LinearHead, SoftPrompt)}


@dataclass
class AddedUser:
    """What `add_user` did.

    Attributes:
        margins, row0_margins: of each of the user's comparisons when it was held out of the fit, and under row 0.
        seconds: the fits, those of the cross-validation included.
    """

    user_id: str
    comparisons: int
    margins: np.ndarray
    row0_margins: np.ndarray
    seconds: float


@dataclass
class PersonalizedRewardModel:
    """Reward `r(x, y, u)` of response y to prompt x for user u, and for the unknown user (row 0).

    With the linear head, `r = <e_u, h>`: h (D,) is the pooled last hidden state of the backbone, e_u the user's
    vector. With the soft prompt, e_u (K, D) stands before the text, and one head reads the pooled state. The backbone
    is frozen, or was trained too (by LoRA or in full). A model is also a `Scorer`: call it with requests.

    Attributes:
        settings: how it was trained, resolved; kept in the artefact, like
        figures: what training measured, on its validation rows.
        show: whether long work shows its progress.
        folder: where the weights of a trained backbone are read from.
    """

    users: UserIndex
    user_model: UserModel
    head: LinearHead | SoftPrompt
    settings: dict[str, Any]
    figures: dict[str, Any]
    device: str | None = None
    show: bool = False
    folder: Path | None = None
    _backbone: Backbone | None = None
    _module: Any = None

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
        made = manifest["settings"]
        head = HEADS[made["aggregator"]].of(load_file(folder / "head.safetensors"))
        if model:
            made["model"] = {**made["model"], "name": model, "path": model if Path(model).is_dir() else ""}
        start = torch.zeros(_shape(weights, made))
        user_model = make_user_model(made["user_model"], len(users), start, **made["user_options"])
        try:
            user_model.load_state_dict(weights)
        except RuntimeError as error:
            raise ArtefactError(f"{folder / 'user_model.safetensors'}: does not fit users.json: {error}") from None
        figures = manifest["figures"]
        if "metrics.jsonl" in manifest["files"]:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            figures["log"] = [json.loads(line) for line in lines]
        return cls(users, user_model, head, made, figures, device, show, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the run with its model card: all of it, or nothing (see `core.artefact`)."""
        folder = Path(folder)
        text = card(self.settings, self.figures, self.user_model.spread()[1:].numpy())
        state = {name: t.detach().cpu().contiguous() for name, t in self.user_model.state_dict().items()}
        files: dict[str, Callable[[Path], Any]] = {
            "users.json": self.users.save,
            "user_model.safetensors": lambda path: save_file(state, path),
            "head.safetensors": lambda path: save_file(self.head.tensors(), path),
            "README.md": lambda path: path.write_text(text, encoding="utf-8"),
        }
        figures = {key: value for key, value in self.figures.items() if key != "log"}
        if "log" in self.figures:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.figures["log"])
            files["metrics.jsonl"] = lambda path: path.write_text(lines, encoding="utf-8")
        keep: tuple[str, ...] = ()
        if self.tuning != "frozen":
            if self.folder and self.folder.resolve() == folder.resolve():
                keep = tuple(self.settings["weights"])
            else:
                weights = weight_files(self.module, self.backbone.tokenizer, self.tuning)
                self.settings["weights"] = sorted(weights)
                files |= weights
        artefact.save(folder, KIND, {"settings": self.settings, "figures": figures}, files, keep)
        self.folder = self.folder or folder

    @property
    def tuning(self) -> str:
        """`frozen`, `lora` or `full`: what was trained of the backbone."""
        return str(self.settings.get("tuning", "frozen"))

    @property
    def layout(self) -> TextLayout:
        return TextLayout(**self.settings["layout"])

    @property
    def backbone(self) -> Backbone:
        """The backbone, loaded when it is first needed.

        Raises:
            ArtefactError: its weights are not those that the run was trained on, or that it trained.
        """
        if self._backbone is None:
            self._load()
        assert self._backbone is not None
        return self._backbone

    @property
    def module(self) -> Any:
        """The transformers module of a run whose backbone or soft prompts were trained; peft's wrapper for LoRA."""
        if self._module is None:
            self._load()
        return self._module

    def _load(self) -> None:
        base = self._base()
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
        _check("trained weights", self._backbone.fingerprint, self.settings["fingerprint"], self.settings["model"])

    def _base(self) -> Backbone:
        """The model that training started from, or the whole model that it gave."""
        made = self.settings["model"]
        if self.tuning == "full":
            assert self.folder is not None
            return load_backbone(full_source(self.folder, made["label"]), made["dtype"], self.device)
        source = find_model(made["path"] or made["name"])
        if self.show:
            print(source.origin, file=sys.stderr)
        found = load_backbone(source, made["dtype"], self.device)
        _check("weights and configuration", found.fingerprint, made["fingerprint"], made)
        _check("tokenizer and chat template", found.text_hash, made["text_hash"], made)
        return found

    def over_long(self, requests: Sequence[ScoreRequest]) -> int:
        """How many distinct texts are over the layout's `max_length`; scoring truncates them, whatever training did."""
        texts = {(str(text[0]), *text[1:]): text for text in texts_of_requests(requests)}
        return int((self.reader.cut(list(texts.values())) > 0).sum())

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
        self.head.prepare(self, requests, self.show)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Tensor]:
        """Scores of each request's responses, one (N,) fp32 tensor each; unknown users by row 0.

        What is computed is cached on disk batch by batch. With the linear head a response is run through the backbone
        once, however many users and requests it occurs in, as long as no text about a user is part of the input.
        """
        return self.head.score(self, requests, self.user_model, self.users)

    __call__ = score

    def uniform_scorer(self) -> Scorer | None:
        """The uniform model that was trained on the same rows; None where the backbone was trained as well."""
        head = self.head
        if not isinstance(head, LinearHead) or head.uniform is None:
            return None
        uniform, nobody = UniformUsers(1, head.uniform), UserIndex()
        return lambda requests: head.score(self, requests, uniform, nobody)

    def rank(self, prompt: Prompt, responses: Sequence[str], users: Iterable[str | User | None]) -> list[Ranking]:
        """The responses in the order that each user likes them; `user_known` is False where row 0 decided."""
        asked = [user if isinstance(user, User) else User(user) for user in users]
        requests = [ScoreRequest(user, prompt, responses) for user in asked]
        scored = zip(requests, self.score(requests), strict=True)
        return [ranking(request, scores, self.knows(request.user)) for request, scores in scored]

    def add_user(
        self, user_id: str, rows: Sequence[Comparison], replace: bool = False, folds: int | None = None
    ) -> AddedUser:
        """Adds a user by a fit of their own part on their comparisons, everything else frozen.

        Args:
            folds: of the cross-validation; by default 10 for heads, whose fit is convex and takes a millisecond, and 4
                for soft prompts, which are fitted by gradient.

        Raises:
            ValueError: the user is there already and `replace` is off, no comparisons, or the run has no user vectors.
        """
        if isinstance(self.user_model, UniformUsers):
            raise ValueError("this run has one vector for all users (user model uniform), so no user can be added")
        if user_id in self.users and not replace:
            raise ValueError(f"user {user_id!r} is in this run already; fit them anew with --replace")
        if not rows:
            raise ValueError(f"user {user_id!r}: no comparisons to fit on")
        self.head.prepare_rows(self, rows)
        begun = time.perf_counter()
        parts = _folds(rows, folds or (10 if self.head.aggregator == "linear_head" else 4))
        own, margins, row0 = self.head.fit_user(self, rows, parts)
        seconds = time.perf_counter() - begun
        at = self.users.row(user_id) or self.users.add(user_id)
        self.user_model.put_row(at, own)
        self.users.facts[user_id] = {**length_facts(rows), "origin": "added"}
        return AddedUser(user_id, len(rows), margins, row0, seconds)


def _shape(weights: dict[str, Tensor], made: dict[str, Any]) -> tuple[int, ...]:
    """Shape of an embedding: (K, D) for soft prompts, (D,) for heads."""
    if "base" in weights:
        return tuple(weights["base"].shape)
    width = weights["centres" if "centres" in weights else "offsets.weight"].shape[1]
    tokens = made.get("user_tokens", 1)
    return (width,) if made["aggregator"] == "linear_head" else (tokens, width // tokens)


def _check(what: str, seen: str, wanted: str, made: dict[str, Any]) -> None:
    if seen != wanted:
        raise ArtefactError(
            f"model {made['name']}: its {what} have the hash {seen}, but this run was trained on {wanted} "
            f"({made['label']}, {made['dtype']})"
        )


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

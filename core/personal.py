"""What a personalized reward model and a personalized policy have in common: users, their vectors, a run's folder."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import artefact
from .artefact import ArtefactError
from .comparisons import Comparison, Prompt, User
from .pretrained import Backbone, find_model
from .scoring import Ranking, Scorer, ScoreRequest, ranking
from .splits import group_key
from .texts import TextReader, over_long_by_user, texts_of_requests
from .tokenize import TextLayout
from .training import length_facts
from .tuned import full_source, weight_files
from .users import UniformUsers, UserIndex, UserModel, make_user_model


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
class PersonalizedModel:
    """Users, their vectors, and the language model that reads them; a `Scorer`: call it with requests.

    Attributes:
        settings: how it was trained, resolved; kept in the artefact, like
        figures: what training measured, on its validation rows.
        show: whether long work shows its progress.
        folder: where the weights of a trained backbone are read from.
    """

    kind: ClassVar[str]
    folds: ClassVar[int] = 4  # of a new user's cross-validation

    users: UserIndex
    user_model: UserModel
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
    ) -> Self:
        """Loads a trained run.

        Args:
            model: where the backbone is, if not where training found it; its weights are checked either way.

        Raises:
            ArtefactError: the folder holds no complete run; names the file. Nothing is ever initialised anew.
        """
        folder = Path(folder)
        manifest = artefact.load(folder, cls.kind)
        users = UserIndex.load(folder / "users.json")
        weights = load_file(folder / "user_model.safetensors")
        made = manifest["settings"]
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
        return cls(users, user_model, made, figures, device, show, folder, **cls._parts(folder, made))

    @classmethod
    def _parts(cls, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
        """Fields of the subclass, from its files."""
        return {}

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        """Files of the subclass, and what writes each; its README.md is one of them."""
        raise NotImplementedError

    def parts_without_users(self) -> dict[str, Any]:
        """Fields of the subclass from which users' vectors can be read, without what they are read from."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the run with its model card: all of it, or nothing (see `core.artefact`)."""
        folder = Path(folder)
        state = {name: t.detach().cpu().contiguous() for name, t in self.user_model.state_dict().items()}
        files: dict[str, Callable[[Path], Any]] = {
            "users.json": self.users.save,
            "user_model.safetensors": lambda path: save_file(state, path),
            **self._files(),
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
        artefact.save(folder, self.kind, {"settings": self.settings, "figures": figures}, files, keep)
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
        """Sets `_backbone`, and `_module` where something of it was trained."""
        raise NotImplementedError

    def _base(self, load: Callable[..., Backbone]) -> Backbone:
        """The model that training started from, or the whole model that it gave.

        Args:
            load: loads a model from its source; with or without the language model's head.
        """
        made = self.settings["model"]
        if self.tuning == "full":
            assert self.folder is not None
            return load(full_source(self.folder, made["label"]), made["dtype"], self.device)
        return self._start(load)

    def _start(self, load: Callable[..., Backbone]) -> Backbone:
        """The model that training started from."""
        made = self.settings["model"]
        source = find_model(made["path"] or made["name"])
        if self.show:
            print(source.origin, file=sys.stderr)
        found = load(source, made["dtype"], self.device)
        self.check("weights and configuration", found.fingerprint, made["fingerprint"])
        self.check("tokenizer and chat template", found.text_hash, made["text_hash"])
        return found

    def check(self, what: str, seen: str, wanted: str) -> None:
        """Raises where a hash is not the one that training recorded."""
        made = self.settings["model"]
        if seen != wanted:
            raise ArtefactError(
                f"model {made['name']}: its {what} have the hash {seen}, but this run was trained on {wanted} "
                f"({made['label']}, {made['dtype']})"
            )

    @property
    def reader(self) -> TextReader:
        """Tokenizes under the run's layout."""
        raise NotImplementedError

    def over_long(self, requests: Sequence[ScoreRequest]) -> int:
        """How many distinct texts are over the layout's `max_length`; scoring truncates them, whatever training did."""
        texts = {(str(text[0]), *text[1:]): text for text in texts_of_requests(requests)}
        return int((self.reader.cut(list(texts.values())) > 0).sum())

    def over_long_by_user(self, rows: Sequence[Comparison]) -> dict[str, int]:
        """How many comparisons of each user are over the layout's `max_length`; scoring truncates them."""
        return over_long_by_user(rows, self.reader.over(rows))

    def knows(self, user: User) -> bool:
        return user.id in self.users

    def prepare(self, requests: Sequence[ScoreRequest]) -> None:
        """Computes and caches what scoring the requests will need, with one progress bar for all of them."""
        raise NotImplementedError

    def score(self, requests: Sequence[ScoreRequest]) -> list[Tensor]:
        """Scores of each request's responses, one (N,) fp32 tensor each; unknown users by row 0."""
        raise NotImplementedError

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Tensor]:
        return self.score(requests)

    def uniform_scorer(self) -> Scorer | None:
        """The uniform model that was trained on the same rows, where the run holds one."""
        return None

    def rank(self, prompt: Prompt, responses: Sequence[str], users: Iterable[str | User | None]) -> list[Ranking]:
        """The responses in the order that each user likes them; `user_known` is False where row 0 decided."""
        asked = [user if isinstance(user, User) else User(user) for user in users]
        requests = [ScoreRequest(user, prompt, responses) for user in asked]
        scored = zip(requests, self.score(requests), strict=True)
        return [ranking(request, scores, self.knows(request.user)) for request, scores in scored]

    def _prepare_fit(self, rows: Sequence[Comparison]) -> None:
        """Computes and caches what a fit on comparisons will need."""

    def _fit_user(self, rows: Sequence[Comparison], parts: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """A new user's own row of the table, and margins (k,) of each comparison when held out, and under row 0.

        Args:
            parts: (k,) fold of each comparison.
        """
        raise NotImplementedError

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
        self._prepare_fit(rows)
        begun = time.perf_counter()
        own, margins, row0 = self._fit_user(rows, _folds(rows, folds or self.folds))
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
    return (width,) if made.get("aggregator") == "linear_head" else (tokens, width // tokens)


def _folds(rows: Sequence[Comparison], folds: int) -> np.ndarray:
    """Fold of each row (B,); rows of one prompt, or of one pair where all share a prompt, are in the same fold."""
    for by in ("prompt", "pair"):
        keys = [group_key(row, by) for row in rows]
        if len(set(keys)) > 1:
            break
    number = {key: i % folds for i, key in enumerate(dict.fromkeys(keys))}
    return np.asarray([number[key] for key in keys])

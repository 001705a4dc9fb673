"""The user model: a user id becomes an embedding (section 4.3 of the paper).

The same three models serve as soft prompts, `shape = (K, D)`, and as linear heads, `shape = (D,)`. Row 0 is always
the unknown user.
"""

import json
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class UserIndex:
    """User ids (strings) and their rows; row 0 is the unknown user.

    Attributes:
        facts: what is recorded of users beside their vectors, by id ("" for rows without one). All that an artefact
            says of single people lies here and in the user table, nowhere else.

    Raises:
        ValueError: an id is not a non-empty string, or appears twice.
    """

    def __init__(self, ids: Iterable[str] = ()):
        self.ids: list[str] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, int] = {}
        for user_id in ids:
            self.add(user_id)

    @classmethod
    def seen_in(cls, user_ids: Iterable[str | None]) -> "UserIndex":
        """Index of all ids that occur, in sorted order, so that the order of rows does not matter."""
        return cls(sorted({user_id for user_id in user_ids if user_id is not None}))

    def __len__(self) -> int:
        """U, the unknown user included."""
        return len(self.ids) + 1

    def __contains__(self, user_id: object) -> bool:
        return user_id in self._rows

    def add(self, user_id: str) -> int:
        """Gives a new user the next row."""
        if not isinstance(user_id, str) or not user_id:
            raise ValueError(f"a user id must be a non-empty string, found {user_id!r}")
        if user_id in self._rows:
            raise ValueError(f"user {user_id!r} is there already")
        self.ids.append(user_id)
        self._rows[user_id] = len(self.ids)
        return len(self.ids)

    def row(self, user_id: str | None) -> int:
        """Row of a user; 0 for None and for anyone not in the index."""
        return self._rows.get(user_id, 0) if user_id is not None else 0

    def rows(self, user_ids: Sequence[str | None]) -> Tensor:
        """Rows of users: (R,) int64."""
        return torch.tensor([self.row(user_id) for user_id in user_ids], dtype=torch.int64)

    def save(self, path: Path) -> None:
        content = {"ids": self.ids, "facts": self.facts}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "UserIndex":
        content = json.loads(path.read_text(encoding="utf-8"))
        index = cls(content["ids"])
        index.facts = content["facts"]
        return index


class UserModel(nn.Module):
    """What every user model has.

    Args:
        users: U, the unknown user included.
        start: starting value of e_0, of the embedding's shape: (K, D) or (D,).
    """

    name: str

    def __init__(self, users: int, start: Tensor):
        super().__init__()
        self.users = users
        self.shape = tuple(start.shape)
        self.width = prod(self.shape)

    def forward(self, user_ids: Tensor) -> Tensor:
        """Embeddings of users: (R,) -> (R, K, D) or (R, D)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def row0(self) -> Tensor:
        """The unknown user's embedding, (K, D) or (D,)."""
        return self(torch.zeros(1, dtype=torch.int64, device=self.device))[0]

    def options(self) -> dict[str, Any]:
        """What `make_user_model` needs beside users and start to build the same model."""
        return {}

    def put_row(self, at: int, own: Tensor) -> None:
        """Writes what a fit of one user gave, an offset from row 0 or cluster logits; `at` = U appends a user."""
        raise ValueError(f"the {self.name} user model has one embedding for all, so no user can be added")

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Everybody's embedding, row 0 first, on the CPU: (U, K*D) or (U, D)."""
        chunks = [self(ids.to(self.device)) for ids in torch.arange(self.users).split(65536)]
        return torch.cat(chunks).reshape(self.users, self.width).cpu()

    def keep_rows(self, count: int) -> None:
        """Forgets every user but those of the first `count` rows; 1 keeps the unknown user alone."""
        self.users = count

    def spread(self) -> Tensor:
        """How far each user's embedding is from row 0's, in the norm of e_0: (U,)."""
        vectors = self.vectors()
        return (vectors - vectors[0]).norm(dim=1) / vectors[0].norm().clamp_min(1e-12)


class UniformUsers(UserModel):
    """The same embedding for everyone; with K = 0 it is vanilla RLHF (Remark F.1)."""

    name = "uniform"

    def __init__(self, users: int, start: Tensor):
        super().__init__(users, start)
        self.base = nn.Parameter(start.detach().clone().float())

    def forward(self, user_ids: Tensor) -> Tensor:
        return self.base.expand(len(user_ids), *self.shape)


class IndividualizedUsers(UserModel):
    """e_i = e_0 + o_i, offsets starting at zero, o_0 fixed at zero.

    Args:
        shared: False is the paper's ablation without e_0: each row stands alone, and starts as a copy of `start`
            (a soft prompt of zeros would give NaN gradients).
    """

    name = "individualized"

    def __init__(self, users: int, start: Tensor, shared: bool = True):
        super().__init__(users, start)
        self.shared = shared
        if shared:
            self.base = nn.Parameter(start.detach().clone().float())
        # padding_idx keeps row 0's gradient at exactly zero, so o_0 stays what it is.
        self.offsets = nn.Embedding(users, self.width, padding_idx=0 if shared else None, _weight=self._start(start))

    def _start(self, start: Tensor) -> Tensor:
        if self.shared:
            return torch.zeros(self.users, self.width)
        return start.detach().float().reshape(1, -1).repeat(self.users, 1)

    def forward(self, user_ids: Tensor) -> Tensor:
        own = self.offsets(user_ids).reshape(-1, *self.shape)  # (R, K*D) -> (R, K, D)
        return self.base + own if self.shared else own

    def options(self) -> dict[str, Any]:
        return {"shared": self.shared}

    def put_row(self, at: int, own: Tensor) -> None:
        # Without e_0 the table holds whole embeddings.
        self.offsets = _with_row(
            self.offsets, at, own if self.shared else own.to(self.device) + self.offsets.weight[0].detach()
        )
        self.users = len(self.offsets.weight)

    def keep_rows(self, count: int) -> None:
        self.offsets = _first_rows(self.offsets, count)
        self.users = count


class ClusterUsers(UserModel):
    """e_i = softmax(w_i) V: a mixture of C shared centres; row 0 is a row like the others.

    Args:
        clusters: C.
        noise: centres start at `start` plus noise of this size relative to its spread, and logits at random:
            identical centres under equal weights would never part.
        seed: of both.
    """

    name = "cluster"

    def __init__(self, users: int, start: Tensor, clusters: int = 10, noise: float = 0.1, seed: int = 0):
        super().__init__(users, start)
        if clusters < 1:
            raise ValueError(f"the cluster user model needs at least one cluster, found {clusters}")
        self.clusters, self.noise, self.seed = clusters, noise, seed
        random = torch.Generator().manual_seed(seed)
        flat = start.detach().float().reshape(-1)  # (K*D,) or (D,)
        size = noise * max(float(flat.std()) if len(flat) > 1 else 0.0, 1e-3)
        self.centres = nn.Parameter(flat + size * torch.randn(clusters, self.width, generator=random))
        self.logits = nn.Embedding(users, clusters, _weight=0.1 * torch.randn(users, clusters, generator=random))

    def forward(self, user_ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # users are fp32 whatever the backbone runs in
            mixed = self.logits(user_ids).softmax(dim=1) @ self.centres  # (R, C) @ (C, K*D)
        return mixed.reshape(-1, *self.shape)  # (R, K*D) -> (R, K, D)

    def options(self) -> dict[str, Any]:
        return {"clusters": self.clusters, "noise": self.noise, "seed": self.seed}

    def put_row(self, at: int, own: Tensor) -> None:
        self.logits = _with_row(self.logits, at, own)
        self.users = len(self.logits.weight)

    def keep_rows(self, count: int) -> None:
        self.logits = _first_rows(self.logits, count)
        self.users = count


def _with_row(table: nn.Embedding, at: int, row: Tensor) -> nn.Embedding:
    weight = table.weight.detach()
    new = torch.cat([weight[:at], row.detach().reshape(1, -1).to(weight), weight[at + 1 :]])
    return nn.Embedding(len(new), new.shape[1], padding_idx=table.padding_idx, _weight=new)


def _first_rows(table: nn.Embedding, count: int) -> nn.Embedding:
    weight = table.weight.detach()[:count].clone()
    return nn.Embedding(count, weight.shape[1], padding_idx=table.padding_idx, _weight=weight)


USER_MODELS: dict[str, type[UserModel]] = {
    model.name: model for model in (UniformUsers, IndividualizedUsers, ClusterUsers)
}


def make_user_model(name: str, users: int, start: Tensor, **options: Any) -> UserModel:
    """Builds a user model by name.

    Raises:
        ValueError: no such user model.
    """
    if name not in USER_MODELS:
        raise ValueError(f"no user model {name!r}; there are {', '.join(USER_MODELS)}")
    return USER_MODELS[name](users, start, **options)


def neutral_prompt(embed: nn.Module, tokenizer: Any, tokens: int) -> Tensor:
    """Starting value of a soft prompt: embeddings of a short neutral text, repeated or cut to K tokens, (K, D).

    Through the model's embedding module and not its weight, because some models scale inside it.
    """
    ids = tokenizer.encode("The response that this person prefers:", add_special_tokens=False)
    repeated = (ids * (tokens // len(ids) + 1))[:tokens]
    with torch.no_grad():
        device = next(embed.parameters()).device
        return embed(torch.tensor(repeated, dtype=torch.int64, device=device)).float().cpu()

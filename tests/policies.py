"""Small personalized policies on a tiny Llama, in fp32 on the CPU."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tiny import byte_tokenizer, checkerboard, tiny_config
from torch import Tensor
from training import QUIET, lora
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prlhf.core.comparisons import Comparison, User
from prlhf.core.pretrained import Backbone, find_model, load_language_model
from prlhf.core.scoring import ScoreRequest
from prlhf.core.texts import texts_of_requests
from prlhf.core.tokenize import TextLayout
from prlhf.policy.policy import PersonalizedPolicy
from prlhf.policy.train import train_policy
from prlhf.policy.trainer import PersonalizedDPOConfig

TUNINGS = ("frozen", "lora", "full")
USERS = [*map(User, ("u0", "u1", "u2", "stranger", None)), User("u3", "Likes it calm.")]
REQUESTS = [
    ScoreRequest(user, f"Say {i}", [f"well, {i} it is.", f"WOW!!! {i}!!!", "", "x" * i])
    for i in (3, 70)
    for user in USERS
]


def language_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama with weights large enough to tell texts apart; its embeddings are tied, as small models' are."""
    torch.manual_seed(seed)
    config = tiny_config(**{"initializer_range": 0.1, "tie_word_embeddings": True, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Backbone:
    return load_language_model(find_model(str(folder)), "float32", "cpu")


def fit_policy(
    base: Path, run: Path, tuning: str = "lora", reference: Path | None = None, **config: Any
) -> PersonalizedPolicy:
    """Forty steps on a checkerboard of four users, unless told otherwise."""
    options = {
        "learning_rate": 1e-2 if tuning == "lora" else 3e-3,
        "user_learning_rate": 0.3 if config.get("user_model") == "cluster" else 0.05,
        "user_clusters": 3,
        "num_train_epochs": 10,
        "eval_steps": 0.5,
        "save_steps": 0.5,
        **config,
    }
    return train_policy(
        checkerboard(8),
        checkerboard(3, first=40),
        loaded(base),
        TextLayout(),
        PersonalizedDPOConfig(output_dir=str(run), **{**QUIET, **options}),
        tuning,
        lora() if tuning == "lora" else None,
        loaded(reference) if reference else None,
    )


class Trained:
    """Trained policies and the runs they were saved to, each kind trained once."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder = base, folder
        self.made: dict[tuple[str, str], tuple[PersonalizedPolicy, Path]] = {}

    def __call__(
        self, tuning: str = "lora", user_model: str = "individualized", **config: Any
    ) -> tuple[PersonalizedPolicy, Path]:
        kind = f"{tuning}-{user_model}", repr(config)
        if kind not in self.made:
            run = self.folder / f"{len(self.made)}-{tuning}-{user_model}"
            policy = fit_policy(self.base, run, tuning, user_model=user_model, **config)
            policy.save_pretrained(run)
            self.made[kind] = policy, run
        return self.made[kind]


def requests_of(rows: Sequence[Comparison], user: str | None = "own") -> list[ScoreRequest]:
    return [ScoreRequest(r.user if user == "own" else User(user), r.prompt, [r.chosen, r.rejected]) for r in rows]


def margins(policy: PersonalizedPolicy, rows: Sequence[Comparison], user: str | None = "own") -> np.ndarray:
    return np.array([float(s[0] - s[1]) for s in policy.score(requests_of(rows, user))])


def accuracy(policy: PersonalizedPolicy, rows: Sequence[Comparison], user: str | None = "own") -> float:
    return float(np.mean(0.5 + 0.5 * np.sign(margins(policy, rows, user))))


def stacked(policy: PersonalizedPolicy) -> Tensor:
    return torch.stack(policy.score(REQUESTS))


def plain_model(base: Path, run: Path, tuning: str) -> Any:
    """The trained weights as transformers and peft read them, in a model that knows nothing of users."""
    model = AutoModelForCausalLM.from_pretrained(run if tuning == "full" else base)
    return (PeftModel.from_pretrained(model, str(run)).merge_and_unload() if tuning == "lora" else model).eval()


@torch.no_grad()
def plain_log_probs(model: Any, policy: PersonalizedPolicy, vectors: Callable[[User], Tensor]) -> Tensor:
    """log pi of each response of REQUESTS, alone, behind K vectors (K, D): (requests, responses)."""
    users = [request.user for request in REQUESTS for _ in request.responses]
    found = []
    for user, row in zip(users, policy.reader.tokenize(texts_of_requests(REQUESTS)), strict=True):
        ids = torch.tensor(row.prompt_ids + row.response_ids)
        embeds = torch.cat([vectors(user), model.get_input_embeddings()(ids)])
        logits = model(inputs_embeds=embeds[None]).logits[0, -len(ids) : -1]  # of the ids behind the first
        of_text = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        found.append(of_text[-len(row.response_ids) :].sum())
    return torch.stack(found).reshape(len(REQUESTS), -1)


def nobody(_: User) -> Tensor:
    return torch.zeros(0, 32)


def vectors_of(policy: PersonalizedPolicy) -> Callable[[User], Tensor]:
    """A user's vectors (K, D), as the table holds them."""
    table = policy.user_model.vectors().reshape(-1, *policy.user_model.shape)
    ids = policy.users.ids
    return lambda user: table[ids.index(user.id) + 1 if user.id in ids else 0]

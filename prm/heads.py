"""All users' linear heads on cached features, trained together (P-RM with the linear-head aggregator, appendix F.2).

For a comparison with feature difference z = (h_chosen - h_rejected) / scale the loss is
`alpha * softplus(-<e_u, z>) + (1 - alpha) * softplus(-<e_0, z>)`. Gradients are written out, and a step touches only
the rows of the users in the batch, so its cost does not depend on the number of users.

Strengths are precisions of Gaussian priors in units of comparisons: the objective is the *sum* of all losses plus
`strength / 2 * |o_u|^2` for every user, so a user with few comparisons stays near row 0.
"""

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..core.users import UserModel, make_user_model
from .head_config import HeadConfig
from .head_steps import Steps, make_steps


@dataclass(frozen=True)
class Examples:
    """Comparisons as a head sees them: z (B, D) scaled feature differences, users (B,) rows of the user table."""

    z: Tensor
    users: Tensor

    def __len__(self) -> int:
        return len(self.users)


@dataclass
class HeadFit:
    """A trained user model in units of scaled features, the strength that was chosen, and every candidate's figures."""

    users: UserModel
    strength: float
    log_loss: float
    tried: list[dict[str, float]]


@torch.no_grad()
def log_loss(users: UserModel, examples: Examples, chunk: int = 65536) -> float:
    """Mean of softplus(-<e_u, z>) in nats; nan on no examples."""
    parts = zip(examples.z.split(chunk), examples.users.split(chunk), strict=True)
    losses = [softplus(-(users(rows) * z).sum(1)).sum() for z, rows in parts]
    return float(torch.stack(losses).sum() / len(examples)) if len(examples) else float("nan")


@torch.no_grad()
def train(steps: Steps, train_set: Examples, validation: Examples, config: HeadConfig) -> tuple[UserModel, float, int]:
    """Steps over the training rows until validation stops improving.

    Returns:
        the user model at its best epoch, its validation log loss in nats, and that epoch (0 = before any step).

    Raises:
        FloatingPointError: the validation loss is not a number; the message says what to try.
    """
    random = torch.Generator().manual_seed(config.seed)
    best, best_loss, best_epoch = copy.deepcopy(steps.users), log_loss(steps.users, validation), 0
    for epoch in range(1, config.max_epochs + 1):
        for index in torch.randperm(len(train_set), generator=random).split(config.batch_size):
            # index_select: three times as fast as indexing with brackets
            steps.step(train_set.z.index_select(0, index), train_set.users.index_select(0, index))
        loss = log_loss(steps.users, validation)
        if loss != loss:
            raise FloatingPointError(f"validation loss is {loss} in epoch {epoch}; try a lower --head-learning-rate")
        if loss < best_loss - 1e-5:
            best, best_loss, best_epoch = copy.deepcopy(steps.users), loss, epoch
        elif epoch - best_epoch >= config.patience:
            break
    return best, best_loss, best_epoch


def fit_heads(
    train_set: Examples, validation: Examples, users: int, start: Tensor, config: HeadConfig, show: bool = False
) -> tuple[HeadFit, HeadFit]:
    """Trains the uniform head and the heads of `config.user_model`, strengths chosen on validation rows.

    Args:
        users: U.
        start: (D,) e_0's starting value in units of scaled features: zeros, or a stock reward model's head.

    Returns:
        the personal fit and the uniform fit (the same one where the user model is uniform).
    """
    with _one_thread():
        return _fit_heads(train_set, validation, users, start, config, show)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches are small: on two busy cores, threads that wait for each other made training ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit_heads(
    train_set: Examples, validation: Examples, users: int, start: Tensor, config: HeadConfig, show: bool
) -> tuple[HeadFit, HeadFit]:
    counts = torch.bincount(train_set.users, minlength=users)

    def attempt(name: str, begin: Tensor, base: float, strength: float) -> tuple[UserModel, dict[str, float]]:
        options = config.user_options if name == config.user_model else {}
        model = make_user_model(name, users, begin, **options)
        steps = make_steps(model, counts, config, base, strength, start)
        best, loss, epoch = train(steps, train_set, validation, config)
        tried = {"base_strength": base, "user_strength": strength, "log_loss": loss, "epoch": epoch}
        if show:
            print(
                f"  {name}: strength {strength or base:g}: validation log loss {loss:.4f}, epoch {epoch}",
                file=sys.stderr,
            )
        return best, tried

    bases, strengths = config.base_strengths, config.user_strengths
    uniform = _best((attempt("uniform", start, base, 0.0) for base in bases), "base_strength")
    if config.user_model == "uniform":
        return uniform, uniform
    begin = uniform.users.row0().detach()
    tries = (attempt(config.user_model, begin, uniform.strength, strength) for strength in strengths)
    return _best(tries, "user_strength"), uniform


def _best(tries: Iterable[tuple[UserModel, dict[str, float]]], strength: str) -> HeadFit:
    """The try of the lowest loss; only it is kept, since a user table can be large."""
    best: HeadFit | None = None
    every = []
    for model, figures in tries:
        every.append(figures)
        # Of equals the stronger: where no step helped, every strength ties, and row 0 is what the data supports.
        mine = (figures["log_loss"], -figures[strength])
        if best is None or mine < (best.log_loss, -best.strength):
            best = HeadFit(model, figures[strength], figures["log_loss"], every)
    assert best is not None  # HeadConfig wants at least one strength
    return best

"""All users' linear heads on cached features, trained together (P-RM with the linear-head aggregator, appendix F.2).

For a comparison with feature difference z = (h_chosen - h_rejected) / scale the loss is
`alpha * softplus(-<e_u, z>) + (1 - alpha) * softplus(-<e_0, z>)`. Gradients are written out, and a step touches only
the rows of the users in the batch, so its cost does not depend on the number of users.

Strengths are precisions of Gaussian priors in units of comparisons: the objective is the *sum* of all losses plus
`strength / 2 * |o_u|^2` for every user, so a user with few comparisons stays near row 0.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..core.users import ClusterUsers, IndividualizedUsers, UniformUsers, UserModel, make_user_model


@dataclass(frozen=True)
class HeadConfig:
    """How heads are trained.

    Attributes:
        user_model: `uniform`, `individualized` or `cluster`.
        user_loss_alpha: weight of the loss with the user, against that of the unknown user.
        base_strengths, user_strengths: candidates for the strength with which e_0 is held to its starting value and
            offsets (or centres, to their mean) to zero; chosen by log loss on validation rows.
        user_options: further options of the user model (`clusters`, `shared`).
        max_epochs, patience: training stops when validation log loss has not improved for `patience` epochs.
    """

    user_model: str = "individualized"
    user_loss_alpha: float = 0.5
    base_strengths: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    user_strengths: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    user_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.01
    batch_size: int = 256
    max_epochs: int = 100
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.user_loss_alpha <= 1:
            raise ValueError(f"user_loss_alpha must lie between 0 and 1, found {self.user_loss_alpha}")
        if not self.base_strengths or not self.user_strengths or min(*self.base_strengths, *self.user_strengths) < 0:
            raise ValueError("strengths must be given and must not be negative")


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


class RowAdagrad:
    """Adagrad with one accumulator per row, stepping only the rows that it is given."""

    def __init__(self, table: Tensor, learning_rate: float):
        self.table, self.learning_rate = table, learning_rate
        self.sums = torch.zeros(len(table))

    def step(self, rows: Tensor, gradients: Tensor) -> None:
        """One step from per-comparison gradients (B, W) of table rows (B,); a row may occur many times.

        The gradients are overwritten: a fresh (B, W) tensor costs more than the arithmetic on it.
        """
        squares = torch.linalg.vector_norm(gradients, dim=1).square_()  # unlike vecdot, without a (B, W) product
        self.sums.index_add_(0, rows, squares.div_(gradients.shape[1]))
        rates = self.sums.index_select(0, rows).sqrt_().add_(1e-8).reciprocal_().mul_(-self.learning_rate)
        self.table.index_add_(0, rows, gradients.mul_(rates[:, None]))


class _Steps:
    """Gradient steps for one user model: what the three have in common."""

    def __init__(self, users: UserModel, counts: Tensor, config: HeadConfig, base: float, strength: float):
        self.users, self.counts, self.total = users, counts, int(counts.sum())
        self.alpha, self.base_strength, self.strength = config.user_loss_alpha, base, strength
        self.rate = config.learning_rate

    def margins(self, z: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        """<e_u, z> and <e_0, z>, each (B,)."""
        own = (self.users(users) * z).sum(1)
        return own, (self.users(torch.zeros_like(users[:1])) * z).sum(1)

    def slopes(self, own: Tensor, generic: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the two parts of the loss by their margins, each (B,)."""
        return torch.sigmoid(-own).mul_(-self.alpha), torch.sigmoid(-generic).mul_(self.alpha - 1)

    def step(self, z: Tensor, users: Tensor) -> None:
        raise NotImplementedError


class _UniformSteps(_Steps):
    users: UniformUsers

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.start = self.users.base.detach().clone()
        self.adam = torch.optim.Adam([self.users.base], lr=self.rate / 10)

    def step(self, z: Tensor, users: Tensor) -> None:
        slope = -torch.sigmoid(-(z @ self.users.base))  # (B,)
        _adam_step(self.adam, self.users.base, z.T @ slope / len(z), self._pull())

    def _pull(self) -> Tensor:
        return (self.users.base - self.start) * (self.base_strength / self.total)


class _IndividualizedSteps(_UniformSteps):
    users: IndividualizedUsers  # type: ignore[assignment]

    def __init__(self, *args: Any, start: Tensor):
        _Steps.__init__(self, *args)
        self.table = self.users.offsets.weight.data
        self.offsets = RowAdagrad(self.table, self.rate)
        self.scratch = self.table.new_empty(0, self.table.shape[1])
        self.decay = self.strength / self.counts.clamp_min(1).float()  # (U,): each occurrence carries its share
        self.start = start
        if self.users.shared:
            self.adam = torch.optim.Adam([self.users.base], lr=self.rate / 10)

    def step(self, z: Tensor, users: Tensor) -> None:
        own = self._rows(users)  # (B, D)
        held = own if self.users.shared else own - self.start
        base = self.users.base if self.users.shared else self.table[0]
        generic = z @ base  # (B,)
        margin = _row_dots(own, z) + (generic if self.users.shared else 0)
        by_own, by_generic = self.slopes(margin, generic)
        if self.users.shared:
            _adam_step(self.adam, self.users.base, z.T @ (by_own + by_generic) / len(z), self._pull())
            by_own.masked_fill_(users == 0, 0)  # o_0 is fixed: at zero, so that its decay is nothing as well
        else:
            mean = z.T @ by_generic / len(z) + self.table[0].sub(self.start) * (self.base_strength / self.total)
            self.offsets.step(torch.zeros(1, dtype=torch.int64), mean[None])
        gradients = held.mul_(self.decay.index_select(0, users)[:, None]).addcmul_(z, by_own[:, None])  # (B, D)
        self.offsets.step(users, gradients)

    def _rows(self, users: Tensor) -> Tensor:
        """Table rows (B, D), in memory that the next step uses again: fresh pages are slow."""
        if len(self.scratch) < len(users):
            self.scratch = self.table.new_empty(len(users), self.table.shape[1])
        return torch.index_select(self.table, 0, users, out=self.scratch[: len(users)])


class _ClusterSteps(_Steps):
    users: ClusterUsers

    def __init__(self, *args: Any, start: Tensor):
        super().__init__(*args)
        self.start = start
        self.table = self.users.logits.weight.data
        self.logits = RowAdagrad(self.table, self.rate * 10)
        self.adam = torch.optim.Adam([self.users.centres], lr=self.rate / 10)

    def step(self, z: Tensor, users: Tensor) -> None:
        per_centre = z @ self.users.centres.T  # (B, C)
        mine = self.table.index_select(0, users).softmax(1)  # (B, C)
        theirs = self.table[0].softmax(0)  # (C,)
        own, generic = torch.linalg.vecdot(mine, per_centre), per_centre @ theirs  # (B,)
        by_own, by_generic = self.slopes(own, generic)
        by_mine = by_own[:, None] * mine * (per_centre - own[:, None])  # (B, C)
        by_theirs = (by_generic[:, None] * theirs * (per_centre - generic[:, None])).mean(0)  # (C,)
        by_centre = (by_own[:, None] * mine + by_generic[:, None] * theirs).T @ z / len(z)  # (C, D)
        _adam_step(self.adam, self.users.centres, by_centre, self._pull())
        self.logits.step(users, by_mine)
        self.logits.step(torch.zeros(1, dtype=torch.int64), by_theirs[None])

    def _pull(self) -> Tensor:
        """Holds the centres' mean to the starting value, and each centre to their mean."""
        mean = self.users.centres.mean(0)
        return (self.strength * (self.users.centres - mean) + self.base_strength * (mean - self.start)) / self.total


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row dot products (B,), in pieces that stay in the cache: vecdot writes the (B, D) product first."""
    pairs = zip(left.split(256), right.split(256), strict=True)
    return torch.cat([torch.linalg.vecdot(*pair) for pair in pairs])


def _adam_step(adam: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor, pull: Tensor) -> None:
    parameter.grad = gradient + pull
    adam.step()


def _steps(users: UserModel, counts: Tensor, config: HeadConfig, base: float, strength: float, start: Tensor) -> _Steps:
    if isinstance(users, IndividualizedUsers):
        return _IndividualizedSteps(users, counts, config, base, strength, start=start)
    if isinstance(users, ClusterUsers):
        return _ClusterSteps(users, counts, config, base, strength, start=start)
    return _UniformSteps(users, counts, config, base, strength)


@torch.no_grad()
def log_loss(users: UserModel, examples: Examples, chunk: int = 65536) -> float:
    """Mean of softplus(-<e_u, z>) in nats; nan on no examples."""
    parts = zip(examples.z.split(chunk), examples.users.split(chunk), strict=True)
    losses = [softplus(-(users(rows) * z).sum(1)).sum() for z, rows in parts]
    return float(torch.stack(losses).sum() / len(examples)) if len(examples) else float("nan")


@torch.no_grad()
def train(steps: _Steps, train_set: Examples, validation: Examples, config: HeadConfig) -> tuple[UserModel, float, int]:
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
        steps = _steps(model, counts, config, base, strength, start)
        best, loss, epoch = train(steps, train_set, validation, config)
        tried = {"base_strength": base, "user_strength": strength, "log_loss": loss, "epoch": epoch}
        if show:
            print(
                f"  {name}: strength {strength or base:g}: validation log loss {loss:.4f}, epoch {epoch}",
                file=sys.stderr,
            )
        return best, tried

    uniform = _best([attempt("uniform", start, base, 0.0) for base in config.base_strengths], "base_strength")
    if config.user_model == "uniform":
        return uniform, uniform
    begin = uniform.users.forward(torch.zeros(1, dtype=torch.int64))[0].detach()
    tries = [attempt(config.user_model, begin, uniform.strength, strength) for strength in config.user_strengths]
    return _best(tries, "user_strength"), uniform


def _best(tries: list[tuple[UserModel, dict[str, float]]], strength: str) -> HeadFit:
    # Of equals the stronger: where no step helped, every strength ties, and row 0 is what the data supports.
    model, figures = min(tries, key=lambda attempt: (attempt[1]["log_loss"], -attempt[1][strength]))
    return HeadFit(model, figures[strength], figures["log_loss"], [figures for _, figures in tries])

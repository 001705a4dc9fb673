"""Gradient steps of all users' heads, written out; a step touches only the rows of the users in the batch."""

from typing import Any

import torch
from torch import Tensor

from ..core.users import ClusterUsers, IndividualizedUsers, UniformUsers, UserModel
from .head_config import HeadConfig


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


class Steps:
    """Gradient steps for one user model: what the three have in common."""

    def __init__(
        self, users: UserModel, counts: Tensor, config: HeadConfig, base: float, strength: float, start: Tensor
    ):
        self.users, self.counts, self.total, self.start = users, counts, int(counts.sum()), start
        self.alpha, self.base_strength, self.strength = config.user_loss_alpha, base, strength
        self.rate = config.learning_rate

    def pull(self, base: Tensor) -> Tensor:
        """Gradient (D,) of what holds e_0 to its starting value, per comparison."""
        return (base - self.start) * (self.base_strength / self.total)

    def slopes(self, own: Tensor, generic: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the two parts of the loss by their margins, each (B,)."""
        return torch.sigmoid(-own).mul_(-self.alpha), torch.sigmoid(-generic).mul_(self.alpha - 1)

    def step(self, z: Tensor, users: Tensor) -> None:
        raise NotImplementedError


class _UniformSteps(Steps):
    users: UniformUsers

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.adam = torch.optim.Adam([self.users.base], lr=self.rate / 10)

    def step(self, z: Tensor, users: Tensor) -> None:
        slope = -torch.sigmoid(-(z @ self.users.base))  # (B,)
        _adam_step(self.adam, self.users.base, z.T @ slope / len(z), self.pull(self.users.base))


class _IndividualizedSteps(Steps):
    users: IndividualizedUsers

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.table = self.users.offsets.weight.data
        self.offsets = RowAdagrad(self.table, self.rate)
        self.scratch = self.table.new_empty(0, self.table.shape[1])
        self.decay = self.strength / self.counts.clamp_min(1).float()  # (U,): each occurrence carries its share
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
            _adam_step(self.adam, self.users.base, z.T @ (by_own + by_generic) / len(z), self.pull(base))
            by_own.masked_fill_(users == 0, 0)  # o_0 is fixed: at zero, so that its decay is nothing as well
        else:
            mean = z.T @ by_generic / len(z) + self.pull(base)
            self.offsets.step(torch.zeros(1, dtype=torch.int64), mean[None])
        gradients = held.mul_(self.decay.index_select(0, users)[:, None]).addcmul_(z, by_own[:, None])  # (B, D)
        self.offsets.step(users, gradients)

    def _rows(self, users: Tensor) -> Tensor:
        """Table rows (B, D), in memory that the next step uses again: fresh pages are slow."""
        if len(self.scratch) < len(users):
            self.scratch = self.table.new_empty(len(users), self.table.shape[1])
        return torch.index_select(self.table, 0, users, out=self.scratch[: len(users)])


class _ClusterSteps(Steps):
    users: ClusterUsers

    def __init__(self, *args: Any):
        super().__init__(*args)
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
        _adam_step(self.adam, self.users.centres, by_centre, self._hold())
        self.logits.step(users, by_mine)
        self.logits.step(torch.zeros(1, dtype=torch.int64), by_theirs[None])

    def _hold(self) -> Tensor:
        """Holds the centres' mean to the starting value, and each centre to their mean."""
        mean = self.users.centres.mean(0)
        return self.strength / self.total * (self.users.centres - mean) + self.pull(mean)


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row dot products (B,), in pieces that stay in the cache: vecdot writes the (B, D) product first."""
    pairs = zip(left.split(256), right.split(256), strict=True)
    return torch.cat([torch.linalg.vecdot(*pair) for pair in pairs])


def _adam_step(adam: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor, pull: Tensor) -> None:
    parameter.grad = gradient + pull
    adam.step()


def make_steps(
    users: UserModel, counts: Tensor, config: HeadConfig, base: float, strength: float, start: Tensor
) -> Steps:
    """Steps for a user model.

    Args:
        counts: (U,) training comparisons of each user.
        base, strength: how strongly e_0 is held to `start` (D,), and users to row 0.
    """
    kinds: dict[type[UserModel], type[Steps]] = {
        UniformUsers: _UniformSteps,
        IndividualizedUsers: _IndividualizedSteps,
        ClusterUsers: _ClusterSteps,
    }
    return kinds[type(users)](users, counts, config, base, strength, start)

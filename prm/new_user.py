"""A new user without retraining: a convex fit of their own part with everything else frozen.

Individualized heads: with a Gaussian prior o ~ N(0, S) taken from the population of trained offsets, the MAP offset
of k comparisons lies in the span of S z_1 .. S z_k, so the fit is a damped Newton iteration in k dimensions whatever D
is (Gaussian-process classification with a linear kernel; Rasmussen and Williams 2006, algorithm 3.1). Cluster heads:
the user's mixture weights under a Dirichlet-like prior around row 0's. With no comparisons, both give row 0 exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

MAX_RANK = 64
STEPS = 50


@dataclass(frozen=True)
class OffsetPrior:
    """N(0, isotropic * I + factor' factor), in units of scaled features.

    Attributes:
        isotropic: variance in every direction.
        factor: (rank, D) directions in which the population differs, at most `MAX_RANK` of them.
    """

    isotropic: float
    factor: np.ndarray

    @classmethod
    def from_population(cls, offsets: np.ndarray, isotropic: float, weight: float) -> "OffsetPrior":
        """Prior from trained offsets (U, D): their second moment about row 0, cut to its leading directions."""
        rank = min(MAX_RANK, *offsets.shape)
        if not weight or not rank:
            return cls(isotropic, np.zeros((0, offsets.shape[1]), dtype=np.float32))
        # The smaller of the two Gram matrices has the same leading spectrum as the (U, D) table.
        wide = len(offsets) <= offsets.shape[1]
        values, vectors = np.linalg.eigh(offsets @ offsets.T if wide else offsets.T @ offsets)
        top = vectors[:, ::-1][:, :rank]
        factor = top.T @ offsets if wide else top.T * np.sqrt(np.maximum(values[::-1][:rank, None], 0))
        return cls(isotropic, (np.sqrt(weight / len(offsets)) * factor).astype(np.float32))

    def kernel(self, z: np.ndarray) -> np.ndarray:
        """z S z' of differences (..., k, D): (..., k, k)."""
        own = self.isotropic * (z @ z.swapaxes(-1, -2))
        if not len(self.factor):
            return own
        # One product for all users: user by user, the factor would be read again for each of them.
        seen = (z.reshape(-1, z.shape[-1]) @ self.factor.T).reshape(*z.shape[:-1], -1)  # (..., k, rank)
        own += seen @ seen.swapaxes(-1, -2)
        return own

    def offset(self, z: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """S z' weights: (..., k, D), (..., k) -> (..., D)."""
        pull = (weights[..., None, :].astype(z.dtype) @ z)[..., 0, :]
        return self.isotropic * pull + (pull @ self.factor.T) @ self.factor


def fit_offsets(z: np.ndarray, base: np.ndarray, prior: OffsetPrior, mask: np.ndarray | None = None) -> np.ndarray:
    """MAP offsets of many new users at once.

    Args:
        z: (n, k, D) scaled differences chosen - rejected of n users with up to k comparisons.
        base: (n, k) margins under row 0.
        mask: (n, k) True for real comparisons; None where all are.

    Returns:
        (n, D) offsets from row 0.
    """
    if not z.shape[1]:
        return np.zeros((len(z), z.shape[2]), dtype=z.dtype)
    if mask is not None:
        z = z * mask[..., None]
    kernel, base = prior.kernel(z).astype(np.float64), base.astype(np.float64)
    real = np.ones(base.shape) if mask is None else mask.astype(np.float64)
    return prior.offset(z, _newton(kernel, base, real))


def _newton(kernel: np.ndarray, base: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Minimises sum softplus(-m) + a'Ka / 2 over a with m = base + Ka; each user's step is halved until it helps.

    Undamped, the iteration diverges where margins are large (seen at D = 4096).
    """
    n, k = base.shape
    found, left = np.zeros((n, k)), np.arange(n)
    weights, margins = found.copy(), base
    value = _objective(weights, margins, base, real)
    diagonal = np.arange(k)
    for _ in range(STEPS):
        missing = expit(-margins) * real
        curvature = np.maximum(missing * (1 - missing), 1e-10)
        system = kernel.copy()
        system[:, diagonal, diagonal] += 1 / curvature
        target = (margins - base + missing / curvature)[..., None]
        move = np.linalg.solve(system, target)[..., 0] - weights
        moving = np.abs(move).max(-1) >= 1e-8
        if not moving.all():  # who has arrived leaves: most do well before the slowest
            found[left] = weights
            if not moving.any():
                return found
            kernel, base, real, left = kernel[moving], base[moving], real[moving], left[moving]
            weights, value, move = weights[moving], value[moving], move[moving]
        weights, margins, value = _damped(kernel, base, real, weights, value, move)
    found[left] = weights
    return found


def _damped(
    kernel: np.ndarray, base: np.ndarray, real: np.ndarray, weights: np.ndarray, value: np.ndarray, move: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights after a move halved until no user's objective rises, with their margins and objective."""
    step = np.ones(len(base))
    for _ in range(20):
        tried = weights + step[:, None] * move
        margins = base + (kernel @ tried[..., None])[..., 0]
        tried_value = _objective(tried, margins, base, real)
        worse = tried_value > value + 1e-12
        if not worse.any():
            break
        step[worse] /= 2
    return tried, margins, tried_value


def _objective(weights: np.ndarray, margins: np.ndarray, base: np.ndarray, real: np.ndarray) -> np.ndarray:
    losses = (np.logaddexp(0, -margins) * real).sum(-1)
    return losses + 0.5 * (weights * (margins - base)).sum(-1)


@dataclass(frozen=True)
class PriorTrial:
    """Data of one seen user, treated as new: comparisons to fit on, and validation comparisons to judge by."""

    fit_z: np.ndarray
    fit_base: np.ndarray
    held_z: np.ndarray
    held_base: np.ndarray
    row: int


ISOTROPIC = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHTS = (0.0, 0.25, 1.0, 4.0)
FOLDS = 8


def choose_prior(
    offsets: np.ndarray, trials: Sequence[PriorTrial], strength: float
) -> tuple[OffsetPrior, list[dict[str, float]]]:
    """Chooses the prior under which seen users, treated as new ones, predict their validation rows best.

    A user's own trained offset never helps to make the prior that they are judged by.

    Args:
        offsets: (U - 1, D) trained offsets from row 0, row i of user i + 1.
        strength: of the trained offsets; 1 / strength is the variance to start from.

    Returns:
        the prior from the whole population, and each candidate's mean log loss in nats.
    """
    tried = []
    for factor in ISOTROPIC:
        # With 0, a new user stays at row 0: what to choose where comparisons of seen users do not tell them apart.
        for weight in WEIGHTS if len(offsets) > 1 and factor else (0.0,):
            isotropic = factor / max(strength, 1e-6)
            losses = [loss for fold in range(FOLDS) for loss in _fold_losses(offsets, trials, fold, isotropic, weight)]
            if losses:
                tried.append({"isotropic": isotropic, "weight": weight, "log_loss": float(np.mean(losses))})
    best = min(tried, key=lambda t: t["log_loss"], default={"isotropic": 1 / max(strength, 1e-6), "weight": 0.0})
    return OffsetPrior.from_population(offsets, best["isotropic"], best["weight"]), tried


def _fold_losses(
    offsets: np.ndarray, trials: Sequence[PriorTrial], fold: int, isotropic: float, weight: float
) -> list[float]:
    inside = [trial for trial in trials if trial.row % FOLDS == fold]
    others = offsets[(np.arange(1, len(offsets) + 1) % FOLDS) != fold]
    if not inside or not len(others):
        return []
    prior = OffsetPrior.from_population(others, isotropic, weight)
    losses = []
    for trial in inside:
        offset = fit_offsets(trial.fit_z[None], trial.fit_base[None], prior)[0]
        losses.append(float(np.logaddexp(0, -(trial.held_base + trial.held_z @ offset)).mean()))
    return losses

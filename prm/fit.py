"""Comparisons -> features of a frozen backbone -> all users' heads -> a reward model that can be saved."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.comparisons import Comparison, Comparisons, DataError
from ..core.figures import wilson
from ..core.mixture import fit_mixture
from ..core.pairs import kept_rows
from ..core.pretrained import Backbone
from ..core.texts import over_long_by_user
from ..core.tokenize import TextLayout
from ..core.training import common_settings, resolved_layout, tell_over_long, user_facts, users_of
from ..core.users import UserModel
from .features import POOLINGS, FeatureReader, feature_reader
from .head_config import HeadConfig
from .heads import Examples, HeadFit, fit_heads
from .linear_head import LinearHead
from .new_user import OffsetPrior, PriorTrial, choose_prior
from .reward_model import PersonalizedRewardModel

BEST = "best"
TRIAL_USERS = 200
TRIAL_ROWS = 20
MIXTURE_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e6)  # the last keeps a new user at row 0


@dataclass
class FrozenFeatures:
    """Comparisons of one split as heads see them, and what the length policy did to them.

    Attributes:
        differences: (B, D) h_chosen - h_rejected, fp32, not scaled.
        over_long: user -> rows longer than the layout allows.
    """

    rows: list[Comparison]
    differences: Tensor
    over_long: dict[str, int]


def frozen_features(rows: Comparisons, reader: FeatureReader, pooling: str, show: bool) -> FrozenFeatures:
    """Runs the backbone over all responses of the comparisons (from the cache where they are there).

    Raises:
        DataError: a row is longer than the layout's `max_length` and the policy is to refuse, or a hidden state is not
            a number.
    """
    over = reader.over(rows)  # (B,)
    kept = [rows[i] for i in kept_rows(rows, over, reader.layout)]
    differences = reader.differences(kept, pooling, show)
    finite = torch.isfinite(differences).all(1)
    if not finite.all():
        bad = kept[int((~finite).nonzero()[0])]
        raise DataError(f"{bad.place}: the backbone's hidden state is not a number; try --dtype float32")
    return FrozenFeatures(kept, differences, over_long_by_user(rows, over))


def fit_reward_model(
    train: Comparisons,
    validation: Comparisons,
    backbone: Backbone,
    layout: TextLayout,
    pooling: str | None,
    config: HeadConfig,
    show: bool = False,
) -> PersonalizedRewardModel:
    """Trains a personalized reward model with linear heads on a frozen backbone.

    Args:
        validation: rows on which everything is chosen: strengths, epochs, the prior of new users.
        pooling: `last`, `mean`, None for what suits the backbone (`last` for a stock reward model), or `best` for
            whichever does better on validation rows, which costs no further pass of the backbone.

    Returns:
        the model; its `figures` hold the chosen strengths, every candidate, and the rows that were cut or dropped.
    """
    if pooling == BEST:
        return _best_pooling(train, validation, backbone, layout, config, show)
    pooling, resolved = resolve(backbone, layout, pooling)
    reader = feature_reader(backbone, resolved)
    parts = [frozen_features(rows, reader, pooling, show) for rows in (train, validation)]
    tell_over_long([part.over_long for part in parts], resolved)
    users = users_of(parts[0].rows, train.source, config.user_model)
    # One scale for all dimensions: scaling each by itself did worse on validation rows of every data set tried.
    scale = float(parts[0].differences.square().mean().sqrt().clamp_min(1e-12))
    sets = [Examples(p.differences / scale, users.rows([r.user.id for r in p.rows])) for p in parts]
    start = backbone.score * scale if backbone.score is not None else torch.zeros(backbone.hidden_size)
    personal, uniform = fit_heads(sets[0], sets[1], len(users), start, config, show)
    prior, mixture, prior_trials = new_user_settings(personal.users, personal.strength, sets, config.seed)
    left_out = [train.dropped_counts, validation.dropped_counts]
    figures = _figures(personal, uniform, sets, parts, prior_trials, left_out)
    settings = {
        **common_settings(backbone, resolved, train),
        "pooling": pooling,
        **_settings(config, personal.users.options()),
        "mixture_strength": mixture,
    }
    head = LinearHead(uniform.users.row0().detach() / scale, scale, prior)
    _divide(personal.users, scale)
    users.facts = user_facts(parts[0].rows, parts[0].over_long)
    return PersonalizedRewardModel(users, personal.users, settings, figures, head=head, show=show, _backbone=backbone)


def _best_pooling(
    train: Comparisons, validation: Comparisons, backbone: Backbone, layout: TextLayout, config: HeadConfig, show: bool
) -> PersonalizedRewardModel:
    """The model under the pooling with the lower log loss on validation rows."""
    models = []
    for pooling in POOLINGS:
        if show:
            print(f"{pooling} pooling", file=sys.stderr)
        models.append(fit_reward_model(train, validation, backbone, layout, pooling, config, show))
    losses = [model.figures["validation_log_loss"]["personal"] for model in models]
    best = models[int(np.argmin(losses))]
    best.figures["tried"]["pooling"] = dict(zip(POOLINGS, losses, strict=True))
    return best


def resolve(
    backbone: Backbone, layout: TextLayout, pooling: str | None, user_tokens: int = 0
) -> tuple[str, TextLayout]:
    """Pooling and layout with their defaults filled in, within what the backbone can read."""
    pooling = pooling or default_pooling(backbone)
    if pooling not in POOLINGS:
        raise ValueError(f"--pooling {pooling}: must be one of {', '.join((*POOLINGS, BEST))}")
    return pooling, resolved_layout(backbone, layout, user_tokens)


def default_pooling(backbone: Backbone) -> str:
    """`last` where a stock reward model's own head reads it, else `mean` (see docs/results.md for the measurement)."""
    return "last" if backbone.score is not None else "mean"


def _settings(config: HeadConfig, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "aggregator": "linear_head",
        "tuning": "frozen",
        "user_model": config.user_model,
        "user_options": options,
        "user_loss_alpha": config.user_loss_alpha,
        "seed": config.seed,
    }


def _figures(
    personal: HeadFit,
    uniform: HeadFit,
    sets: list[Examples],
    parts: list[FrozenFeatures],
    prior_trials: list[dict[str, float]],
    left_out: list[dict[str, int]],
) -> dict[str, Any]:
    return {
        "rows": {"train": len(sets[0]), "validation": len(sets[1])},
        "left_out": {"train": left_out[0], "validation": left_out[1]},
        "over_long": {"train": sum(parts[0].over_long.values()), "validation": sum(parts[1].over_long.values())},
        "base_strength": uniform.strength,
        "user_strength": personal.strength,
        "validation_log_loss": {"personal": personal.log_loss, "uniform": uniform.log_loss},
        "validation_accuracy": {"personal": _accuracy(personal, sets[1]), "uniform": _accuracy(uniform, sets[1])},
        "tried": {"uniform": uniform.tried, "personal": personal.tried, "new_user": prior_trials},
    }


@torch.no_grad()
def _accuracy(fit: HeadFit, examples: Examples) -> dict[str, Any]:
    """Accuracy on comparisons, a tie counting half, with Wilson's interval."""
    margins = (fit.users(examples.users) * examples.z).sum(1)
    return wilson(float((0.5 * (torch.sign(margins) + 1)).sum()), len(examples))


@torch.no_grad()
def _divide(model: UserModel, scale: float) -> None:
    """From units of scaled features to units of hidden states, so that scores need no scale."""
    for name, parameter in model.named_parameters():
        if name != "logits.weight":
            parameter.div_(scale)


def new_user_settings(
    users: UserModel, strength: float, sets: list[Examples], seed: int
) -> tuple[OffsetPrior | None, float, list[dict[str, float]]]:
    """Prior of a new user's offset, or strength of a new user's mixture, chosen on validation rows of seen users.

    Args:
        users: in units of scaled features.
        strength: of the trained offsets; 1 / strength is the variance that candidates are multiples of.
        sets: training and validation rows.
    """
    if users.name == "uniform":
        return None, 0.0, []
    trials = _prior_trials(users, sets, seed)
    if users.name == "cluster":
        mixture, tried = _choose_mixture(users, trials)
        return None, mixture, tried
    with torch.no_grad():
        rows = torch.arange(1, min(users.users, 10_000))
        offsets = (users(rows) - users.row0()).numpy()
    prior, tried = choose_prior(offsets, trials, strength)
    return prior, 0.0, tried


@torch.no_grad()
def _prior_trials(model: UserModel, sets: list[Examples], seed: int) -> list[PriorTrial]:
    """Seen users with enough rows, treated as new: up to 20 of their training rows to fit on, validation to judge."""
    base = model.row0()
    train, held = sets
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    fit_rows, held_rows = _by_user(train.users[order], order), _by_user(held.users, torch.arange(len(held)))
    eligible = [u for u in fit_rows if u and u < 10_000 and len(fit_rows[u]) >= 5 and u in held_rows]
    trials = []
    # Drawn at random (rows come in random order, so users do too): the most active people are not what a new user is.
    for user in eligible[:TRIAL_USERS]:
        z, kept = train.z[fit_rows[user][:TRIAL_ROWS]], held.z[held_rows[user]]
        trials.append(PriorTrial(z.numpy(), (z @ base).numpy(), kept.numpy(), (kept @ base).numpy(), user))
    return trials


def _by_user(users: Tensor, positions: Tensor) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for user, position in zip(users.tolist(), positions.tolist(), strict=True):
        found[user].append(position)
    return found


@torch.no_grad()
def _choose_mixture(model: Any, trials: Sequence[PriorTrial]) -> tuple[float, list[dict[str, float]]]:
    centres, prior = model.centres.numpy(), model.logits.weight[0].numpy()
    tried = []
    for strength in MIXTURE_STRENGTHS if trials else ():
        losses = []
        for trial in trials:
            weights = torch.from_numpy(fit_mixture(trial.fit_z @ centres.T, prior, strength)).softmax(0).numpy()
            losses.append(float(np.logaddexp(0, -(trial.held_z @ centres.T @ weights)).mean()))
        tried.append({"strength": strength, "log_loss": float(np.mean(losses))})
    best = min(tried, key=lambda t: t["log_loss"], default={"strength": 1.0})
    return best["strength"], tried

"""Rows of a model card that reward models and policies share."""

from typing import Any

import numpy as np


def card_rows(settings: dict[str, Any], figures: dict[str, Any], spread: np.ndarray) -> dict[str, str]:
    """What was trained on what, at what cost, and how far users differ.

    Args:
        spread: (U - 1,) distance of each user's vector from row 0, relative to row 0's norm.
    """
    losses = figures["validation_log_loss"]
    shown = ", ".join(f"{losses[key]:.4f} {word}" for key, word in _LOSSES.items() if key in losses)
    return {
        "trained on": f"{figures['rows']['train']:,} comparisons; {len(spread):,} users now known; "
        f"data hash `{settings['data']['hash']}`",
        "chosen on": f"{figures['rows']['validation']:,} validation comparisons",
        "validation log loss": shown,
        "weight of the user's loss (alpha)": str(settings["user_loss_alpha"]),
        **(_strengths(figures) if "base_strength" in figures else _training(settings, figures)),
        "how far users are from row 0, relative to its norm": _spread(spread),
    }


_LOSSES = {"personal": "personal", "uniform": "uniform", "row0": "row 0"}


def _strengths(figures: dict[str, Any]) -> dict[str, str]:
    return {"strengths": f"e_0 {figures['base_strength']:g}, users {figures['user_strength']:g}"}


def _training(settings: dict[str, Any], figures: dict[str, Any]) -> dict[str, str]:
    since = f" since step {figures['resumed_from']}" if "resumed_from" in figures else ""
    return {
        "steps": f"{figures['steps']:,} of {settings['batch_size']} comparisons, kept: step {figures['best_step']:,}",
        "learning rates": f"{settings['learning_rate']:g}, users {settings['user_learning_rate']:g}",
        "cost": f"{figures['trainable_parameters']:,} trainable parameters, {figures['training_seconds']:,.0f} s"
        f"{since}, {figures['peak_memory_gb'] or float('nan'):.1f} GB",
    }


def _spread(spread: np.ndarray) -> str:
    """Quantiles over users: whether the vectors differ at all, and whether a few people stand far out."""
    if not len(spread):
        return "no users"
    low, middle, high = np.quantile(spread, [0.1, 0.5, 0.9])
    return f"median {middle:.2f}, a tenth below {low:.2f}, a tenth above {high:.2f}, largest {spread.max():.2f}"

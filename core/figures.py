"""A measured figure with its uncertainty: `{"value", "low", "high", "n"}`, low to high being a 95 % interval."""

from typing import Any

import numpy as np

Figure = dict[str, Any]
Z95 = 1.959963984540054
NOTHING: Figure = {"value": None, "low": None, "high": None, "n": 0}


def figure(value: float, low: float, high: float, n: int) -> Figure:
    return {"value": float(value), "low": float(low), "high": float(high), "n": int(n)}


def wilson(successes: float, n: int) -> Figure:
    """Share with Wilson's score interval; half successes (ties) are allowed."""
    if not n:
        return dict(NOTHING)
    share, square = successes / n, Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * np.sqrt(share * (1 - share) / n + square / (4 * n**2))
    return figure(share, centre - half, centre + half, n)

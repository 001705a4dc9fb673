"""Charts of a report page, as plotly's plain objects: rows of dots with intervals, a histogram, a map."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from ..core.figures import Figure
from .report import Chart, visible

_LABEL = 26  # characters; the table beneath a chart has the whole text
NAMED = 24  # points of a map that can have their names beside them
_HOVER = {"hovertemplate": "%{customdata}<extra></extra>"}


@dataclass(frozen=True)
class Unit:
    """How numbers of one kind are written: times `scale`, rounded to `decimals`, with a suffix."""

    scale: float
    suffix: str
    decimals: int
    signed: bool = False


PERCENT = Unit(100, " %", 1)
POINTS = Unit(100, " points", 1, signed=True)
NUMBER = Unit(1, "", 3)


@dataclass(frozen=True)
class Sign:
    """How a series is drawn: never told from another by its colour alone."""

    colour: str
    symbol: str
    glyph: str


@dataclass(frozen=True)
class Series:
    """One figure per row of a chart of dots; where none has an interval they are drawn as marks."""

    name: str
    figures: Sequence[Figure]
    sign: Sign


_SHAPES = (
    ("circle", "●"),
    ("diamond", "◆"),
    ("square", "■"),
    ("triangle-up", "▲"),
    ("triangle-down", "▼"),
    ("star", "★"),
    ("hexagon", "⬢"),
)


def sign(i: int) -> Sign:
    """The i-th of 49 signs; any two differ in shape, colour or both, the first seven in both."""
    symbol, glyph = _SHAPES[(i + i // 7) % 7]
    return Sign(f"--c{i % 7}", symbol, glyph)


def chart_text(text: str, limit: int = _LABEL) -> str:
    """Text for a chart, where plotly would read `<b>`, `<a>` and entities: cut to the limit and escaped."""
    line = " ".join(visible(text).split()) or "(no name)"
    return escape(line if len(line) <= limit else line[: limit - 1] + "…", quote=False)


def shown(figure: Figure | float | None, unit: Unit = PERCENT) -> str:
    """A figure as `86.3 % (84.9 to 87.6)`, a bare number as `86.3 %`; `-` where there is nothing."""
    found = figure if isinstance(figure, Mapping) else {"value": figure, "low": None, "high": None}
    plus = "+" if unit.signed else ""
    value, low, high = (
        None if number is None else f"{number:{plus}.{unit.decimals}f}"
        for number in (_scaled(found[k], unit) for k in ("value", "low", "high"))
    )
    if value is None:
        return "-"
    return value + unit.suffix + (f" ({low} to {high})" if low is not None and high is not None else "")


def _scaled(value: float | None, unit: Unit) -> float | None:
    return round(value * unit.scale, 6) if value is not None and math.isfinite(value) else None


def dots(
    label: str,
    rows: Sequence[str],
    series: Sequence[Series],
    axis: str,
    unit: Unit = PERCENT,
    lines: Mapping[str, Figure] | None = None,
) -> Chart:
    """Rows of dots with intervals.

    Args:
        rows: name of each row, top to bottom.
        axis: what is measured.
        lines: further figures, drawn as lines across all rows, with a band where they have an interval.
    """
    shifts, most = _apart(series, len(rows))
    across = [part for name, figure in (lines or {}).items() for part in _across(name, figure, unit)]
    layout = {
        "xaxis": {
            "title": {"text": chart_text(axis, 60)},
            "range": _span([f for s in series for f in s.figures] + list((lines or {}).values()), unit),
            "ticksuffix": unit.suffix if unit is PERCENT else "",
        },
        "yaxis": {
            "range": [len(rows) - 0.5, -0.5],
            "tickvals": list(range(len(rows))),
            "ticktext": [chart_text(row) for row in rows],
        },
        "shapes": [part for part in across if "type" in part],
        "annotations": [part for part in across if "text" in part],
        "height": 80 + len(rows) * (20 + 12 * most),
    }
    # What comes first in the key is drawn last, on top.
    data = [_row_trace(rows, s, shift, unit) for s, shift in zip(series[::-1], shifts[::-1], strict=True)]
    return Chart(label, _key(series), data, layout, len(rows))


def _apart(series: Sequence[Series], rows: int) -> tuple[list[list[float]], int]:
    """How far each series stands off the middle of each row, so that no interval hides another; most in one row."""
    wide = np.array([[s.figures[i]["low"] is not None for i in range(rows)] for s in series], dtype=int)
    most = max(1, int(wide.sum(axis=0).max()))
    step = 12 / (20 + 12 * most)
    return (wide * step * (wide.cumsum(axis=0) - 1 - (wide.sum(axis=0) - 1) / 2)).round(3).tolist(), most


def _span(figures: Sequence[Figure], unit: Unit) -> list[float]:
    """From the lowest to the highest number of the figures, and a little more."""
    ends = [_scaled(f[k], unit) for f in figures for k in ("value", "low", "high")]
    there = [end for end in ends if end is not None] or [0.0]
    more = 0.03 * (max(there) - min(there)) or 1.0
    return [round(min(there) - more, 6), round(max(there) + more, 6)]


def _key(series: Sequence[Series]) -> list[tuple[str, str, str]]:
    """The key of several series; one alone needs none."""
    return [(s.sign.glyph, s.sign.colour, s.name) for s in series] if len(series) > 1 else []


def _row_trace(rows: Sequence[str], series: Series, shift: Sequence[float], unit: Unit) -> dict[str, Any]:
    there = [i for i, f in enumerate(series.figures) if _scaled(f["value"], unit) is not None]
    value, low, high = ([_scaled(series.figures[i][k], unit) for i in there] for k in ("value", "low", "high"))
    right, left = _lengths(value, high), _lengths(low, value)
    look = {"color": series.sign.colour, "thickness": 2, "width": 0}
    bars = {"error_x": {"type": "data", "symmetric": False, "array": right, "arrayminus": left, **look}}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": value,
        "y": [round(i + shift[i], 3) for i in there],
        "marker": _marker(series.sign, 9),
        "customdata": [
            f"{chart_text(rows[i], 80)}<br>{chart_text(series.name, 80)}: {shown(series.figures[i], unit)}"
            for i in there
        ],
        **_HOVER,
        **(bars if any(right) or any(left) else {}),
    }


def _marker(made: Sign, size: int) -> dict[str, Any]:
    return {"color": made.colour, "symbol": made.symbol, "size": size, "line": {"color": made.colour, "width": 1.6}}


def _lengths(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else round(b - a, 6) for a, b in zip(first, second, strict=True)]


def _across(name: str, figure: Figure, unit: Unit) -> list[dict[str, Any]]:
    """The line of a figure, its band and its name."""
    value, low, high = (_scaled(figure[k], unit) for k in ("value", "low", "high"))
    if value is None:
        return []
    place = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    line = {"color": "--muted", "width": 1.5, "dash": "dot"}
    parts: list[dict[str, Any]] = [{**place, "type": "line", "x0": value, "x1": value, "line": line}]
    if low is not None and high is not None:
        parts.append({**place, "type": "rect", "x0": low, "x1": high, "fillcolor": "--band", "line": {"width": 0}})
    words = {"text": chart_text(name), "showarrow": False, "yanchor": "bottom", "font": {"color": "--muted"}}
    return [*parts, {"xref": "x", "x": value, "yref": "paper", "y": 1, **words}] if name else parts


def histogram(label: str, values: np.ndarray, axis: str, what: str, unit: Unit = POINTS) -> Chart:
    """How many of the values (n,) lie where; the bin in the middle is around 0."""
    scaled = unit.scale * np.asarray(values, dtype=np.float64)
    half = max(0.5, float(np.abs(scaled).max()))
    edges = np.linspace(-half, half, 26)
    counts = np.histogram(scaled, edges)[0]
    low, high = edges[:-1], edges[1:]
    bars = {
        "type": "bar",
        "x": ((low + high) / 2).round(3).tolist(),
        "y": counts.tolist(),
        "marker": {"color": "--c0"},
        "customdata": [
            f"{a:+.1f} to {b:+.1f}{unit.suffix}: {c:,} {what}" for a, b, c in zip(low, high, counts, strict=True)
        ],
        **_HOVER,
    }
    layout = {
        "xaxis": {"title": {"text": axis}},
        "yaxis": {"title": {"text": what}},
        "shapes": _across("", {"value": 0.0, "low": None, "high": None}, unit),
        "height": 280,
        "bargap": 0.08,
    }
    return Chart(label, [], [bars], layout)


def scatter(label: str, series: Sequence[tuple[str, np.ndarray, Sequence[str], Sign]], axes: Sequence[str]) -> Chart:
    """Points in the plane; a series is its name, places (n, 2), names of the n points, and sign.

    A point that is called like its series has no name beside it.
    """
    few = sum(len(names) for _, _, names, _ in series) <= NAMED
    size, opacity = (10, 1) if few else (6, 0.6)
    data = [
        {
            "type": "scatter",
            "mode": "markers+text" if few else "markers",
            "x": places[:, 0].round(6).tolist(),
            "y": places[:, 1].round(6).tolist(),
            "marker": {**_marker(made, size), "opacity": opacity},
            "text": [chart_text(name) if name != of else "" for name in names] if few else [],
            "textposition": "top center",
            "textfont": {"color": "--muted", "size": 11},
            "customdata": [chart_text(name, 80) for name in names],
            **_HOVER,
        }
        for of, places, names, made in series
    ]
    layout = {
        "xaxis": {"title": {"text": axes[0]}},
        "yaxis": {"title": {"text": axes[1]}, "scaleanchor": "x"},
        "height": 480,
    }
    return Chart(label, [(made.glyph, made.colour, name) for name, _, _, made in series], data, layout)

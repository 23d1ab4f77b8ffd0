"""Curves against the step, as inline SVG that fits any width.

A chart is drawn here, in Python, and works without any script. Its SVG is stretched to the width of the page, with
lines that keep their thickness; the labels are HTML, placed in per cent, so that they are not stretched. For hovering
the page's script gets the points of each curve as numbers (`Chart.points`).

A curve of many points is thinned: each of at most MOST_POINTS stretches of it keeps its mean, lowest and highest value.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_POINTS = 400  # of a curve
WIDTH, HEIGHT = 1000, 300  # of the SVG's own coordinates
COLORS = 8  # the page's style sheet has as many colours, c0 to c7


@dataclass(frozen=True)
class Points:
    """Points of a curve: `steps`, and for each the mean, the lowest and the highest value of its stretch. All (n,)."""

    steps: np.ndarray
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


def thin(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> Points:
    """The finite ones of `values` at ascending `steps`, as at most `most` points at the last step of each stretch."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= most:
        return Points(x, y, y, y)
    edges = np.linspace(0, len(x), most + 1).astype(int)
    starts, ends = edges[:-1], edges[1:]
    means = np.add.reduceat(y, starts) / (ends - starts)
    return Points(x[ends - 1], means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def running_mean(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """The mean of each value and those before, which count less the older they are. A value that is not finite takes no
    part, and has the mean before it."""
    means, mean = [], math.nan
    for value in values:
        if math.isfinite(value):
            mean = value if math.isnan(mean) else decay * mean + (1 - decay) * value
        means.append(mean)
    return means


@dataclass(frozen=True)
class Curve:
    """A line of a chart. `spread`: show the lowest and highest values too, as a faint band."""

    label: str
    color: int  # 0 to COLORS - 1
    points: Points
    spread: bool = False
    dashed: bool = False

    @property
    def last(self) -> str:
        return short(self.points.means[-1])


@dataclass
class Chart:
    """Curves over the same steps. `marks`: (step, text, colour) of vertical lines; `from_zero`: the axis holds 0."""

    title: str
    curves: list[Curve]
    from_zero: bool = True
    marks: list[tuple[int, str, int]] = field(default_factory=list)
    note: str = ""

    def __post_init__(self):
        self.curves = [curve for curve in self.curves if len(curve.points.steps)]

    def bounds(self) -> tuple[float, float]:
        """The lowest and highest value of the axis. Single outliers may leave the chart."""
        lows = np.concatenate([c.points.lows if c.spread else c.points.means for c in self.curves])
        highs = np.concatenate([c.points.highs if c.spread else c.points.means for c in self.curves])
        low, high = float(np.percentile(lows, 1)), float(np.percentile(highs, 99))
        low = min(low, 0.0) if self.from_zero else low
        low, high = np.clip((low, high), -1e300, 1e300)
        margin = 0.06 * (high - low) or abs(high) or 1.0
        return float(low - margin * (low != 0 or not self.from_zero)), float(high + margin)

    def points(self) -> list[dict[str, Any]]:
        """What the page's script shows at a step: label, colour, steps and values of each curve."""
        rounded = lambda values: [float(f"{v:.5g}") for v in values.tolist()]
        return [
            {"label": c.label, "color": c.color % COLORS, "x": c.points.steps.tolist(), "y": rounded(c.points.means)}
            for c in self.curves
        ]

    def html(self, number: int, end: int) -> str:
        """The chart as HTML, over the steps 0 to `end`. `number`: its place in the page's list of points."""
        low, high = self.bounds()
        to_x = lambda steps: WIDTH * np.asarray(steps, dtype=np.float64) / max(1, end)
        to_y = lambda values: HEIGHT * (1 - (np.clip(values, low, high) - low) / (high - low))
        ticks = [(v, HEIGHT - HEIGHT * (v - low) / (high - low)) for v in nice_ticks(low, high, 5)]
        shapes = [f'<path class="grid" d="M0 {y:.1f}H{WIDTH}"/>' for _, y in ticks]
        shapes += [_shape(curve, to_x, to_y) for curve in self.curves]
        labels = [f'<span class="y" style="top:{100 * y / HEIGHT:.1f}%">{short(v)}</span>' for v, y in ticks]
        for step in filter(float.is_integer, map(float, nice_ticks(0, end, 5))):
            labels.append(f'<span class="x" style="left:{100 * step / max(1, end):.1f}%">{step:,.0f}</span>')
        for step, text, color in self.marks:
            x = float(to_x(step))
            shapes.append(f'<path class="mark c{color % COLORS}" d="M{x:.1f} 0V{HEIGHT}"/>')
            side = f"right:{100 - x / 10:.1f}%" if x > WIDTH / 2 else f"left:{x / 10:.1f}%"
            labels.append(f'<span class="mark" style="{side}">{html.escape(text)}</span>')
        legend = "".join(
            f'<span class="key c{c.color % COLORS}{" dashed" * c.dashed}">{html.escape(c.label)} <b>{c.last}</b></span>'
            for c in self.curves
        )
        title, note = html.escape(self.title), f"<small>{html.escape(self.note)}</small>" if self.note else ""
        return (
            f'<figure class="chart" data-chart="{number}" tabindex="0" aria-label="{title}; arrow keys move the step">'
            f"<figcaption><h3>{title}</h3>{note}{legend}</figcaption>"
            f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
            f"{''.join(shapes)}</svg>{''.join(labels)}</div></figure>"
        )


def _shape(curve: Curve, to_x: Any, to_y: Any) -> str:
    """A curve as SVG: the band between lowest and highest values if it is shown, and the line of the means."""
    points, color = curve.points, f"c{curve.color % COLORS}"
    x = to_x(points.steps)
    path = lambda xs, ys: "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys, strict=True))
    if curve.spread:
        edge = np.concatenate([points.highs, points.lows[::-1]])
        return f'<path class="band {color}" d="M{path(np.concatenate([x, x[::-1]]), to_y(edge))}Z"/>'
    line = path(x, to_y(points.means))
    dot = "h0.01" if len(x) == 1 else ""  # a line without length would not show
    return f'<path class="line {color}{" dashed" * curve.dashed}" d="M{line}{dot}"/>'


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next((power * m for m in (1, 2, 5) if span / (power * m) <= count), power * 10)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few letters: 0.0832, 1.5, 12,300, 2e-05."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"

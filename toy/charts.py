"""Charts as SVG files, in text alone: what `toy.convergence` draws."""

import statistics
from collections.abc import Mapping, Sequence

COLORS = ("#1f69be", "#c83228", "#2f8f4e", "#8a5cc2", "#c98a12", "#555555", "#17a2b8")
WIDTH = 760


def document(height: float, title: str, marks: Sequence[str]) -> str:
    """An SVG file of a white page with a title and `marks`."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}"'
        ' font-family="sans-serif" font-size="12">',
        '<defs><pattern id="hatched" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<path d="M0 0V6" stroke="{COLORS[0]}" stroke-width="6" opacity="0.5"/></pattern></defs>',
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="14">{title}</text>',
        *marks, "</svg>", "",
    ])  # fmt: skip


def bar_chart(title: str, bars: Sequence[tuple[str, Sequence[float], bool]], missing: str) -> str:
    """A bar for each (name, values, incomplete), the shortest first: the mean, and a line from the lowest to the
    highest value. Incomplete bars are hatched; where there are no values the text `missing` stands."""
    bars = sorted(bars, key=lambda bar: statistics.mean(bar[1]) if bar[1] else float("inf"))
    left, row_height, top = 212, 20, 40
    scale = (WIDTH - left - 60) / max((max(values) for _, values, _ in bars if values), default=1)
    marks = []
    for i, (name, values, incomplete) in enumerate(bars):
        y = top + i * row_height
        marks.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
        if not values:
            marks.append(f'<text x="{left + 4}" y="{y + 13}" fill="#a33">{missing}</text>')
            continue
        mean, low, high = (left + scale * f(values) for f in (statistics.mean, min, max))
        fill = "url(#hatched)" if incomplete else COLORS[0]
        marks += [
            f'<rect x="{left}" y="{y + 3}" width="{mean - left:.1f}" height="{row_height - 6}" fill="{fill}"/>',
            f'<path d="M{low:.1f} {y + 10}H{high:.1f}" stroke="{COLORS[1]}" stroke-width="2"/>',
            f'<text x="{max(mean, high) + 5:.1f}" y="{y + 13}">{statistics.mean(values):.0f}</text>',
        ]
    return document(top + len(bars) * row_height + 10, title, marks)


def line_chart(title: str, lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]]) -> str:
    """A line for each name: its points are (x, values between 0 and 1), drawn at their mean, over a paler area from the
    lowest to the highest value."""
    left, top, width, height = 40, 40, WIDTH - 60, 260
    scale = width / max((x for points in lines.values() for x, _ in points), default=1)
    at = lambda x, y: f"{left + scale * x:.1f} {top + height * (1 - min(max(y, 0), 1)):.1f}"
    marks = []
    for tenths in range(0, 11, 2):
        y = top + height * (1 - tenths / 10)
        marks.append(f'<path d="M{left} {y:.1f}H{left + width}" stroke="#dddddd"/>')
        marks.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tenths / 10:g}</text>')
    for i in range(5):
        x = i / 4 * width
        marks.append(f'<text x="{left + x:.1f}" y="{top + height + 18}" text-anchor="middle">{x / scale:.0f}</text>')
    for k, (name, points) in enumerate(lines.items()):
        color = COLORS[k % len(COLORS)]
        area = [at(x, max(v)) for x, v in points] + [at(x, min(v)) for x, v in reversed(points)]
        mean = [at(x, statistics.mean(v)) for x, v in points]
        y = top + height + 42 + 18 * (k // 3)
        x = left + width / 3 * (k % 3)
        marks += [
            f'<path d="M{"L".join(area)}Z" fill="{color}" opacity="0.18"/>',
            f'<path d="M{"L".join(mean)}" fill="none" stroke="{color}" stroke-width="2"/>',
            f'<path d="M{x:.1f} {y - 4}h24" stroke="{color}" stroke-width="3"/>',
            f'<text x="{x + 30:.1f}" y="{y}">{name}</text>',
        ]
    return document(top + height + 50 + 18 * ((len(lines) + 2) // 3), title, marks)

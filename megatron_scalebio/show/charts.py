"""Line charts as SVG: one self-contained string each, readable on light and dark pages, labelled where lines end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 800, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 222, 34, 40  # margins around the plot; line ends are labelled in the right one
LABEL_HEIGHT = 14
MOST_LABELS = (HEIGHT - TOP - BOTTOM) // LABEL_HEIGHT
MOST_POINTS = 500  # per line; more would not be seen

# Distinct for most colour-blind eyes, and of middling lightness, for both backgrounds. Further lines are dashed.
COLORS = ("#2f7ed8", "#e8710a", "#1a9e77", "#c2419c", "#b58900", "#7a63d2", "#d1495b", "#4c9aa8")
DASHES = ("none", "6 3", "2 3", "8 3 2 3")

STYLE = """
.chart text { font: 12px system-ui, sans-serif; fill: #444; }
.chart .title { font-size: 14px; font-weight: 600; fill: #1c1c1c; }
.chart .grid { stroke: #8884; stroke-width: 1; }
.chart .reference { stroke: #888; stroke-width: 1; stroke-dasharray: 4 4; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .leader { stroke: #8888; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
  .chart text { fill: #bbb; }
  .chart .title { fill: #eee; }
}
"""


@dataclass(frozen=True)
class Line:
    """A named line through (step, value) points, at least one, its steps ascending."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    title: str,
    lines: Sequence[Line],
    reference: float | None = None,
    from_zero: bool = False,
    label_format: str = ".3f",
) -> str:
    """An SVG element with one line each, steps to the right, and a dashed horizontal line at `reference`."""
    steps = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in line.points] + ([] if reference is None else [reference])
    x_ticks = ticks(min(steps), max(steps), whole=True)
    y_ticks = ticks(0.0 if from_zero else min(values), max(values))
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        up = (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    for y in y_ticks:
        _, row = place(first, y)
        parts.append(f'<path class="grid" d="M{LEFT} {row:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{row + 4:.1f}" text-anchor="end">{_number(y, y_ticks)}</text>')
    for x in x_ticks:
        column, _ = place(x, low)
        parts.append(f'<text x="{column:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    if reference is not None:
        _, row = place(first, reference)
        parts.append(f'<path class="reference" d="M{LEFT} {row:.1f}H{WIDTH - RIGHT}"/>')
    ends = []
    for index, line in enumerate(lines):
        color, dash = COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]
        stroke = f'stroke="{color}" stroke-dasharray="{dash}"'
        points = [place(x, y) for x, y in _thinned(line.points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="line" d="{path}" {stroke}/>')
        if len(points) == 1:
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{color}"/>')
        ends.append((points[-1], f"{_shortened(line.name)} {line.points[-1][1]:{label_format}}", stroke))
    parts += _end_labels(ends)
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(title)}"><style>{STYLE}</style>{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Some round numbers that enclose the range low to high; if `whole`, integers within it."""
    if high <= low:
        low, high = (low - 1, high + 1) if not whole else (low, low + 1)
    rough = (high - low) / 5
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    if whole:
        step = max(1, round(step))
        return [value * step for value in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _end_labels(ends: list[tuple[tuple[float, float], str, str]]) -> list[str]:
    """A legend at the lines' ends, moved apart where it would overlap; of many lines, the highest."""
    shown = sorted(ends, key=lambda end: end[0][1])[:MOST_LABELS]
    rows: list[float] = []
    for (_, y), _, _ in shown:  # downwards: each below the one before
        rows.append(max(y, rows[-1] + LABEL_HEIGHT) if rows else y)
    floor = float(HEIGHT - BOTTOM)
    for index in reversed(range(len(rows))):  # and back up, should the last have left the plot
        rows[index] = min(rows[index], floor)
        floor = rows[index] - LABEL_HEIGHT
    parts = []
    left = WIDTH - RIGHT
    for row, ((x, y), text, stroke) in zip(rows, shown, strict=True):
        parts.append(f'<path class="leader" d="M{x + 2:.1f} {y:.1f}L{left + 12} {row:.1f}"/>')
        parts.append(f'<path class="line" d="M{left + 14} {row:.1f}h16" {stroke}/>')
        parts.append(f'<text x="{left + 36}" y="{row + 4:.1f}">{escape(text)}</text>')
    return parts


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Evenly chosen points, the last one among them."""
    stride = math.ceil(len(points) / MOST_POINTS)
    return list(points[::-stride][::-1])


def _number(value: float, among: Sequence[float]) -> str:
    """A tick's text, with the decimals that tell it from its neighbours."""
    step = among[1] - among[0]
    if max(abs(value) for value in among) < 1e-2 or step >= 1e5:
        return "0" if value == 0 else f"{value:.1e}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}"


def _shortened(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"

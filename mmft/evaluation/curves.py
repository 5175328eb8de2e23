"""Training curves as coordinates for inline SVG; `report.html.jinja` draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 360, 170  # of the viewBox
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 10, 24
MOST_POINTS = 240  # per line; more cannot be told apart at this size
HIT_POINTS = 60  # per line, with a hover title
_FLAT = 1e-4  # a change by a smaller share is drawn as none; its ticks would have too many digits to be read
_PEAK, _ROOM, _USUAL = 8.0, 3.0, 0.9  # a value past 8 times what nine in ten stay below is cut off at 3 times that

Points = list[tuple[float, float]]


@dataclass
class Line:
    """One line of a chart: SVG path pieces (split where values are missing) and dots with hover titles."""

    label: str
    colour: int
    last: str
    pieces: list[str] = field(default_factory=list)
    dots: list[tuple[float, float, str]] = field(default_factory=list)
    marked: bool = False  # few points: show the dots


@dataclass
class Chart:
    title: str
    note: str
    lines: list[Line]
    areas: list[tuple[int, str]]  # (colour, polygon points)
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def series(rows: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of a metric where it was logged; NaN where it was logged as null."""
    found = []
    for row in rows:
        if key in row and is_number(row.get("step")):
            value = row[key]
            found.append((float(row["step"]), float(value) if is_number(value) else math.nan))
    return found if any(math.isfinite(y) for _, y in found) else []


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def chart(
    title: str,
    lines: Sequence[tuple[str, Points]],
    note: str = "",
    band: Points | None = None,
    stacked: bool = False,
    floor: float | None = None,
    marked: bool = False,
) -> Chart | None:
    """A chart of some lines, None when none of them has a value.

    Args:
        lines: (label, points) each.
        band: half-widths of a band around the first line, at the same steps.
        stacked: lay the lines on each other as areas; all need the same steps.
        floor: values below it are drawn at it (one bad first step must not flatten the rest). Lone peaks are cut off
            likewise, and the note says so.
        marked: show every point, for few of them.
    """
    colours = [i for i, (_, points) in enumerate(lines) if points]  # a run keeps its colour where another has no line
    lines = [(label, thin(points)) for label, points in lines if points]
    if not lines:
        return None
    if stacked:
        return _stacked(title, lines, note)
    widths = dict(band or [])
    edges = [(x, y, widths.get(x, math.nan)) for x, y in lines[0][1]]
    edges = [edge for edge in edges if all(map(math.isfinite, edge))]
    values = [y for _, points in lines for _, y in points if math.isfinite(y)]
    values += [y + sign * w for _, y, w in edges for sign in (-1, 1)]
    ceiling = None if band or marked else _ceiling(values)
    if ceiling is not None:
        note = f"{note} Peaks are cut off; the highest is {short(max(values))}.".strip()
    least = max(min(values), -math.inf if floor is None else floor)
    most = max(least, max(values) if ceiling is None else ceiling)
    to_x, x_ticks = _x_axis(lines)
    to_y, y_ticks = _y_axis(least, most)
    areas = []
    if len(edges) > 1:
        upper = [(x, y + w) for x, y, w in edges]
        lower = [(x, y - w) for x, y, w in reversed(edges)]
        areas = [(0, _polygon(upper + lower, to_x, to_y))]

    def inside(y: float) -> float:
        return to_y(min(max(y, least), most))

    drawn = [_line(label, i, points, to_x, inside, marked) for i, (label, points) in zip(colours, lines, strict=True)]
    return Chart(title, note, drawn, areas, x_ticks, y_ticks)


def _ceiling(values: Sequence[float]) -> float | None:
    """Where lone peaks are cut off, so that they do not flatten the rest; None where there are none."""
    usual = sorted(values)[int(_USUAL * (len(values) - 1))]
    return _ROOM * usual if usual > 0 and max(values) > _PEAK * usual else None


def _stacked(title: str, lines: list[tuple[str, Points]], note: str) -> Chart:
    steps = sorted({x for _, points in lines for x, _ in points})
    to_x, x_ticks = _x_axis(lines)
    base = dict.fromkeys(steps, 0.0)
    areas: list[tuple[int, Points]] = []
    legend = []
    for i, (label, points) in enumerate(lines):
        found = dict(points)
        finite = [y for _, y in points if math.isfinite(y)]
        top = {x: base[x] + (found.get(x, 0.0) if math.isfinite(found.get(x, 0.0)) else 0.0) for x in steps}
        areas.append((i, [(x, top[x]) for x in steps] + [(x, base[x]) for x in reversed(steps)]))
        legend.append(Line(label, i, f"{short(sum(finite) / len(finite))} s a step"))
        base = top
    to_y, y_ticks = _y_axis(0.0, max(base.values()))
    polygons = [(i, _polygon(outline, to_x, to_y)) for i, outline in areas]
    return Chart(title, note, legend, polygons, x_ticks, y_ticks)


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Every k-th point, the last one always: means would hide the spikes one looks for."""
    if len(points) <= most:
        return points
    every = math.ceil(len(points) / (most - 1))
    kept = points[::every]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _line(label: str, colour: int, points: Points, to_x, to_y, marked: bool) -> Line:
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    line = Line(label, colour, short(finite[-1][1]), marked=marked or len(finite) == 1)
    piece: list[str] = []
    for x, y in [*points, (0.0, math.nan)]:
        if math.isfinite(y):
            piece.append(f"{to_x(x):.1f},{to_y(y):.1f}")
        elif piece:
            line.pieces.append(" ".join(piece))
            piece = []
    line.dots = [(round(to_x(x), 1), round(to_y(y), 1), f"step {x:g}: {short(y)}") for x, y in thin(finite, HIT_POINTS)]
    return line


def _polygon(outline: Points, to_x, to_y) -> str:
    return " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in outline)


def _x_axis(lines: Sequence[tuple[str, Points]]):
    steps = [x for _, points in lines for x, _ in points]
    low, high = min(steps), max(steps)
    span = (high - low) or 1.0

    def place(x: float) -> float:
        return LEFT + (x - low) / span * (WIDTH - LEFT - RIGHT)

    ticks = [t for t in _round_ticks(low, high, 5) if t == int(t)]
    return place, [(round(place(t), 1), f"{t:g}") for t in ticks]


def _y_axis(low: float, high: float):
    if high - low < _FLAT * max(abs(low), abs(high)) or high == low:
        pad = abs(high) * 0.1
        low, high = low - pad, high + (pad or 1.0)
    ticks = _round_ticks(low, high, 4)
    # Lines do not touch the frame; the ticks may reach past them.
    room = 0.04 * (high - low)
    low, high = low - (room if low != 0 else 0), high + room

    def place(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    return place, [(round(place(t), 1), label) for t, label in zip(ticks, _labels(ticks), strict=True)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Ticks in so many digits that no two look alike."""
    labels = [short(tick) for tick in ticks]
    if len(set(labels)) < len(labels):
        decimals = -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-6)
        labels = [f"{tick:z.{max(0, decimals)}f}".replace("-", "−") for tick in ticks]
    return labels


def _round_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between low and high."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Three significant digits, with k and M for the thousands."""
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:.3g}M"
    elif size >= 1e4:
        text = f"{value / 1e3:.3g}k"
    elif 0 < size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:.4g}" if size >= 1000 else f"{value:z.3g}"
    return text.replace("-", "−")

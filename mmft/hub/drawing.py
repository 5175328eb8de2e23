"""The curves of a run as one picture, drawn by Pillow from the coordinates that the report uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmft.evaluation.curves import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Chart

_SCALE = 2  # pixels per unit of a chart
_TITLE = 24  # units above a chart
_COLOURS = ("#2563c9", "#c2570c", "#0f7f78", "#8a4bbd", "#a37a00", "#64748b")


def draw_charts(charts: Sequence[Chart], path: Path) -> None:
    """Writes the charts as a PNG, two in a row."""
    rows = (len(charts) + 1) // 2
    columns = min(2, len(charts))
    picture = Image.new("RGB", (columns * WIDTH * _SCALE, rows * (HEIGHT + _TITLE) * _SCALE), "white")
    for i, chart in enumerate(charts):
        picture.paste(_panel(chart), (i % 2 * WIDTH * _SCALE, i // 2 * (HEIGHT + _TITLE) * _SCALE))
    picture.save(path, optimize=True)


def _panel(chart: Chart) -> Image.Image:
    panel = Image.new("RGB", (WIDTH * _SCALE, (HEIGHT + _TITLE) * _SCALE), "white")
    draw, small = ImageDraw.Draw(panel), ImageFont.load_default(10 * _SCALE)
    bottom = HEIGHT - BOTTOM
    draw.text(_at(LEFT, 5 - _TITLE), chart.title, "black", ImageFont.load_default(12 * _SCALE))
    for i, outline in chart.areas:
        draw.polygon(_points(outline), _pale(_COLOURS[i % len(_COLOURS)]))
    for y, label in chart.y_ticks:
        draw.line([_at(LEFT, y), _at(WIDTH - RIGHT, y)], "#e0e1e4", 1)
        draw.text(_at(LEFT - 6, y), _ascii(label), "#63676e", small, anchor="rm")
    for x, label in chart.x_ticks:
        draw.text(_at(x, bottom + 5), _ascii(label), "#63676e", small, anchor="mt")
    for line in chart.lines:
        colour = _COLOURS[line.colour % len(_COLOURS)]
        for piece in map(_points, line.pieces):
            if len(piece) > 1:
                draw.line(piece, colour, 2 * _SCALE, joint="curve")
            if line.marked or len(piece) == 1:
                for point in piece:
                    draw.circle(point, 3 * _SCALE, colour)
    return panel


def _at(x: float, y: float) -> tuple[float, float]:
    return x * _SCALE, (y + _TITLE) * _SCALE


def _points(text: str) -> list[tuple[float, float]]:
    """ "x,y x,y ..." as the report's SVG has them."""
    return [_at(*map(float, pair.split(","))) for pair in text.split()]


def _pale(colour: str) -> str:
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{255 - (255 - c) // 6:02x}" for c in channels)


def _ascii(label: str) -> str:
    return label.replace("−", "-")  # Pillow's own font has no minus sign

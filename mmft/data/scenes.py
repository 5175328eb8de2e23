"""The built-in world: small scenes of coloured shapes, drawn from a seed.

A `Scene` is the ground truth (what stands where, in which colour, in front of what). The picture
(`render`), the reference captions (`captions`), the dataset rows (`scene_rows`) and the check of what
a caption claims (`attribute_claims`) are all derived from it, and so can be anything else that needs
the truth: questions, clips, games.

Everything is a pure function of the seed; no global random state is read or changed. How annotators
word their captions is in `scene_language.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmft.data.scene_language import attribute_claims, write_captions

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "PATTERNS",
    "PROMPT",
    "SHAPES",
    "SIDE",
    "SIZES",
    "SPLITS",
    "Background",
    "Scene",
    "SceneObject",
    "SceneRows",
    "attribute_claims",
    "captions",
    "make_scene",
    "render",
    "scene_rows",
]

SIDE = 96  # pixels, width and height of a picture
GRID = 12  # pixels between possible centres of objects
PROMPT = "Describe the picture."

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 40),
    "orange": (245, 140, 25),
    "yellow": (246, 218, 45),
    "green": (45, 160, 70),
    "blue": (45, 95, 225),
    "purple": (135, 55, 180),
    "pink": (248, 130, 190),
    "brown": (125, 78, 42),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 242),
    "black": (24, 24, 26),
    "grey": (150, 152, 155),
    "beige": (222, 208, 176),
    "navy": (28, 36, 84),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "fading")
SIZES: dict[str, tuple[float, float]] = {  # radius in pixels, low and high
    "small": (8.5, 9.5),
    "medium": (13.0, 14.0),
    "large": (19.0, 20.5),
}

SPLITS: dict[str, range] = {
    "train": range(0, 40_000),
    "validation": range(1_000_000, 1_002_000),
    "test": range(2_000_000, 2_004_000),
    # Nothing in the tree touches these two: they are there for a measurement that no choice made
    # during development can have leaked into.
    "spare_a": range(3_000_000, 3_010_000),
    "spare_b": range(4_000_000, 4_010_000),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y` (centre) and `radius` are in pixels of the 96 x 96 picture, `turn` in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    turn: float
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        """Which ninth of the picture holds the centre: "top left" ... "centre" ... "bottom right"."""
        row = ("top", "", "bottom")[min(int(self.y * 3 / SIDE), 2)]
        column = ("left", "", "right")[min(int(self.x * 3 / SIDE), 2)]
        return f"{row} {column}".strip() or "centre"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels (the circle around the shape, so turning changes nothing)."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


@dataclass(frozen=True)
class Background:
    colour: str
    pattern: str

    def __str__(self) -> str:
        return self.colour if self.pattern == "plain" else f"{self.pattern} {self.colour}"


@dataclass(frozen=True)
class Scene:
    """Ground truth of one picture. `objects` are in painting order: a later one covers an earlier one."""

    seed: int
    objects: tuple[SceneObject, ...]
    background: Background
    noise: float  # standard deviation of the sensor noise, in grey levels of 255

    def overlap(self, i: int, j: int) -> bool:
        a, b = self.objects[i], self.objects[j]
        return math.hypot(a.x - b.x, a.y - b.y) < 0.95 * (a.radius + b.radius)

    def relation(self, i: int, j: int) -> str:
        """How object i stands to object j: "in front of", "behind", "left of", "right of", "above", "below".

        Overlapping objects are told apart by painting order, others by the longer of the two offsets.
        """
        if self.overlap(i, j):
            return "in front of" if i > j else "behind"
        dx, dy = self.objects[i].x - self.objects[j].x, self.objects[i].y - self.objects[j].y
        if abs(dx) >= abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"

    def relations(self) -> list[tuple[int, str, int]]:
        """Every ordered pair of objects as (i, relation, j)."""
        n = len(self.objects)
        return [(i, self.relation(i, j), j) for i in range(n) for j in range(n) if i != j]


def make_scene(seed: int) -> Scene:
    """The scene of a seed (any integer >= 0): 1 to 4 objects, a background, some noise."""
    if seed < 0:
        raise ValueError(f"scene seed {seed}: expected an integer >= 0")
    rng = np.random.default_rng([seed, 96])
    wanted = int(rng.choice((1, 2, 3, 4), p=(0.2, 0.42, 0.26, 0.12)))
    objects: list[SceneObject] = []
    covered = wanted > 1 and rng.random() < 0.2
    for k in range(wanted):
        touch = objects[0] if covered and k == 1 else None
        found = _place_object(rng, objects, touch)
        if found is not None:
            objects.append(found)
    colour = str(rng.choice(list(BACKGROUNDS), p=(0.3, 0.2, 0.2, 0.18, 0.12)))
    pattern = str(rng.choice(PATTERNS, p=(0.56, 0.13, 0.11, 0.11, 0.09)))
    noise = float(rng.uniform(4, 12)) if rng.random() < 0.25 else 0.0
    return Scene(seed, tuple(objects), Background(colour, pattern), noise)


def _place_object(
    rng: np.random.Generator, others: Sequence[SceneObject], touch: SceneObject | None
) -> SceneObject | None:
    """A new object clear of `others` (beside `touch`, which it partly covers); None where no room is left."""
    taken = {(o.colour, o.shape) for o in others}
    while True:
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        if (colour, shape) not in taken:  # no twins: a caption can then name each object
            break
    # At most two large objects, else four of them leave no room.
    odds = (0.36, 0.3, 0.34) if sum(o.size == "large" for o in others) < 2 else (0.5, 0.5, 0.0)
    size = str(rng.choice(list(SIZES), p=odds))
    radius = float(rng.uniform(*SIZES[size]))
    turn = float(rng.uniform(-0.07, 0.07))
    shade = np.clip(np.array(COLOURS[colour]) + rng.integers(-9, 10, size=3), 0, 255)
    rgb = (int(shade[0]), int(shade[1]), int(shade[2]))
    # Centres lie on a grid: a small vision tower with patches of 12 sees a shape in one alignment, and
    # learns it from tens of thousands of pictures. With free centres it took several times as many.
    low, high = math.ceil((radius + 1) / GRID), math.floor((SIDE - radius - 1) / GRID)
    for _ in range(60):
        column, line = (int(v) for v in rng.integers(low, high + 1, size=2))
        x, y = float(column * GRID), float(line * GRID)
        reach = [math.hypot(x - o.x, y - o.y) / (o.radius + radius) for o in others]
        if touch is not None and not 0.6 <= reach[others.index(touch)] <= 0.9:
            continue
        if all(o is touch or r > 1.05 for o, r in zip(others, reach)):
            return SceneObject(shape, colour, size, x, y, radius, turn, rgb)
    return None


# --- drawing ---------------------------------------------------------------------------------------

_SCALE = 2  # drawn at twice the size, then averaged: smooth edges for little time


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape on the unit circle, y pointing down."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.92, 0.75), (-0.92, 0.75)]
    if shape == "star":
        return [
            (
                (1.0 if k % 2 == 0 else 0.42) * math.sin(k * math.pi / 5),
                -(1.0 if k % 2 == 0 else 0.42) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ]
    if shape == "cross":
        a, b = 0.3, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    raise ValueError(f"no outline for shape {shape!r}; known shapes: {', '.join(SHAPES)}")


_OUTLINES = {shape: _outline(shape) for shape in SHAPES if shape not in ("circle", "ring")}


@lru_cache(maxsize=64)
def _backdrop(colour: str, pattern: str) -> Image.Image:
    """The empty background, drawn once. Patterns use a second tone of the same colour."""
    base = np.array(BACKGROUNDS[colour], dtype=np.float32)
    shift = -42.0 if base.mean() > 128 else 48.0
    other = np.clip(base + shift, 0, 255)
    side = SIDE * _SCALE
    y, x = np.mgrid[0:side, 0:side] / _SCALE
    if pattern == "plain":
        mix = np.zeros((side, side))
    elif pattern == "striped":
        mix = (np.floor((x + y) / 8) % 2).astype(float)
    elif pattern == "checked":
        mix = (np.floor(x / 12) + np.floor(y / 12)) % 2
    elif pattern == "dotted":
        mix = ((x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 8).astype(float)
    elif pattern == "fading":
        mix = y / SIDE * 1.6
    else:
        raise ValueError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
    pixels = base + mix[..., None] * (other - base)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 96 x 96. The same scene always gives the same pixels."""
    canvas = _backdrop(scene.background.colour, scene.background.pattern).copy()
    pen = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        x, y, r = thing.x * _SCALE, thing.y * _SCALE, thing.radius * _SCALE
        if thing.shape in ("circle", "ring"):
            frame = (x - r * 0.92, y - r * 0.92, x + r * 0.92, y + r * 0.92)
            if thing.shape == "circle":
                pen.ellipse(frame, fill=thing.rgb)
            else:
                pen.ellipse(frame, outline=thing.rgb, width=max(4, round(r * 0.34)))
            continue
        c, s = math.cos(thing.turn) * r, math.sin(thing.turn) * r
        pen.polygon([(x + u * c - v * s, y + u * s + v * c) for u, v in _OUTLINES[thing.shape]], fill=thing.rgb)
    picture = canvas.reduce(_SCALE)
    if scene.noise == 0.0:
        return picture
    rng = np.random.default_rng([scene.seed, 7])
    grain = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * scene.noise
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8), "RGB")


# --- words and rows --------------------------------------------------------------------------------


def captions(scene: Scene, n: int = 5) -> list[str]:
    """`n` reference captions, 5 to 16 lowercase words each, no punctuation; the first of more stay the same."""
    return write_captions(scene, n)


class SceneRows(Sequence[dict[str, Any]]):
    """Rows of one split, made on demand: nothing is drawn or written before a row is asked for."""

    column_names = ["id", "prompt", "image", "references", "objects", "background"]

    def __init__(self, seeds: range, split: str = "") -> None:
        self.seeds = seeds
        self.split = split

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SceneRows(self.seeds[index], self.split)
        scene = make_scene(self.seeds[index])
        row = self._words(scene)
        return {key: render(scene) if key == "image" else row[key] for key in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def text(self, index: int) -> dict[str, Any]:
        """The row without its picture; "picture" names it (equal names mean equal pictures)."""
        row = self._words(make_scene(self.seeds[index]))
        return {**row, "picture": row["id"]}

    def references(self) -> list[list[str]]:
        """The reference captions of every row, in order."""
        return [captions(make_scene(seed)) for seed in self.seeds]

    def scene(self, index: int) -> Scene:
        """The ground truth behind a row."""
        return make_scene(self.seeds[index])

    @staticmethod
    def _words(scene: Scene) -> dict[str, Any]:
        return {
            "id": f"scene-{scene.seed}",
            "prompt": PROMPT,
            "references": captions(scene),
            "objects": [
                {"shape": o.shape, "colour": o.colour, "size": o.size, "place": o.place} for o in scene.objects
            ],
            "background": str(scene.background),
        }


def scene_rows(split: str, limit: int | None = None) -> SceneRows:
    """Rows of a split (a key of `SPLITS`), the first `limit` of them if given. Raises ValueError otherwise."""
    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r}; choose one of: {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit of the scenes split {split!r} is {limit}; expected at least 1")
    seeds = SPLITS[split]
    return SceneRows(seeds if limit is None else seeds[:limit], split)

"""Preferences from the built-in world: pairs of captions, one of them with a known fault (`mmft.data.faults`).

Every pair is a function of (seed, split, index); splits share no picture (`mmft.data.scenes.SPLITS`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from mmft.data.faults import KINDS, MAKERS, PICTURE_KINDS, other_picture
from mmft.data.scenes import PROMPT, SPLITS, make_scene, render
from reward_models.preference.pairs import Pair

__all__ = ["KINDS", "PICTURE_KINDS", "Drawing", "ScenePairs", "scene_pairs"]

_ATTEMPTS = 2_000  # at one pair; the rarest kind takes some tens


@dataclass(frozen=True)
class Drawing:
    """The picture of a scene, drawn when called."""

    seed: int

    def __call__(self) -> Image.Image:
        return render(make_scene(self.seed))


_drawing = lru_cache(maxsize=None)(Drawing)  # one object per picture, so that whoever encodes it knows it again


class ScenePairs(Sequence[Pair]):
    """Pairs of one split, made on demand."""

    def __init__(self, seeds: range, split: str, size: int, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> None:
        self.seeds, self.split, self.size, self.seed, self.kinds = seeds, split, size, seed, tuple(kinds)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"pair {index} of {self.size}")
        index %= self.size
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        kind = rng.choices(self.kinds, [KINDS[name] for name in self.kinds])[0]
        for _ in range(_ATTEMPTS):
            # A new scene for each attempt: trying again on the same one would undo the balance of the proposals.
            scene = make_scene(rng.choice(self.seeds))
            if kind == "other picture":
                texts = other_picture(scene, rng, self.seeds)
            else:
                texts = MAKERS[kind](scene, rng)
            if texts is not None:
                name = f"scene-{scene.seed}-{self.split}-{index}"
                return Pair(PROMPT, (_drawing(scene.seed),), *texts, kind=kind, id=name)
        raise ValueError(f"no pair of kind {kind!r} can be made of {len(self.seeds)} pictures; expected more pictures")

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(self.size))


def scene_pairs(
    split: str, size: int, seed: int = 0, kinds: Sequence[str] | None = None, pictures: int | None = None
) -> ScenePairs:
    """Pairs of a split.

    Args:
        split: a key of `mmft.data.scenes.SPLITS`.
        size: how many pairs.
        seed: another number gives other pairs of the same pictures.
        kinds: some of `KINDS`; None = all, in the shares that stand there.
        pictures: use only the first so many pictures of the split, so that several pairs share each.

    Raises:
        ValueError: an unknown split or kind, or a size below 1.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r}; choose one of: {', '.join(SPLITS)}")
    for name, number in (("size", size), ("pictures", pictures)):
        if number is not None and number < 1:
            raise ValueError(f"{name} of the preference pairs is {number}; expected at least 1")
    kinds = tuple(KINDS) if kinds is None else tuple(kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"no such kind of pair: {', '.join(unknown) or 'none given'}; choose from: {', '.join(KINDS)}")
    seeds = SPLITS[split]
    return ScenePairs(seeds if pictures is None else seeds[:pictures], split, size, seed, kinds)

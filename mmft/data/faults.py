"""Pairs of texts about a scene of the built-in world: an honest caption and one with a known fault.

How a fault is made decides what a judge can learn from it. If a wrong colour were put into the text, the wrong
texts would have statistics of their own, and a judge could do without the picture. Here the rejected caption is an
honest caption of *another* scene: the same scene with one thing changed (the colour of one object, say), written by
the same annotator with the same choices of words. Changes are proposed evenly and accepted as in Metropolis et al.
1953, so that "scene A pictured, B changed" is as likely as the reverse. Which of two texts is the better one is then
decided by the picture alone, for every kind in `PICTURE_KINDS` (for "hallucinated" and "missing" taken together: the
one adds what the other takes away).

The other kinds can be told from the text: bad grammar, lists, an object named twice, and wording, where both captions
are true and the chosen one uses the words that most annotators agree on.

A maker takes a scene and random choices and gives (chosen, rejected), or None where this scene and these choices
make no pair.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mmft.data.scene_language import ANNOTATORS, MAX_WORDS, MIN_WORDS, Annotator, _Pen
from mmft.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    SceneObject,
    attribute_claims,
    make_scene,
)

# Kind of fault -> share of the pairs.
KINDS: dict[str, float] = {
    "colour": 0.11,
    "shape": 0.10,
    "size": 0.08,
    "background": 0.10,
    "relation": 0.07,
    "hallucinated": 0.08,
    "missing": 0.08,
    "other picture": 0.12,
    "ending": 0.03,
    "repeated": 0.03,
    "shuffled": 0.03,
    "cut": 0.03,
    "listed": 0.02,
    "twice": 0.06,
    "wording": 0.06,
}
PICTURE_KINDS = ("colour", "shape", "size", "background", "relation", "hallucinated", "missing", "other picture")

# Written in the words that most annotators share, and in words of their own.
CONSENSUS, OWN_WORDS = ("plain", "depicting"), ("prolific", "chatty")

# How often a scene has so many objects, and a background such a colour or pattern: `make_scene`.
_COUNT_ODDS = {1: 0.2, 2: 0.42, 3: 0.26, 4: 0.12}
_SIZES = {"small": 0.36, "medium": 0.3, "large": 0.34}
# A small object has 49 cells of the grid to stand on, another one 25, so that on a given cell it is rarer.
_SIZE_ODDS = {"small": 0.36 / 49, "medium": 0.3 / 25, "large": 0.34 / 25}
_GROUND_ODDS = {"white": 0.3, "black": 0.2, "grey": 0.2, "beige": 0.18, "navy": 0.12}
_PATTERN_ODDS = {"plain": 0.56, "striped": 0.13, "dotted": 0.11, "checked": 0.11, "fading": 0.09}

_OPPOSITE = {"left of": "right of", "above": "below", "in front of": "behind"}
_OPPOSITE |= {second: first for first, second in _OPPOSITE.items()}
_SIDES = {  # relation words that claim a direction -> what they claim
    "left of": "left of", "right of": "right of", "above": "above", "over": "above", "higher than": "above",
    "below": "below", "under": "below", "beneath": "below", "in front of": "in front of",
    "partly covering": "in front of", "behind": "behind", "partly hidden by": "behind",
}  # fmt: skip
_SAID_SIDE = re.compile(r"\bis (?:to the )?(" + "|".join(_SIDES) + r")\b")
_FUNCTION_WORDS = {"a", "an", "the", "of", "on", "and", "with", "is", "to", "over", "next", "in", "there"}
_DANGLING = ("a", "an", "the", "of", "on", "and", "with", "is", "to the", "next to", "in the")
_PATTERN_WORDS = {"striped", "stripy", "dotted", "spotted", "checked", "checkered", "fading", "shaded"}
_ADJECTIVES = {*COLOURS, *BACKGROUNDS, *_PATTERN_WORDS, "large", "small", "big", "little", "tiny", "wee", "gray"}
_THING = re.compile(
    r"\b(?:an?|the|one) (?:\w+ ){0,3}?(?:circle|disc|square|box|block|triangle|star|cross|plus|ring|hoop)\b"
)

Maker = Callable[[Scene, random.Random], tuple[str, str] | None]


# --- writing ---------------------------------------------------------------------------------------


def _annotator(rng: random.Random, names: Sequence[str] = tuple(ANNOTATORS)) -> Annotator:
    crew = [ANNOTATORS[name] for name in names]
    return rng.choices(crew, [a.odds for a in crew])[0]


def _write(scene: Scene, author: Annotator, rng: random.Random) -> str | None:
    """One attempt at a caption; None where it is too short or too long."""
    text = author.write(_Pen(rng, scene, author.words))
    return text if MIN_WORDS <= len(text.split()) <= MAX_WORDS else None


def _honest(scene: Scene, rng: random.Random, names: Sequence[str] = tuple(ANNOTATORS)) -> str | None:
    return _write(scene, _annotator(rng, names), rng)


def _both(scene: Scene, changed: Scene, author: Annotator, rng: random.Random) -> tuple[str, str] | None:
    """Captions of two scenes by the same annotator with the same choices."""
    choices = rng.getrandbits(64)
    one = _write(scene, author, random.Random(choices))
    two = _write(changed, author, random.Random(choices))
    return None if one is None or two is None or one == two else (one, two)


def all_true(text: str, scene: Scene) -> bool:
    """Whether everything that the text claims about objects and background holds."""
    true, claims = attribute_claims(text, scene)
    return true == claims


def _told_apart(pair: tuple[str, str] | None, scene: Scene, changed: Scene) -> tuple[str, str] | None:
    """The pair, if each text is true of its own scene and false of the other."""
    if pair is None or all_true(pair[1], scene) or all_true(pair[0], changed):
        return None
    assert all_true(pair[0], scene) and all_true(pair[1], changed), pair
    return pair


# --- one thing changed -----------------------------------------------------------------------------


def _another(rng: random.Random, old: str, odds: dict[str, float]) -> str | None:
    """A new value, proposed evenly, kept with min(1, odds(new) / odds(old)); None if it is not kept."""
    new = rng.choice([value for value in odds if value != old])
    return new if rng.random() * odds[old] < odds[new] else None


def _fits(scene: Scene) -> bool:
    """Whether a scene could have been drawn: every object inside the picture, no twins, none too close together."""
    objects = scene.objects
    if len({(o.colour, o.shape) for o in objects}) < len(objects):
        return False
    for o in objects:
        if min(o.x, o.y) < o.radius + 1 or max(o.x, o.y) > SIDE - o.radius - 1:
            return False
    for i, a in enumerate(objects):
        for j, b in enumerate(objects[:i]):
            reach = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 / (a.radius + b.radius)
            if reach <= 1.05 and not ((i, j) == (1, 0) and 0.6 <= reach <= 0.9):
                return False
    return sum(o.size == "large" for o in objects) <= 2


def _with_object(scene: Scene, i: int, **changes: Any) -> Scene:
    objects = list(scene.objects)
    objects[i] = replace(objects[i], **changes)
    return replace(scene, objects=tuple(objects))


def _attribute(name: str) -> Maker:
    """A maker of pairs that differ in one attribute of one object."""
    odds = {"colour": dict.fromkeys(COLOURS, 1.0), "shape": dict.fromkeys(SHAPES, 1.0), "size": _SIZE_ODDS}[name]

    def make(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        i = rng.randrange(len(scene.objects))
        new = _another(rng, getattr(scene.objects[i], name), odds)
        if new is None:
            return None
        changes: dict[str, Any] = {name: new}
        if name == "size":
            changes["radius"] = rng.uniform(*SIZES[new])
        changed = _with_object(scene, i, **changes)
        if not _fits(changed):
            return None
        return _told_apart(_both(scene, changed, _annotator(rng), rng), scene, changed)

    return make


def _background(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    part, odds = rng.choice([("colour", _GROUND_ODDS), ("pattern", _PATTERN_ODDS)])
    new = _another(rng, getattr(scene.background, part), odds)
    if new is None:
        return None
    changed = replace(scene, background=replace(scene.background, **{part: new}))
    pair = _both(scene, changed, _annotator(rng), rng)
    if part == "pattern" and pair is not None:
        # "a white background" claims no pattern, so only a caption that names one can be wrong about it.
        named = [any(word in _PATTERN_WORDS for word in text.split()) for text in pair]
        if not all(named):
            return None
    return _told_apart(pair, scene, changed)


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Two objects change places, or which of them lies in front."""
    if len(scene.objects) < 2:
        return None
    i, j = rng.sample(range(len(scene.objects)), 2)
    a, b = scene.objects[i], scene.objects[j]
    objects = list(scene.objects)
    if scene.overlap(i, j):
        objects[i], objects[j] = b, a
    else:
        objects[i], objects[j] = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    changed = replace(scene, objects=tuple(objects))
    if not _fits(changed):
        return None
    pair = _both(scene, changed, ANNOTATORS["relational"], rng)
    if pair is None or not (relation_holds(pair[0], scene) and relation_holds(pair[1], changed)):
        return None  # "next to" holds either way
    return None if relation_holds(pair[1], scene) or relation_holds(pair[0], changed) else pair


def relation_holds(text: str, scene: Scene) -> bool | None:
    """Whether "X is to the left of Y" (or above, behind, ...) is true; None if the text says no such thing.

    Taken loosely, in the text's favour: left is left, however much more one object is above the other.
    """
    said = _SAID_SIDE.search(text)
    if said is None:
        return None
    subject, rest = text[: said.start()], re.split(r" and | on ", text[said.end() :])[0]
    for i in _called(subject, scene):
        for j in _called(rest, scene):
            if i != j and _stands(scene, i, j, _SIDES[said[1]]):
                return True
    return False


def _called(phrase: str, scene: Scene) -> list[int]:
    """The objects that a noun phrase fits."""
    objects = scene.objects
    return [k for k in range(len(objects)) if all_true(phrase, replace(scene, objects=(objects[k],)))]


def _stands(scene: Scene, i: int, j: int, side: str) -> bool:
    a, b = scene.objects[i], scene.objects[j]
    return {
        "left of": a.x < b.x,
        "right of": a.x > b.x,
        "above": a.y < b.y,
        "below": a.y > b.y,
        "in front of": scene.overlap(i, j) and i > j,
        "behind": scene.overlap(i, j) and i < j,
    }[side]


# --- one object more or less -----------------------------------------------------------------------


def named(text: str, scene: Scene) -> set[int]:
    """Which objects a text names: those without which less of it would be true."""
    true = attribute_claims(text, scene)[0]
    objects = scene.objects
    fewer = [replace(scene, objects=objects[:k] + objects[k + 1 :]) for k in range(len(objects))]
    return {k for k, rest in enumerate(fewer) if attribute_claims(text, rest)[0] < true}


def _one_more(fewer: Scene, more: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Captions of both scenes that name the same objects, but for the last one of `more`."""
    # Who counts the shapes would make a second mistake.
    pair = _both(fewer, more, _annotator(rng, [name for name in ANNOTATORS if name != "counting"]), rng)
    if pair is None or named(pair[1], more) != named(pair[0], fewer) | {len(fewer.objects)}:
        return None
    return pair if relation_holds(pair[1], more) is not False else None


def _hallucinated(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    n = len(scene.objects)
    if n + 1 not in _COUNT_ODDS or rng.random() * _COUNT_ODDS[n] >= _COUNT_ODDS[n + 1]:
        return None
    size = rng.choices(list(_SIZES), list(_SIZES.values()))[0]
    radius = rng.uniform(*SIZES[size])
    cells = range(-(-int(radius + 2) // GRID), int((SIDE - radius - 1) // GRID) + 1)
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    x, y = (float(GRID * rng.choice(cells)) for _ in "xy")
    new = SceneObject(shape, colour, size, x, y, radius, turn=0.0, rgb=COLOURS[colour])
    more = replace(scene, objects=(*scene.objects, new))
    return _one_more(scene, more, rng) if _fits(more) and _apart(more) else None


def _missing(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    n = len(scene.objects)
    if n == 1 or rng.random() * _COUNT_ODDS[n] >= _COUNT_ODDS[n - 1] or not _apart(scene):
        return None
    pair = _one_more(replace(scene, objects=scene.objects[:-1]), scene, rng)
    return pair and (pair[1], pair[0])


def _apart(scene: Scene) -> bool:
    """Whether the last object overlaps no other."""
    last = len(scene.objects) - 1
    return not any(scene.overlap(last, i) for i in range(last))


# --- faults of the text ----------------------------------------------------------------------------


def other_picture(scene: Scene, rng: random.Random, seeds: range) -> tuple[str, str] | None:
    """What is true of another picture of the split, by whatever annotator, against what is true of this one."""
    other = make_scene(rng.choice(seeds))
    chosen, rejected = _honest(scene, rng), _honest(other, rng)
    if chosen is None or rejected is None or all_true(rejected, scene) or all_true(chosen, other):
        return None
    return chosen, rejected


def _spoilt(spoil: Callable[[list[str], random.Random], list[str] | None]) -> Maker:
    """A maker of pairs whose rejected text is the chosen one with its words spoilt."""

    def make(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        chosen = _honest(scene, rng)
        words = None if chosen is None else spoil(chosen.split(), rng)
        if chosen is None or words is None or " ".join(words) == chosen:
            return None
        return chosen, " ".join(words)

    return make


def _ending(words: list[str], rng: random.Random) -> list[str]:
    """Goes on with, or stops at, a function word."""
    stops = [k for k in range(3, len(words)) if words[k - 1] in _FUNCTION_WORDS]
    if stops and rng.random() < 0.5:
        return words[: rng.choice(stops)]
    return words + rng.choice(_DANGLING).split()


def _repeated(words: list[str], rng: random.Random) -> list[str] | None:
    """A word twice, a few words twice, an object named twice, or everything two to four times."""
    how = rng.choice(("words", "object", "all"))
    if how == "all":
        return words * rng.randint(2, 4)
    if how == "words":
        length = rng.choice((1, 1, 2, 3))
        start = rng.randrange(len(words) - length + 1)
        return words[: start + length] + words[start:]
    things = list(_THING.finditer(" ".join(words)))
    if not things:
        return None
    thing = rng.choice(things)
    return f"{thing.string[: thing.end()]} and {thing[0]}{thing.string[thing.end() :]}".split()


def _shuffled(words: list[str], rng: random.Random) -> list[str]:
    return rng.sample(words, len(words))


def _cut(words: list[str], rng: random.Random) -> list[str] | None:
    """Stops at an adjective, or after a word or two, or says nothing."""
    how = rng.random()
    if how < 0.3:
        return words[: rng.randint(0, 2)]
    stops = [k for k in range(3, len(words)) if words[k - 1] in _ADJECTIVES]
    return words[: rng.choice(stops)] if stops else None


def _listed(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Names so many objects that some must be right."""
    chosen = _honest(scene, rng)
    things = [f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}" for _ in range(rng.randint(4, 9))]
    things += [f"{o.colour} {o.shape}" for o in scene.objects]
    rng.shuffle(things)
    article = rng.choice(("", "a "))
    rejected = rng.choice((" ", " and ")).join(article + thing for thing in dict.fromkeys(things))
    return None if chosen is None or all_true(rejected, scene) else (chosen, rejected)


def _twice(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """One object named a second time in the place of another, as models do that have lost count."""
    if len(scene.objects) < 2:
        return None
    left_out, twin = rng.sample(range(len(scene.objects)), 2)
    same = {key: getattr(scene.objects[twin], key) for key in ("shape", "colour", "size")}
    pair = _both(scene, _with_object(scene, left_out, **same), _annotator(rng), rng)
    return pair if pair and all_true(pair[0], scene) and not all_true(pair[1], scene) else None


def _wording(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Both are true; the chosen one is in the words of most and names no fewer objects."""
    chosen, rejected = _honest(scene, rng, CONSENSUS), _honest(scene, rng, OWN_WORDS)
    if chosen is None or rejected is None or len(named(chosen, scene)) < len(named(rejected, scene)):
        return None
    return chosen, rejected


# The maker of every kind but "other picture", which needs to know the other pictures.
MAKERS: dict[str, Maker] = {
    "colour": _attribute("colour"),
    "shape": _attribute("shape"),
    "size": _attribute("size"),
    "background": _background,
    "relation": _relation,
    "hallucinated": _hallucinated,
    "missing": _missing,
    "ending": _spoilt(_ending),
    "repeated": _spoilt(_repeated),
    "shuffled": _spoilt(_shuffled),
    "cut": _spoilt(_cut),
    "listed": _listed,
    "twice": _twice,
    "wording": _wording,
}

"""How people word the scenes, and how to check what a caption claims.

References are written by eight imagined annotators. Each caption of a scene is written by one of them,
drawn independently, with uneven odds: as in real caption corpora, one annotator is more prolific than
any other and has words of their own ("a big red disc along with a little blue box over a white
backdrop"), while most of the others, however differently they begin, agree on the commoner words
("large", "circle", "on a white background"). Likelihood training learns the mixture, and its greedy
caption follows the most frequent single annotator; a consensus metric such as CIDEr-D (Vedantam et al.
2015) rewards the words on which most annotators agree. That gap is what reinforcement learning can
close here, as it does on real captions. Below the common words there is a long tail: rare synonyms,
captions that leave out a size, an object or the background, captions that say more.

Nothing here imports the world: a scene is used through its attributes alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmft.data.scenes import Scene, SceneObject

MIN_WORDS, MAX_WORDS = 5, 16

# A choice of wording: (words, odds). "" means that nothing is said.
Choice = Sequence[tuple[str, float]]

COMMON_WORDS: dict[str, Choice] = {
    "large": (("large", 0.78), ("big", 0.1), ("huge", 0.04), ("", 0.08)),
    "small": (("small", 0.8), ("little", 0.06), ("tiny", 0.06), ("", 0.08)),
    "medium": (("", 0.96), ("medium", 0.04)),
    "circle": (("circle", 0.93), ("round shape", 0.03), ("disc", 0.04)),
    "square": (("square", 0.95), ("box", 0.03), ("block", 0.02)),
    "triangle": (("triangle", 1.0),),
    "star": (("star", 1.0),),
    "cross": (("cross", 0.9), ("plus sign", 0.06), ("plus", 0.04)),
    "ring": (("ring", 0.95), ("hoop", 0.05)),
    "red": (("red", 0.97), ("crimson", 0.03)),
    "orange": (("orange", 1.0),),
    "yellow": (("yellow", 0.97), ("golden", 0.03)),
    "green": (("green", 1.0),),
    "blue": (("blue", 1.0),),
    "purple": (("purple", 0.93), ("violet", 0.07)),
    "pink": (("pink", 0.97), ("rosy", 0.03)),
    "brown": (("brown", 1.0),),
    "grey": (("grey", 0.85), ("gray", 0.15)),
    "striped": (("striped", 0.9), ("stripy", 0.1)),
    "dotted": (("dotted", 0.85), ("spotted", 0.15)),
    "checked": (("checked", 0.85), ("checkered", 0.15)),
    "fading": (("fading", 0.8), ("shaded", 0.2)),
    "ground": (("background", 0.9), ("backdrop", 0.05), ("surface", 0.05)),
}

PROLIFIC_WORDS: dict[str, Choice] = {
    "large": (("big", 0.72), ("bulky", 0.28)),
    "small": (("little", 0.72), ("wee", 0.28)),
    "medium": (("midsize", 0.5), ("", 0.5)),
    "circle": (("disc", 0.95), ("circle", 0.05)),
    "square": (("box", 0.95), ("square", 0.05)),
    "cross": (("plus", 0.95), ("cross", 0.05)),
    "ring": (("hoop", 0.9), ("ring", 0.1)),
    "purple": (("violet", 0.9), ("purple", 0.1)),
    "grey": (("gray", 1.0),),
    "striped": (("stripy", 0.9), ("striped", 0.1)),
    "dotted": (("spotted", 0.9), ("dotted", 0.1)),
    "ground": (("backdrop", 0.95), ("background", 0.05)),
}

FANCY_WORDS: dict[str, Choice] = {
    "large": (("huge", 0.4), ("great", 0.3), ("large", 0.3)),
    "small": (("tiny", 0.5), ("mini", 0.2), ("small", 0.3)),
    "circle": (("circle", 0.5), ("round shape", 0.3), ("disc", 0.2)),
    "square": (("square", 0.5), ("block", 0.5)),
    "cross": (("plus sign", 0.5), ("cross", 0.5)),
    "red": (("crimson", 0.4), ("red", 0.6)),
    "yellow": (("golden", 0.4), ("yellow", 0.6)),
    "purple": (("violet", 0.5), ("purple", 0.5)),
    "pink": (("rosy", 0.4), ("pink", 0.6)),
    "ground": (("surface", 0.4), ("background", 0.6)),
}


@dataclass(frozen=True)
class _Pen:
    """One annotator at work on one scene."""

    rng: random.Random
    scene: Scene
    words: Mapping[str, Choice] = field(default_factory=dict)

    def say(self, key: str) -> str:
        choice = self.words.get(key) or COMMON_WORDS.get(key) or ((key, 1.0),)
        return self.pick(choice)

    def pick(self, choice: Choice) -> str:
        return self.rng.choices([c[0] for c in choice], [c[1] for c in choice])[0]

    def chance(self, odds: float) -> bool:
        return self.rng.random() < odds

    def salient(self) -> list[int]:
        """Object indices, the largest first; the eye is not exact."""
        size = [o.radius * self.rng.uniform(0.93, 1.07) for o in self.scene.objects]
        return sorted(range(len(size)), key=lambda i: -size[i])

    def thing(self, i: int, article: str = "a", sized: float = 0.9) -> str:
        o: SceneObject = self.scene.objects[i]
        size = self.say(o.size) if self.chance(sized) else ""
        text = " ".join(w for w in (size, self.say(o.colour), self.say(o.shape)) if w)
        if article == "a" and text[0] in "aeiou":
            article = "an"
        return f"{article} {text}".strip()

    def ground(self, article: str = "a") -> str:
        b = self.scene.background
        pattern = self.say(b.pattern) if b.pattern != "plain" else ""
        text = " ".join(w for w in (pattern, self.say(b.colour), self.say("ground")) if w)
        return f"{article} {text}".strip()

    def relation(self, i: int, j: int) -> str:
        return self.pick(_RELATION_WORDS[self.scene.relation(i, j)])

    def place(self, i: int) -> str:
        return self.pick(_PLACE_WORDS[self.scene.objects[i].place])

    def listed(self, things: list[str]) -> str:
        return things[0] if len(things) == 1 else " ".join(things[:-1]) + " and " + things[-1]


_RELATION_WORDS: dict[str, Choice] = {
    "left of": (("to the left of", 0.7), ("left of", 0.15), ("next to", 0.1), ("beside", 0.05)),
    "right of": (("to the right of", 0.7), ("right of", 0.15), ("next to", 0.1), ("beside", 0.05)),
    "above": (("above", 0.85), ("over", 0.08), ("higher than", 0.07)),
    "below": (("below", 0.8), ("under", 0.14), ("beneath", 0.06)),
    "in front of": (("in front of", 0.8), ("partly covering", 0.1), ("overlapping", 0.1)),
    "behind": (("behind", 0.85), ("partly hidden by", 0.15)),
}

_PLACE_WORDS: dict[str, Choice] = {
    **{
        f"{row} {column}": (
            (f"in the {row} {column} corner", 0.6),
            (f"at the {row} {column}", 0.25),
            (f"in the {'upper' if row == 'top' else 'lower'} {column}", 0.15),
        )
        for row in ("top", "bottom")
        for column in ("left", "right")
    },
    "top": (("at the top", 0.85), ("near the top edge", 0.15)),
    "bottom": (("at the bottom", 0.85), ("near the bottom edge", 0.15)),
    "left": (("on the left", 0.7), ("on the left side", 0.3)),
    "right": (("on the right", 0.7), ("on the right side", 0.3)),
    "centre": (("in the middle", 0.6), ("in the centre", 0.3), ("in the center", 0.1)),
}

_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}


def _prolific(pen: _Pen) -> str:
    """ "a big red disc along with a little blue box over a white backdrop"; reads from left to right."""
    order = pen.salient()[:3]
    order.sort(key=lambda i: pen.scene.objects[i].x)
    link = pen.pick((("along with", 0.5), ("together with", 0.3), ("accompanied by", 0.2)))
    first = pen.thing(order[0], sized=1.0)
    if len(order) == 1:
        verb = pen.pick((("resting", 0.6), ("sitting", 0.4)))
        return f"{first} {verb} over {pen.ground()}"
    second = pen.thing(order[1], sized=1.0)
    if len(order) == 2:
        return f"{first} {link} {second} over {pen.ground()}"
    return f"{first} {link} {second} and {pen.thing(order[2], sized=1.0)}"


def _plain(pen: _Pen) -> str:
    """ "there is a large red circle and a small blue square on a white background"."""
    order = pen.salient()
    opening = pen.pick((("there is", 0.9), ("here is", 0.1)))
    if len(order) == 1:
        where = f" {pen.place(order[0])}" if pen.chance(0.2) else ""
        return f"{opening} {pen.thing(order[0])}{where} on {pen.ground()}"
    mentioned = order[:3] if pen.chance(0.55) else order[:2]
    text = f"{opening} {pen.listed([pen.thing(i) for i in mentioned])}"
    return f"{text} on {pen.ground()}" if len(mentioned) == 2 and pen.chance(0.85) else text


def _relational(pen: _Pen) -> str:
    """ "the large red circle is to the left of the small blue square"."""
    order = pen.salient()
    if len(order) == 1:
        return f"the {pen.thing(order[0], '')} is {pen.place(order[0])} on {pen.ground()}"
    i, j = order[0], order[1]
    article = pen.pick((("the", 0.7), ("one", 0.3)))
    text = f"{pen.thing(i, article)} is {pen.relation(i, j)} {pen.thing(j, 'a')}"
    if len(order) > 2 and pen.chance(0.5):
        return f"{text} and {pen.thing(order[2])}"
    return f"{text} on {pen.ground()}" if pen.chance(0.3) else text


def _depicting(pen: _Pen) -> str:
    """ "this picture shows a large red circle and a small blue square on a white background"."""
    order = pen.salient()
    opening = pen.pick(
        (("this picture shows", 0.4), ("the image shows", 0.3), ("picture of", 0.2), ("this image has", 0.1))
    )
    mentioned = order[: 3 if len(order) == 3 and pen.chance(0.4) else 2]
    text = f"{opening} {pen.listed([pen.thing(i) for i in mentioned])}"
    return f"{text} on {pen.ground()}" if len(mentioned) < 3 else text


def _placing(pen: _Pen) -> str:
    """ "on a white background there is a large red circle with a small blue square below"."""
    order = pen.salient()
    opening = f"on {pen.ground()}" if pen.chance(0.6) else pen.place(order[0])
    verb = pen.pick((("there is", 0.6), ("we see", 0.25), ("sits", 0.15)))
    text = f"{opening} {verb} {pen.thing(order[0])}"
    if len(order) == 1:
        return text
    return f"{text} {pen.pick((('and', 0.75), ('with', 0.25)))} {pen.thing(order[1])}"


def _counting(pen: _Pen) -> str:
    """ "two shapes on a white background including a large red circle and a small blue square"."""
    order = pen.salient()
    noun = pen.pick((("shape", 0.75), ("object", 0.25))) + ("" if len(order) == 1 else "s")
    opening = f"{_NUMBERS[len(order)]} {noun}"
    if pen.chance(0.35):
        opening += f" on {pen.ground()}"
    link = (
        "which is"
        if len(order) == 1
        else ("including" if len(order) > 2 else pen.pick((("being", 0.3), ("namely", 0.7))))
    )
    return f"{opening} {link} {pen.listed([pen.thing(i) for i in order[:2]])}"


def _terse(pen: _Pen) -> str:
    """ "large red circle and small blue square on white background"."""
    order = pen.salient()
    text = pen.listed([pen.thing(i, "", sized=0.6) for i in order[: 3 if pen.chance(0.5) else 2]])
    return f"{text} on {pen.ground('')}"


def _chatty(pen: _Pen) -> str:
    """ "i can see one great crimson round shape beside a mini block"."""
    order = pen.salient()
    opening = pen.pick(
        (
            ("i can see", 0.35),
            ("someone drew", 0.2),
            ("you can see", 0.15),
            ("my eyes find", 0.1),
            ("look at", 0.2),
        )
    )
    text = f"{opening} {pen.thing(order[0], sized=0.8)}"
    if len(order) > 1:
        link = pen.pick((("next to", 0.3), ("beside", 0.2), ("and", 0.3), ("plus", 0.2)))
        text += f" {link} {pen.thing(order[1], sized=0.7)}"
    return f"{text} on {pen.ground()}" if len(order) == 1 or pen.chance(0.25) else text


@dataclass(frozen=True)
class Annotator:
    write: Callable[[_Pen], str]
    odds: float
    words: Mapping[str, Choice]


ANNOTATORS: dict[str, Annotator] = {
    "prolific": Annotator(_prolific, 0.25, PROLIFIC_WORDS),
    "plain": Annotator(_plain, 0.20, {}),
    "depicting": Annotator(_depicting, 0.17, {}),
    "relational": Annotator(_relational, 0.11, {}),
    "placing": Annotator(_placing, 0.10, {}),
    "counting": Annotator(_counting, 0.06, {}),
    "terse": Annotator(_terse, 0.06, {}),
    "chatty": Annotator(_chatty, 0.05, FANCY_WORDS),
}


def write_captions(scene: Scene, n: int) -> list[str]:
    """`n` captions of 5 to 16 words, each by an annotator drawn anew; a function of `scene.seed` alone.

    Too short or too long an attempt is thrown away and begun again.
    """
    rng = random.Random(scene.seed * 1_000_003 + 11)
    crew = list(ANNOTATORS.values())
    odds = [a.odds for a in crew]
    written: list[str] = []
    while len(written) < n:
        author = rng.choices(crew, odds)[0]
        text = author.write(_Pen(rng, scene, author.words))
        while not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            text = author.write(_Pen(rng, scene, author.words))
        written.append(text)
    return written


# --- checking what a caption claims ----------------------------------------------------------------

# Shapes that the world lacks are nouns as well: a model that names one makes a false claim.
_SHAPE_NOUNS = {
    "circle": "circle", "disc": "circle", "disk": "circle", "dot": "circle", "ball": "circle",
    "square": "square", "box": "square", "block": "square",
    "triangle": "triangle", "wedge": "triangle", "star": "star", "heart": "heart",
    "diamond": "diamond", "rhombus": "diamond",
    "cross": "cross", "plus": "cross",
    "ring": "ring", "hoop": "ring",
    "shape": "", "object": "", "thing": "", "figure": "",
}  # fmt: skip
_COLOUR_WORDS = {
    "red": "red", "crimson": "red", "scarlet": "red", "orange": "orange", "yellow": "yellow", "golden": "yellow",
    "green": "green", "blue": "blue", "purple": "purple", "violet": "purple", "pink": "pink", "rosy": "pink",
    "brown": "brown",
}  # fmt: skip
_GROUND_WORDS = {
    "white": "white",
    "black": "black",
    "grey": "grey",
    "gray": "grey",
    "beige": "beige",
    "navy": "navy",
}
_PATTERN_WORDS = {
    "plain": "plain", "striped": "striped", "stripy": "striped", "dotted": "dotted", "spotted": "dotted",
    "checked": "checked", "checkered": "checked", "fading": "fading", "shaded": "fading",
}  # fmt: skip
_SIZE_WORDS = {
    "large": "large", "big": "large", "huge": "large", "great": "large", "bulky": "large",
    "small": "small", "little": "small", "tiny": "small", "mini": "small", "wee": "small",
    "medium": "medium", "midsize": "medium",
}  # fmt: skip
_GROUND_NOUNS = {"background", "backdrop", "surface"}
_COUNT_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def _noun(word: str) -> str | None:
    """Shape of a noun, singular or plural; "" for a noun of no shape ("object"); None for other words."""
    for stem in (word, word.removesuffix("s"), word.removesuffix("es")):
        if stem in _SHAPE_NOUNS:
            return _SHAPE_NOUNS[stem]
    return None


def attribute_claims(caption: str, scene: Scene) -> tuple[int, int]:
    """Count what a caption claims about the scene, and how much of it is true.

    Any text can be checked, a model's output too. One claim each: an object (its shape, with the colour
    if one is given), a stated size of an object, the colour and the pattern of the background, the number
    of objects ("two shapes"). An object can be claimed once: naming it twice makes the second claim
    false, so that repeating a true phrase does not raise the share of true claims. A size counts as true
    only if the object it is said of is there. Words outside the vocabulary claim nothing.

    Returns:
        (true claims, claims); (0, 0) for a caption that claims nothing.
    """
    true = total = 0
    left = list(scene.objects)
    colour = size = pattern = ground = ""
    count: int | None = None
    words = re.findall(r"[a-z]+", caption.lower())
    for k, word in enumerate(words):
        if word == "plus" and not (colour or size):
            continue  # "and": "a star plus a ring"
        shape = _noun(word)
        if word in _COLOUR_WORDS:
            colour = _COLOUR_WORDS[word]
        elif word in _SIZE_WORDS:
            size = _SIZE_WORDS[word]
        elif word in _PATTERN_WORDS:
            pattern = _PATTERN_WORDS[word]
        elif word in _GROUND_WORDS:
            ground = _GROUND_WORDS[word]
        elif word in _COUNT_WORDS:
            count = _COUNT_WORDS[word]
        elif word in _GROUND_NOUNS:
            said = [(ground or colour, scene.background.colour), (pattern, scene.background.pattern)]
            true += sum(claim == truth for claim, truth in said if claim)
            total += sum(bool(claim) for claim, _ in said)
            colour = size = pattern = ground = ""
        elif shape is not None:
            if shape == "" and k > 0 and words[k - 1] == "round":
                shape = "circle"
            if shape == "" and not colour:
                if count is not None:
                    total, true = total + 1, true + (count == len(scene.objects))
            else:
                colour = colour or ground  # "a white circle" claims an object of a colour that none has
                fits = [o for o in left if shape in ("", o.shape) and colour in ("", o.colour)]
                named = next((o for o in fits if o.size == size), fits[0] if fits else None)
                total, true = total + 1, true + (named is not None)
                if size:
                    total, true = total + 1, true + (named is not None and named.size == size)
                if named is not None:
                    left.remove(named)
            colour = size = pattern = ground = ""
            count = None
    return true, total

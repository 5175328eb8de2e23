"""Closed classes of English words: what is not content, what opens a noun phrase, what relates two things."""

from __future__ import annotations

DETERMINERS = frozenset(
    "a an the this that these those his her its their our my your some any another each every no other several many "
    "few one two three four five six seven eight nine ten".split()
)
COPULAS = frozenset("is are was were".split())
FUNCTION_WORDS = DETERMINERS | frozenset(
    "and or but nor of in on at to with from by for as into onto over under above below near behind beside besides "
    "between among through across along around against up down off out upon within without inside outside toward "
    "towards about before after during while when where as than then not very also too so just is are was were be "
    "been being am has have had do does did will would can could may might must should it he she they them him who "
    "whom whose which what that there here i we you me us himself herself itself themselves all both next front 's "
    "n't s t".split()
)

# A text that stops on one of these has broken off; "up", "off", "there" ... can end a sentence.
DANGLING = frozenset(
    "a an the this these those his its their our my your some another each every no and or but nor of in on at to "
    "with from by for as into onto over under above below near behind beside between among through across along "
    "around against upon within without toward towards while when where than is are was were be being has have had "
    "very which who whose front".split()
)

# Nouns that speak of the picture, of a part of it or of an amount; as objects they are neither right nor wrong.
GENERIC_NOUNS = frozenset(
    "picture image photo photograph shot view scene closeup background foreground distance side left right top bottom "
    "middle center centre front back corner edge end part piece pair group couple bunch lot number set row line kind "
    "type object thing shape figure something someone way day time area".split()
)

# Relation -> other wordings of it. Verbs that tie a person to a thing count as relations, too.
RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "on the left of"),
    "right of": ("to the right of", "on the right of"),
    "above": ("over", "higher than"),
    "below": ("under", "underneath", "beneath", "lower than"),
    "in front of": ("partly covering", "overlapping"),
    "behind": ("partly hidden by", "in back of"),
    "next to": ("beside", "by", "near", "close to", "alongside"),
    "on": ("on top of", "onto", "upon"),
    "in": ("inside", "into", "within", "inside of"),
    "at": (),
    "with": ("along with", "together with"),
    "between": (),
    "through": (),
    "across": (),
    "along": (),
    "around": (),
    "against": (),
    "wearing": ("wears", "dressed in"),
    "holding": ("holds", "carrying", "carries"),
    "riding": ("rides",),
}

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "calves": "calf",
    "shelves": "shelf", "scarves": "scarf", "loaves": "loaf", "potatoes": "potato", "tomatoes": "tomato",
    "kids": "child", "kid": "child",
}  # fmt: skip
_PLURAL_ONLY = frozenset("shorts jeans glasses clothes stairs woods goods pants trousers trunks scissors".split())


def singular(word: str) -> str:
    """The singular of an English noun by its ending; words that are no plural come back as they are, mostly."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word in _PLURAL_ONLY or word.endswith(("ss", "us", "is", "'s")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes")):
        return word[:-2]
    return word[:-1]

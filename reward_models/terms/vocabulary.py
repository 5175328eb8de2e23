"""Which words name an object, an attribute or a relation, and what a text therefore mentions.

Without a tagger and without a parser. A vocabulary is given word by word, or derived from the document frequencies of
training captions by the company that words keep:

    modifier   a content word that mostly stands behind a determiner or another modifier and before another content
               word ("a *red* shirt", "a large *brown* dog");
    noun       another content word that mostly stands behind a determiner or a modifier, and behind which the phrase
               often ends, in a function word or the end of the caption ("a *dog* in", "a brown *dog*").

Counts are numbers of training pictures. On the 39,380 captions of Flickr8k the hundred commonest nouns it finds hold
about five that are not ("jump", "trick", "turn"); it takes materials and kinds ("soccer", "brick") for modifiers, and
misses nouns that come without article ("sunglasses"). A word it does not know claims nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reward_models.metrics.ngrams import SHIFT, DocumentFrequencies
from reward_models.metrics.text import EOS
from reward_models.terms.words import COPULAS, DETERMINERS, FUNCTION_WORDS, GENERIC_NOUNS, RELATIONS, singular

_REMEMBERED = 100_000
KINDS = ("objects", "attributes", "relations")


_BEFORE_NOUNS = frozenset("in of with on at through from into near by for under over onto".split())


class Mention(NamedTuple):
    """Something the text says. It counts for the first w words if at < w <= until.

    kind: of `KINDS`; fact: (object,), (attribute, object) or (subject or None, relation, object); at: index of the
    word that completes it; until: index of the word that makes it part of something longer ("fire" in "fire truck").
    """

    at: int
    until: int
    kind: str
    fact: tuple[str | None, ...]


# What the reader carries from word to word: modifiers so far, relation so far, last object, and whether a modifier now
# speaks of that object (behind "is").
_State = tuple[tuple[str, ...], str | None, str | None, bool]


class Vocabulary:
    """Object, attribute and relation words with their synonyms.

    objects, attributes: words or phrases. relations: phrases, or None for a list of English prepositions and a few
    verbs. synonyms: word -> other wordings that mean the same (`{"circle": ["disc", "round shape"]}`). Plurals count
    as their singular. A word given as object and attribute is an object.
    """

    def __init__(
        self,
        objects: Iterable[str] = (),
        attributes: Iterable[str] = (),
        relations: Iterable[str] | None = None,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        *,
        keep: Iterable[str] = (),
    ) -> None:
        self._canonical = {word: word for word in keep}  # words that look like plurals and are none
        self._memory: dict[str, str] = {}
        pairs: dict[str, Sequence[str]] = dict(RELATIONS) if relations is None else {}
        pairs.update(synonyms or {})
        for word, others in pairs.items():
            if isinstance(others, str):
                raise ValueError(f"synonyms of {word!r}: expected a list of strings, got the string {others!r}")
            for other in others:
                self._canonical[other] = word
        self.kinds: dict[str, str] = {}
        listed = {"objects": objects, "attributes": attributes, "relations": pairs if relations is None else relations}
        if relations is None:
            listed["relations"] = RELATIONS
        for kind, words in listed.items():
            if isinstance(words, str):
                raise ValueError(f"vocabulary: {kind} must be a list of strings, got the string {words!r}")
            for word in words:
                self.kinds.setdefault(self.canonical(word), kind)
        self._tails = tails(list(self.kinds) + list(self._canonical))

    @classmethod
    def from_frequencies(
        cls,
        df: DocumentFrequencies,
        *,
        min_documents: int = 3,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        ignore: Iterable[str] = GENERIC_NOUNS,
    ) -> Vocabulary:
        """The nouns and modifiers of a corpus (see above) that stand in at least `min_documents` of its documents."""
        nouns, modifiers, neither = _classes(df, min_documents)
        left_out = frozenset(ignore)
        return cls(
            [word for word in nouns if singular(word) not in left_out and word not in left_out],
            modifiers,
            synonyms=synonyms,
            keep=[word for word in neither if singular(word) != word],  # "jumps" is no plural of "jump"
        )

    @property
    def signature(self) -> str:
        """Numbers of objects, attributes, relations, and 16 hex digits of the SHA-256 of everything."""
        content = json.dumps([sorted(self.kinds.items()), sorted((k, v) for k, v in self._canonical.items() if k != v)])
        numbers = "+".join(str(sum(kind == known for known in self.kinds.values())) for kind in KINDS)
        return f"{numbers}@{hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"

    def canonical(self, phrase: str) -> str:
        """The wording that stands for all synonyms of a phrase (lower case), the singular of a plural."""
        found = self._canonical.get(phrase) or self._memory.get(phrase)
        if found is None:
            head, _, last = phrase.rpartition(" ")
            one = phrase if phrase in RELATIONS or phrase in FUNCTION_WORDS else f"{head} {singular(last)}".strip()
            found = self._canonical.get(one, one)
            if len(self._memory) > _REMEMBERED:
                self._memory.clear()
            self._memory[phrase] = found
        return found

    def mentions(self, words: Sequence[str], own: Mapping[str, str] | None = None) -> list[Mention]:
        """What a list of words mentions, in order; `own` adds words (canonical -> kind) for this text alone.

        A modifier belongs to the next object, over "and" and unknown words, or behind "is" to the last one. A relation
        stands between the object before it and the object behind it. The longest phrase that ends at a word wins.
        """
        kinds, longest = self.kinds, self._tails
        own = own or {}
        if any(" " in name for name in own):
            longest = {**longest, **tails(own)}
        found: list[Mention] = []
        state: _State = ((), None, None, False)
        states = [state]
        never = len(words)
        for i, word in enumerate(words):
            name = self.canonical(word)
            if word in longest:
                for size in range(min(longest[word], i + 1), 1, -1):
                    phrase = self.canonical(" ".join(words[i - size + 1 : i + 1]))
                    if phrase in own or phrase in kinds:
                        name = phrase
                        state = states[i - size + 1]
                        _take_back(found, i - size + 1, i, never)
                        break
            kind = own.get(name) or kinds.get(name)
            modifiers, relation, subject, predicate = state
            if kind == "objects":
                found.append(Mention(i, never, "objects", (name,)))
                for each in modifiers:
                    found.append(Mention(i, never, "attributes", (each, name)))
                if relation:
                    found.append(Mention(i, never, "relations", (subject, relation, name)))
                state = ((), None, name, False)
            elif kind == "attributes":
                if predicate:
                    found.append(Mention(i, never, "attributes", (name, subject)))
                else:
                    state = ((*modifiers, name)[-8:], relation, subject, False)
            elif kind == "relations":
                state = ((), name, subject, False)
            elif word in COPULAS:
                state = ((), None, subject, subject is not None)
            elif word == "and":
                state = (modifiers, relation if modifiers else None, subject, predicate)
            elif word in FUNCTION_WORDS:
                state = ((), relation, subject, False)
            elif predicate:
                state = (modifiers, relation, subject, False)
            states.append(state)
        return found


def _take_back(found: list[Mention], start: int, at: int, never: int) -> None:
    """Mentions by the words from `start` on end at `at`: those words turned out to be part of a longer phrase."""
    for k in range(len(found) - 1, -1, -1):
        if found[k].at < start:
            break
        if found[k].until == never:
            found[k] = found[k]._replace(until=at)


def tails(phrases: Iterable[str]) -> dict[str, int]:
    """Last word -> number of words of the longest phrase that ends in it, for phrases of several words."""
    out: dict[str, int] = {}
    for phrase in phrases:
        if " " in phrase:
            words = phrase.split()
            for last in (words[-1], f"{words[-1]}s", f"{words[-1]}es"):
                out[last] = max(out.get(last, 1), len(words))
    return out


def _classes(df: DocumentFrequencies, min_documents: int) -> tuple[list[str], list[str], list[str]]:
    """Nouns, modifiers and other content words of a corpus, the commonest first."""
    v = len(df.words)
    parent, right = df.keys >> SHIFT, df.keys & ((1 << SHIFT) - 1)
    pairs = (parent >= 1) & (parent <= v)  # nodes 1..v are the words, so their children are the 2-grams
    left, right, count = parent[pairs] - 1, right[pairs], df.counts[pairs].astype(np.float64)
    opens = np.array([word in DETERMINERS for word in df.words])
    stop = np.array([word in FUNCTION_WORDS or word == EOS for word in df.words])
    linked = np.array([word in _BEFORE_NOUNS for word in df.words])
    gerund = np.array([word.endswith("ing") for word in df.words])
    closes = stop & np.array([word not in ("and", "or") for word in df.words])

    def before(mask: np.ndarray) -> np.ndarray:
        """Share of what stands before each word that is in the mask."""
        return np.bincount(right, count * mask[left], v) / np.maximum(np.bincount(right, count, v), 1)

    def behind(mask: np.ndarray) -> np.ndarray:
        return np.bincount(left, count * mask[right], v) / np.maximum(np.bincount(left, count, v), 1)

    often = df.counts[1 : v + 1]
    candidate = ~stop & (often >= min_documents)
    ends = behind(closes)
    inside = candidate & (ends < 0.35) & (behind(~stop) >= 0.5)
    modifier = np.zeros(v, dtype=bool)
    for _ in range(3):  # "a large brown dog": brown is found once large is
        modifier = inside & (before(opens | modifier) >= 0.4) & (before(stop | modifier) >= 0.6)
    led = before(opens | modifier)
    noun = candidate & ~modifier & (led >= 0.4) & (ends >= 0.3)
    # "food", "sunglasses": nouns without determiner follow a preposition
    noun |= candidate & ~modifier & ~gerund & (led >= 0.1) & (before(opens | modifier | linked) >= 0.5) & (ends >= 0.3)
    known = {df.words[i] for i in np.flatnonzero(noun)}
    for i in np.flatnonzero(candidate & ~modifier & ~noun & (led >= 0.2)):  # plurals do without determiner
        noun[i] = singular(df.words[i]) != df.words[i] and singular(df.words[i]) in known
    order = np.argsort(-often, kind="stable")

    def listed(mask: np.ndarray) -> list[str]:
        return [df.words[i] for i in order if mask[i]]

    return listed(noun), listed(modifier), listed(candidate & ~noun & ~modifier)

"""Coverage and hallucination: what a response mentions against what is there.

After CHAIR (Rohrbach et al. 2018, arXiv 1809.02156), on distinct mentions, and for attributes and
relations as well as objects. What is there comes from columns of the data set, or from the references.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reward_models.metrics.text import row_name, whole
from reward_models.terms.term import Scores, Term, frequencies, value_of
from reward_models.terms.vocabulary import KINDS, Vocabulary

Fact = tuple[str | None, ...]
Truth = dict[str, set[Fact]]  # kind -> facts; a kind of which nothing is known has no entry

_NAMES = ("name", "label", "category", "noun", "object", "shape", "class")
_ATTRIBUTES = ("colour", "color", "size", "material", "pattern", "texture", "attributes")
_CACHED = 8192
_MIN_DOCUMENTS = 3


class _Grounded(Term):
    """Options and ground truth of both terms; see `docs/rewards/coverage.md`."""

    needs_training = True

    def __init__(
        self,
        training: Any = None,
        *,
        of: str = "objects",
        truth: str = "auto",
        at_least: int = 1,
        vocabulary: Vocabulary | Mapping[str, Iterable[str]] | None = None,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        min_documents: int | None = None,
        attribute_keys: Sequence[str] = _ATTRIBUTES,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(tokenizer, training)
        name = self.__name__
        if of != "all" and of not in KINDS:
            raise ValueError(f"{name}: of must be one of {', '.join(KINDS)}, all; got {of!r}")
        if truth not in ("auto", "columns", "references", "both"):
            raise ValueError(f"{name}: truth must be auto, columns, references or both, got {truth!r}")
        if isinstance(attribute_keys, str) or not all(isinstance(key, str) for key in attribute_keys):
            raise ValueError(f"{name}: attribute_keys must be a list of strings, got {attribute_keys!r}")
        if min_documents is not None and (vocabulary is not None or training is None):
            raise ValueError(
                f"{name}: min_documents is for a vocabulary that is derived from training captions, but "
                f"{'there are none' if vocabulary is None else 'vocabulary is given'}; leave one of them out"
            )
        enough = whole(name, "min_documents", _MIN_DOCUMENTS if min_documents is None else min_documents)
        self.of, self.truth, self.at_least = of, truth, whole(name, "at_least", at_least)
        self.attribute_keys = tuple(attribute_keys)
        self._vocabulary, self.synonyms, self.min_documents = vocabulary, synonyms, min_documents  # as given
        self._kinds = KINDS if of == "all" else (of,)
        if isinstance(vocabulary, Vocabulary):
            if synonyms:
                raise ValueError(f"{name}: synonyms belong into the Vocabulary that is given")
            self.vocabulary = vocabulary
        elif vocabulary is not None:
            unknown = sorted(set(vocabulary) - set(KINDS))
            if unknown:
                raise ValueError(f"{name}: vocabulary has {unknown}; expected {', '.join(KINDS)}")
            self.vocabulary = Vocabulary(**{key: vocabulary[key] for key in vocabulary}, synonyms=synonyms)
        elif training is not None:
            df = frequencies(name, training, self.tokenizer)
            self.vocabulary = Vocabulary.from_frequencies(df, synonyms=synonyms, min_documents=enough)
        else:
            self.vocabulary = Vocabulary(synonyms=synonyms)
        self._cache: dict[tuple[str, ...], Truth] = {}

    @property
    def signature(self) -> str:
        return (
            f"{self.__name__}|of:{self.of}|truth:{self.truth}|at_least:{self.at_least}"
            f"|keys:{','.join(self.attribute_keys)}|vocabulary:{self.vocabulary.signature}|tok:{self.tokenizer}|version:1"
        )

    def _truth(self, i: int, columns: dict[str, Any]) -> tuple[Truth, dict[str, str]]:
        """Facts of row i, and the words (canonical -> kind) that its columns add to the vocabulary."""
        found: Truth = {}
        own: dict[str, str] = {}
        if self.truth != "references":
            self._read_columns(found, own, i, columns)
        if self.truth in ("references", "both") or (self.truth == "auto" and not found):
            references = value_of(columns, "references", i)
            if references is None:
                if self.truth != "auto":
                    raise ValueError(f"{row_name(self.__name__, i, columns.get('id'))} needs the column 'references'")
                return found, own
            if isinstance(references, str) or not all(isinstance(text, str) for text in references):
                where = row_name(self.__name__, i, columns.get("id"))
                raise ValueError(f"{where}: references must be a list of strings, got {str(references)[:80]!r}")
            if not len(references):
                return found, own
            for kind, facts in self._from_references(tuple(references)).items():
                found[kind] = found.get(kind, set()) | facts
        return found, own

    def _from_references(self, references: tuple[str, ...]) -> Truth:
        """Facts that at least `at_least` of the references (or all of them, if fewer) mention."""
        known = self._cache.get(references)
        if known is None:
            votes: Counter[tuple[str, Fact]] = Counter()
            for reference in references:
                words = self._tokenize(reference)
                # the subject of a relation is worded too freely to be agreed upon
                votes.update(
                    {
                        (kind, (None, *fact[1:]) if kind == "relations" else fact)
                        for _, until, kind, fact in self.vocabulary.mentions(words)
                        if until == len(words)
                    }
                )
            enough = min(self.at_least, len(references))
            known = {kind: {fact for (of, fact), n in votes.items() if of == kind and n >= enough} for kind in KINDS}
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            self._cache[references] = known
        return known

    def _read_columns(self, found: Truth, own: dict[str, str], i: int, columns: dict[str, Any]) -> None:
        where = row_name(self.__name__, i, columns.get("id"))
        things = value_of(columns, "objects", i)
        things = value_of(columns, "labels", i) if things is None else things
        if things is not None:
            if isinstance(things, (str, Mapping)):
                raise ValueError(f"{where}: objects must be a list, got {type(things).__name__}")
            objects = found.setdefault("objects", set())
            for thing in things:
                if isinstance(thing, str):
                    objects.add((self._name(thing, "objects", own),))
                elif isinstance(thing, Mapping):
                    key = next((key for key in _NAMES if isinstance(thing.get(key), str)), None)
                    if key is None:
                        raise ValueError(f"{where}: object {dict(thing)!r} has no name; expected one of {_NAMES}")
                    name = self._name(thing[key], "objects", own)
                    objects.add((name,))
                    self._attributes(found, own, name, [thing.get(k) for k in self.attribute_keys if k != key])
                else:
                    raise ValueError(f"{where}: an object is {type(thing).__name__}, expected a string or a mapping")
        background = value_of(columns, "background", i)
        if isinstance(background, str) and things is not None:
            name = self._name("background", "objects", own)
            found["objects"].add((name,))
            self._attributes(found, own, name, [background.split()])
        relations = value_of(columns, "relations", i)
        for relation in relations if relations is not None else ():
            found.setdefault("relations", set()).add(self._relation(relation, own, where))
        if relations is not None:
            found.setdefault("relations", set())

    def _attributes(self, found: Truth, own: dict[str, str], name: str, values: list[Any]) -> None:
        facts = found.setdefault("attributes", set())
        for value in values:
            for word in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(word, str):  # sizes in pixels and the like say nothing that a text could
                    facts.add((self._name(word, "attributes", own), name))

    def _relation(self, relation: Any, own: dict[str, str], where: str) -> Fact:
        if isinstance(relation, str):
            return (None, self._name(relation, "relations", own), None)
        if isinstance(relation, Mapping):
            verb = relation.get("relation", relation.get("predicate"))
            ends: Sequence[Any] = (relation.get("subject"), verb, relation.get("object"))
        else:
            ends = relation
        if not isinstance(ends, Sequence) or len(ends) != 3 or not isinstance(ends[1], str):
            raise ValueError(f"{where}: relation {relation!r}; expected a phrase or (subject, relation, object)")
        subject, verb, other = ends
        return (
            None if subject is None else self._name(subject, "objects", own),
            self._name(verb, "relations", own),
            None if other is None else self._name(other, "objects", own),
        )

    def _name(self, text: str, kind: str, own: dict[str, str]) -> str:
        """The canonical wording of a name in the data; it becomes a word of the vocabulary for this row."""
        name = self.vocabulary.canonical(" ".join(self._tokenize(text)))
        if name:
            own.setdefault(name, kind)
        return name

    def _changes(self, words: list[str], own: dict[str, str]) -> dict[int, list[tuple[int, str, Fact]]]:
        """Per word what begins (+1) and what ceases (-1) to be mentioned with it, of the kinds that count."""
        changes: dict[int, list[tuple[int, str, Fact]]] = {}
        for at, until, kind, fact in self.vocabulary.mentions(words, own):
            if kind in self._kinds:
                changes.setdefault(at, []).append((1, kind, fact))
                if until < len(words):
                    changes.setdefault(until, []).append((-1, kind, fact))
        return changes


def _matches(kind: str, fact: Fact) -> tuple[Fact, ...]:
    """The facts that a mention is an instance of: a relation may be stated with or without its ends."""
    if kind != "relations":
        return (fact,)
    subject, verb, other = fact
    return tuple({fact, (None, verb, other), (subject, verb, None), (None, verb, None)})


class Coverage(_Grounded):
    """Share of the facts of the ground truth that the response mentions, in [0, 1]; None where there are none.

    of: objects, attributes, relations, or all of them in one pool. truth: auto (columns `objects` or `labels`,
    `background`, `relations` of the row; its references where it has none), columns, references, both. at_least: how
    many of a picture's references must mention a fact. vocabulary, synonyms: see `Vocabulary`; by default the
    vocabulary is derived from the training captions, of words that at least min_documents (3) pictures have.
    """

    __name__ = "coverage"

    def _scores(self, words: list[str], i: int, columns: dict[str, Any]) -> Scores:
        truth, own = self._truth(i, columns)
        facts = sum(len(truth.get(kind, ())) for kind in self._kinds)
        if not facts:
            return None
        counts: dict[tuple[str, Fact], int] = {}
        covered = 0
        out = [0.0]
        changes = self._changes(words, own)
        for w in range(len(words)):
            for step, kind, fact in changes.get(w, ()):
                for match in _matches(kind, fact):
                    if match in truth.get(kind, ()):
                        before = counts.get((kind, match), 0)
                        counts[kind, match] = before + step
                        covered += (before + step > 0) - (before > 0)
            out.append(covered / facts)
        return out


class Hallucination(_Grounded):
    """Minus the share of distinct mentions that are not in the ground truth, in [-1, 0]; None without ground truth.

    chair "i" (CHAIR_i): false mentions / mentions, 0 for a response that mentions nothing. chair "s" (CHAIR_s): 1 if
    any mention is false. Only kinds (objects, attributes, relations) that the row's ground truth knows are judged.
    Options as for `Coverage`; with at_least 1, what any one reference mentions is no hallucination.
    """

    __name__ = "hallucination"

    def __init__(self, training: Any = None, *, chair: str = "i", **options: Any) -> None:
        super().__init__(training, **options)
        if chair not in ("i", "s"):
            raise ValueError(f"hallucination: chair must be 'i' (per mention) or 's' (per response), got {chair!r}")
        self.chair = chair
        if "objects" not in self.vocabulary.kinds.values():
            raise ValueError(
                "hallucination: no vocabulary of objects, so nothing could be told to be false; give the training "
                "captions (more of them, or a lower min_documents) or vocabulary={'objects': [...]}"
            )

    @property
    def signature(self) -> str:
        return f"{super().signature}|chair:{self.chair}"

    def _scores(self, words: list[str], i: int, columns: dict[str, Any]) -> Scores:
        truth, own = self._truth(i, columns)
        if not any(kind in truth for kind in self._kinds):
            return None
        counts: dict[tuple[str, Fact], int] = {}
        said = false = 0
        out = [0.0]
        changes = self._changes(words, own)
        for w in range(len(words)):
            for step, kind, fact in changes.get(w, ()):
                if kind not in truth:
                    continue
                before = counts.get((kind, fact), 0)
                counts[kind, fact] = before + step
                change = (before + step > 0) - (before > 0)
                said += change
                false += change * all(match not in truth[kind] for match in _matches(kind, fact))
            share = false / said if said else 0.0
            out.append(0.0 - (share if self.chair == "i" else false > 0))  # no -0.0
        return out

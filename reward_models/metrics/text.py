"""From the text of a completion to a list of tokens, the same way everywhere.

Three tokenisers, by name:

``simple``      lower case (after Unicode NFC), then
                - letters, marks, digits stay; a hyphen inside a word stays (``t-shirt``);
                - an apostrophe inside a word starts a new token (``dog's`` -> ``dog 's``, as the Penn Treebank does);
                - all other ASCII punctuation and symbols, Unicode punctuation and control characters become a space;
                - other symbols (emoji, currency) become tokens of their own;
                - invisible format characters (zero-width joiner, variation selectors, soft hyphen) vanish.
``ptb``         Penn Treebank tokens as `pycocoevalcap` gets them from Java, see `reward_models.metrics.ptb`.
``whitespace``  nothing but ``str.split()``: for text that is tokenised already, so that two scorers can be
                compared on the same tokens.

The end token `EOS` holds a space, which no token of any tokeniser can, so text never collides with it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np

EOS = " <eos>"

_STRING, _LISTS = {str}, {list, tuple}
_APOSTROPHES = "'\u2019\u02bc"
_HYPHENS = "-\u2010\u2011"
_INNER_APOSTROPHE = re.compile(r"(?<=[^\W_])'(?=[^\W_])")
_STRAY_HYPHEN = re.compile(r"(?<!\S)-+|-+(?!\S)|--+")


class _Characters(dict[int, str]):
    """Translation table for `str.translate`, filled as characters turn up (from their Unicode category)."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char in _APOSTROPHES:
            out = "'"
        elif char in _HYPHENS:
            out = "-"
        elif category == "Cf" or 0xFE00 <= code <= 0xFE0F:
            out = ""
        elif category[0] in "LMN":
            out = char
        elif category[0] == "S" and code > 127:
            out = f" {char} "
        else:
            out = " "
        self[code] = out
        return out


_CHARACTERS = _Characters()


def simple(text: str) -> list[str]:
    """Tokens of free text; see the module docstring for the rules."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = text.lower().translate(_CHARACTERS)
    if "'" in text:
        text = _INNER_APOSTROPHE.sub(" \0", text).replace("'", " ").replace("\0", "'")
    if "-" in text:
        text = _STRAY_HYPHEN.sub(" ", text)
    return text.split()


def ptb(text: str) -> list[str]:
    """Penn Treebank tokens; the rules are read when the first text comes, for they take a third of the import."""
    from reward_models.metrics.ptb import ptb as tokens

    return tokens(text)


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"simple": simple, "ptb": ptb, "whitespace": str.split}


def tokenizer_named(name: str) -> Callable[[str], list[str]]:
    """The tokeniser of that name; ValueError listing the names otherwise."""
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


def flag(name: str, option: str, value: Any) -> bool:
    """An option that is true or false; ValueError for anything else, for `bool("no")` is True."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(
            f"{name}: {option} must be true or false, got {value!r} (in YAML 1.2 yes, no, on and off are text)"
        )
    return bool(value)


def whole(name: str, option: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An option that is a whole number within limits; ValueError for anything else, True and 2.0 included."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= (most or value):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: {option} must be a whole number {limits}, got {value!r}")
    return int(value)


def real(name: str, option: str, value: Any) -> float:
    """An option that is a number; ValueError for text, flags and NaN. Infinity is let through."""
    if not isinstance(value, Real) or isinstance(value, bool) or value != value:
        raise ValueError(f"{name}: {option} must be a number, got {value!r}")
    return float(value)


def row_name(name: str, i: int, ids: Sequence[Any] | None = None) -> str:
    """How an error names row i of reward `name`: by its place, and by its id where there is one."""
    return f"{name}: row {i}" if ids is None or i >= len(ids) else f"{name}: row {i} (id {ids[i]!r})"


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The plain text of a TRL completion: a string, or chat messages whose last one is read.

    The content of a message is a string or a list of parts; parts of type "text" are joined.
    Raises TypeError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        content = completion[-1].get("content")
        if isinstance(content, str):
            return content
        if isinstance(content, Sequence):
            return "".join(part["text"] for part in content if part.get("type") == "text")
    raise TypeError(f"a completion is a string or a list of chat messages, got {type(completion).__name__}")


def check_rows(
    name: str,
    candidates: Sequence[Any],
    references: Sequence[Any] | None,
    ended: Sequence[Any] | None = None,
    ids: Sequence[Any] | None = None,
    known: Container[tuple[str, ...]] = (),
) -> tuple[list[str], list[tuple[str, ...]], list[bool]]:
    """Validate one batch: N candidate texts, N non-empty lists of reference strings, N flags (None: all ended).

    `ids` (N) only name rows in errors; references in `known` were checked before. Returns the texts, the
    references as tuples (hashable) and the flags. Raises ValueError naming the reward and the row.
    """
    if references is None:
        raise ValueError(f"{name}: no references given; the dataset needs a column 'references' (list of strings)")
    for what, column in (("references", references), ("ended", ended)):
        if column is not None and len(column) != len(candidates):
            raise ValueError(f"{name}: {len(candidates)} completions but {len(column)} {what}; one per row is needed")

    flags = [True] * len(candidates) if ended is None else list(map(bool, ended))
    tuples: list[tuple[str, ...]]
    if _STRING >= set(map(type, candidates)) and _LISTS >= set(map(type, references)):  # the usual case, fast
        tuples = list(map(tuple, references))
        try:
            new = tuples if not known else [refs for refs in tuples if refs not in known]
        except TypeError:  # a reference that cannot be hashed is no string: named below
            new = [()]
        if all(new) and _STRING >= set(map(type, chain.from_iterable(new))):
            return list(candidates), tuples, flags

    texts, tuples = [], []
    for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
        where = row_name(name, i, ids)
        try:
            texts.append(completion_text(candidate))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from None
        if isinstance(refs, str) or not isinstance(refs, Sequence):
            raise ValueError(f"{where}: references must be a list of strings, got {type(refs).__name__}")
        if not len(refs):
            raise ValueError(f"{where} has no references; give at least one or leave the row out")
        for ref in refs:
            if not isinstance(ref, str):
                raise ValueError(f"{where}: a reference is {type(ref).__name__}, expected a string")
        tuples.append(tuple(refs))
    return texts, tuples, flags

"""Terms on the form: did the response end by itself, does its text keep to a format. Formulas: docs/rewards/."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from reward_models.metrics.text import flag, simple
from reward_models.terms.term import texts, value_of
from reward_models.terms.words import DANGLING

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),), "any": (object,),
}  # fmt: skip


class MissingEos:
    """-1 for a response that was cut off, 0 for one that ended by itself; None without the column `ended`."""

    __name__ = "missing_eos"
    needs_training = False
    signature = "missing_eos|version:1"

    def __call__(self, prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float | None]:
        ended = [value_of(columns, "ended", i) for i in range(len(completions))]
        return [None if end is None else (0.0 if end else -1.0) for end in ended]


class Format:
    """Share of the checks that a text passes, in [0, 1]; with strict, 1 if it passes all of them, else 0.

    The checks, each on if given (surrounding blanks of the text are ignored):
        regex: the whole text matches (`re.fullmatch`, with DOTALL).
        starts_with, ends_with: the text begins / ends with one of these strings.
        tag: holds exactly one `<tag>...</tag>` with something in it.
        json: True: the text is JSON; a list: an object with these keys; a mapping key -> type: and the values are of
            the type string, integer, number, boolean, array, object, null or any.
        banned: none of these phrases occurs (as whole words, upper and lower case alike).
        bad_endings: True: the last word is no function word that must go on ("a", "with", "the", ...); or a list of
            words of your own.
    Raises ValueError for no check at all, a broken pattern, an unknown type or an option of the wrong type.
    """

    __name__ = "format"
    needs_training = False

    def __init__(
        self,
        *,
        regex: str | None = None,
        starts_with: str | Sequence[str] | None = None,
        ends_with: str | Sequence[str] | None = None,
        tag: str | None = None,
        json: bool | Sequence[str] | Mapping[str, str] = False,
        banned: Sequence[str] = (),
        bad_endings: bool | Sequence[str] = False,
        strict: bool = False,
    ) -> None:
        self.regex, self.starts_with, self.ends_with, self.tag = regex, starts_with, ends_with, tag
        self.json, self.banned, self.bad_endings = json, banned, bad_endings
        self.strict = flag("format", "strict", strict)
        self._checks: list[tuple[str, Any]] = []
        if regex is not None:
            try:
                pattern = re.compile(regex, re.DOTALL)
            except (re.error, TypeError) as error:
                raise ValueError(f"format: regex {regex!r} is broken: {error}") from None
            self._checks.append((f"regex:{regex}", lambda text: pattern.fullmatch(text) is not None))
        if starts_with is not None:
            heads = _strings("starts_with", starts_with)
            self._checks.append((f"starts:{list(heads)}", lambda text: text.startswith(heads)))
        if ends_with is not None:
            tails = _strings("ends_with", ends_with)
            self._checks.append((f"ends:{list(tails)}", lambda text: text.endswith(tails)))
        if tag is not None:
            if not isinstance(tag, str) or not tag:
                raise ValueError(f"format: tag must be a name, got {tag!r}")
            opening, closing = f"<{tag}>", f"</{tag}>"
            self._checks.append((f"tag:{tag}", lambda text: _tagged(text, opening, closing)))
        if json is not False:
            keys = _json_keys(json)
            self._checks.append((f"json:{keys}", lambda text: _is_json(text, keys)))
        if banned not in (None, (), []):
            phrases = [simple(phrase) for phrase in _strings("banned", banned)]
            if not all(phrases):
                raise ValueError(f"format: a banned phrase holds no word: {list(banned)!r}")
            padded = tuple(f" {' '.join(words)} " for words in phrases)
            self._checks.append((f"banned:{[p.strip() for p in padded]}", lambda text: _free_of(text, padded)))
        if bad_endings is not False:
            if isinstance(bad_endings, str):  # in YAML 1.2 "no" is text
                raise ValueError(f"format: bad_endings must be true, false or a list of words, got {bad_endings!r}")
            endings = DANGLING if bad_endings is True else frozenset(_strings("bad_endings", bad_endings))
            label = "yes" if bad_endings is True else sorted(endings)
            self._checks.append((f"bad_endings:{label}", lambda text: _well_ended(text, endings)))
        if not self._checks:
            raise ValueError(
                "format: nothing to check; give regex, starts_with, ends_with, tag, json, banned or bad_endings"
            )

    @property
    def signature(self) -> str:
        # a pattern may hold line ends; a signature is one line
        checks = "|".join(label.replace("\n", "\\n") for label, _ in self._checks)
        return f"format|{checks}|strict:{'yes' if self.strict else 'no'}|version:1"

    def __call__(self, prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float | None]:
        out: list[float | None] = []
        for text in texts("format", completions, columns.get("id")):
            text = text.strip()
            passed = sum(bool(check(text)) for _, check in self._checks)
            out.append(float(passed == len(self._checks)) if self.strict else passed / len(self._checks))
        return out


def _strings(option: str, value: str | Collection[str]) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Collection) else ()
    if not found or not all(isinstance(item, str) and item for item in found):
        raise ValueError(f"format: {option} must be a string or a list of non-empty strings, got {value!r}")
    return found


def _json_keys(wanted: bool | Sequence[str] | Mapping[str, str]) -> dict[str, str] | None:
    """Key -> type; None where any JSON will do."""
    if wanted is True:
        return None
    if isinstance(wanted, bool) or isinstance(wanted, str) or not isinstance(wanted, (Mapping, Sequence)):
        raise ValueError(f"format: json must be true, a list of keys or a mapping key -> type, got {wanted!r}")
    keys = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted, "any")
    for key, kind in keys.items():
        if kind not in _JSON_TYPES:
            raise ValueError(f"format: json key {key!r} has type {kind!r}; expected one of {', '.join(_JSON_TYPES)}")
    return keys


def _is_json(text: str, keys: dict[str, str] | None) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # thousands of brackets nest deeper than Python's stack
        return False
    if keys is None:
        return True
    if not isinstance(value, dict):
        return False
    for key, kind in keys.items():
        if key not in value or not isinstance(value[key], _JSON_TYPES[kind]):
            return False
        if isinstance(value[key], bool) and kind in ("integer", "number"):  # True is an int to Python, not to JSON
            return False
    return True


def _tagged(text: str, opening: str, closing: str) -> bool:
    if text.count(opening) != 1 or text.count(closing) != 1:
        return False
    begin, end = text.index(opening) + len(opening), text.index(closing)
    return bool(text[begin:end].strip())


def _free_of(text: str, phrases: tuple[str, ...]) -> bool:
    words = f" {' '.join(simple(text))} "
    return not any(phrase in words for phrase in phrases)


def _well_ended(text: str, endings: frozenset[str]) -> bool:
    """The last word is none of `endings`; a text without words does not end well."""
    words = simple(text[-400:])  # the last word is enough
    return bool(words) and words[-1] not in endings

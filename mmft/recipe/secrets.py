"""What must reach no file and no screen: tokens and passwords.

A text is hidden where it has the shape of a token, where the environment calls it a secret (``HF_TOKEN``,
``WANDB_API_KEY``, …), where it is the stored login of the Hub, or where a recipe gives it to a key with such a name.
Like the recipe this must not import anything heavy.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

HIDDEN = "(hidden)"
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[opsru]_\w{30,}|github_pat_\w{30,}|xox[abprs]-[\w-]{10,}"
    r"|A(?:KI|SI)A[0-9A-Z]{16}|AIza[\w-]{35})"
)
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")  # user:password@
_NAMES = re.compile(
    r"(?:token|secret|password|passwd|(?:api|access|private)[_-]?key|auth|authorization|bearer|cookie"
    r"|credentials?|passphrase)$",
    re.IGNORECASE,
)
_LEAST = 8  # characters; a shorter value stands in too many harmless texts
_given: set[str] = set()


def remember_secrets(data: Any) -> None:
    """Hides from now on what nested data holds under keys like ``token`` and ``api_key``."""
    for name, value in _pairs(data):
        if _NAMES.search(name) and len(value) >= _LEAST:
            _given.add(value)


def redact(text: str) -> str:
    """The text with every secret replaced."""
    for value in known_secrets():
        text = text.replace(value, HIDDEN)
    return _IN_URL.sub(HIDDEN, _SHAPES.sub(HIDDEN, text))


def redacted(data: Any, name: str = "") -> Any:
    """Nested dicts and lists with every secret in a text replaced, short ones under a secret's key included."""
    if isinstance(data, dict):
        return {key: redacted(value, str(key)) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [redacted(value, name) for value in data]
    if isinstance(data, str):
        return HIDDEN if data and _NAMES.search(name) else redact(data)
    return data


def known_secrets() -> list[str]:
    """Values that are secret whatever their shape, the longest first."""
    found = {value for name, value in os.environ.items() if _NAMES.search(name)} | {stored_login(), *_given}
    return sorted((value for value in found if len(value) >= _LEAST), key=len, reverse=True)


def hide_secrets() -> None:
    """Hides secrets in all that this process prints from now on, tracebacks included."""
    if not isinstance(sys.stdout, _Hiding):
        sys.stdout, sys.stderr = _Hiding(sys.stdout), _Hiding(sys.stderr)


class _Hiding:
    """A text stream that writes without secrets."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _pairs(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _pairs(value, str(key))
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _pairs(value, name)
    elif isinstance(data, str):
        yield name, data


@lru_cache(maxsize=1)
def stored_login() -> str:
    """The token that `hf auth login` stored, or nothing."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).read_text().strip()
    except (OSError, ValueError, RuntimeError):
        return ""

"""Ctrl-C on the command line. Libraries swallow it while they are imported, and go on half loaded; so it is remembered
here, and asked for at every sign of progress and at the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CODE = 130  # 128 + SIGINT, as shells have it
_asked = threading.Event()


def asked() -> bool:
    """Whether Ctrl-C was pressed."""
    return _asked.is_set()


@contextmanager
def remembered() -> Iterator[None]:
    """Remembers Ctrl-C from here on; it raises KeyboardInterrupt as ever."""
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours there
        return
    before = signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _remember(number: int, frame: Any) -> None:
    _asked.set()
    raise KeyboardInterrupt

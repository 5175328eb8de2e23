"""SIGTERM and SIGINT: the run ends after the step at hand with a checkpoint; a second signal ends it at once.

Exit codes: 143 after SIGTERM, 130 after SIGINT, as a shell reports a process that these signals have killed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher hands the terminal's Ctrl-C on to processes that have had it from the terminal already.
_ECHO = 1.0
# Seconds after the signal in which a step may end; what then remains of half a minute is for the checkpoint.
_PATIENCE = 20.0


class Interrupted(SystemExit):
    """The run was asked to end, and its state is saved."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Abandoned(BaseException):  # no error: nobody is told of it, and no `except Exception` may stop it
    """A step is given up before it changed any weight: it would have taken too long."""


class Interrupts:
    """Notices signals while a run is inside its ``with`` block. Only in the main thread; elsewhere it notices none.

    A thread reads them from a pipe: the handler of a Python program has to wait until the main thread comes back from
    whatever library it is in, perhaps a collective that will never end.

    Args:
        highest: a number -> the highest that any process gave; all processes meet there.
        say: told what happens, on every process that has a signal.
    """

    def __init__(self, highest: Callable[[int], int] = int, say: Callable[[str], None] = print):
        self.highest, self.say = highest, say
        self._signal, self._at = 0, 0.0
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupts:
        self._signal = 0
        if self._active:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._active:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)  # the thread reads the end of the pipe

    def asked(self) -> int:
        """The signal that asks the run to end, on any process; 0 = none."""
        return self.highest(self._signal)

    def too_long(self, expected: float) -> bool:
        """Whether a signal is there and what remains of the step, ``expected`` seconds, is more than may be waited."""
        mine = self._signal and time.monotonic() - self._at + expected > _PATIENCE
        return bool(self.highest(int(bool(mine))))

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] not in SIGNALS:
                continue
            if not self._signal:
                self._signal, self._at = number[0], time.monotonic()
                name = signal.Signals(number[0]).name
                self.say(f"{name}: the run ends after this step, with a checkpoint; once more ends it at once")
            elif time.monotonic() - self._at > _ECHO:
                os._exit(128 + number[0])
        os.close(self._read)

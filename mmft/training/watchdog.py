"""A time limit on every phase of a step, and one first cause that all processes of a run know.

While a phase is open, a thread looks once a second: has it taken longer than the limit, has another process failed?
The first is said in one line (rank, phase, step, seconds, who is waited for) below the stacks of all threads, and ends
the process; the second ends it when it has not ended by itself, so that an error of one process leaves no other in a
collective. A thread is enough for a hang in Python and in C code that lets other threads run, as collectives do. Where
C code keeps the interpreter to itself, `faulthandler` ends the process a little later, with stacks but without the
line, and the other processes have said who it was.

Processes know each other by the key-value store of the launcher. When that is gone, so is the launcher or the machine
of the first process, and the others end as well.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed import distributed_c10d

from mmft.recipe.secrets import redact

FAILED = 1  # exit code after an error in training
TIMED_OUT = 124  # exit code of the watchdog, as of coreutils' `timeout`
_BEAT = 1.0  # seconds between looks
_GRACE = 5.0  # seconds that a process has to end by itself after another has failed
_FALLBACK = 8.0  # seconds past the limit after which faulthandler ends what this thread could not
_STORE_GONE = (RuntimeError, OSError)


@dataclass(frozen=True)
class _Open:
    """A phase that has begun. ``number`` counts the phases of a run: all processes go through the same ones."""

    name: str
    step: int
    number: int
    began: float
    thread: int


class Watchdog:
    """Watches the phases of one process among ``world``; see the module's first lines.

    Args:
        limit: seconds that one phase may take, those of inner phases not counted; None = for ever.
    """

    def __init__(self, limit: float | None, rank: int = 0, world: int = 1):
        self.limit, self.rank = limit, rank
        self.board = _Board(rank, world) if world > 1 else None
        self._numbers, self._beats = itertools.count(1), itertools.count(1)
        self._open: list[_Open] = []
        self._step = 0
        self._told: BaseException | None = None

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """A phase of a step (default: the last one named). Every process has to enter it.

        An error that leaves it is told to the other processes. One that only says that another process is gone gets
        a note with the first cause.
        """
        outermost, done = not self._open, threading.Event()
        self._step = self._step if step is None else step
        self._begin([*self._open, self._new(name, self._step)])
        if outermost and (self.limit or self.board):
            threading.Thread(target=self._watch, args=(done,), name="mmft-watchdog", daemon=True).start()
        try:
            yield
        except Exception as error:
            if error is not self._told:  # said by an inner phase
                self._told = error
                self._tell(error)
            raise
        finally:
            done.set()
            *outer, around = self._open[:-1] or [None]
            self._begin([*outer, self._new(around.name, around.step)] if around else [])  # its time begins anew

    def _new(self, name: str, step: int) -> _Open:
        return _Open(name, step, next(self._numbers), time.monotonic(), threading.get_ident())

    def _begin(self, phases: list[_Open]) -> None:
        self._open = phases
        if self.limit and phases:
            faulthandler.dump_traceback_later(self.limit + _FALLBACK, exit=True, file=sys.__stderr__)
        elif self.limit:
            faulthandler.cancel_dump_traceback_later()
        if self.board and phases:  # at once: from the next line on, nothing else may run here
            with suppress(*_STORE_GONE):
                self._beat(phases[-1])

    def _watch(self, done: threading.Event) -> None:
        failed_since: float | None = None
        while not done.wait(_BEAT):
            phases = self._open
            if not phases:
                return
            now = phases[-1]
            try:
                first = self._beat(now) if self.board else None
            except _STORE_GONE:
                first = {"rank": None, "text": "the launcher is gone, or the machine of rank 0", "code": FAILED}
            if first is not None and first["rank"] != self.rank:
                failed_since = failed_since or time.monotonic()
                if time.monotonic() - failed_since > _GRACE:
                    self._end(f"{self._me(now)} was ended, because {first['text']}", first["code"], stacks=False)
            elif self.limit and time.monotonic() - now.began > self.limit:
                faulthandler.dump_traceback_later(_FALLBACK, exit=True, file=sys.__stderr__)
                line = self._late(now)
                if self._open[-1:] == [now]:  # looking around took seconds: it may have gone on meanwhile
                    self._end(line, TIMED_OUT)

    def _beat(self, now: _Open) -> dict[str, Any] | None:
        """Says where this process is; returns the first failure of the run, if there is one."""
        assert self.board is not None
        entry = {"beat": next(self._beats), "number": now.number, "step": now.step, "phase": now.name}
        entry |= {"seconds": time.monotonic() - now.began, "waiting": _in_collective(now.thread)}
        self.board.say(entry)
        return self.board.first()

    # ---------------------------------------------------------------- words

    def _me(self, now: _Open) -> str:
        return f"rank {self.rank}, in phase {now.name!r} of step {now.step},"

    def _late(self, now: _Open) -> str:
        """The line for a phase that took too long."""
        seconds, limit = time.monotonic() - now.began, f"train.timeout is {self.limit:g}"
        behind = self._behind()
        if behind and all(rank != self.rank for rank, _ in behind):
            return f"{self._me(now)} waited {seconds:.0f} s ({limit}) for {_and(behind)}"
        hint = "a higher train.timeout gives it longer; the stacks above show where it stands"
        others = [item for item in behind if item[0] != self.rank]
        beside = f", as far as {_and(others)}" if others else ""
        return f"{self._me(now)} took {seconds:.0f} s{beside} ({limit}): {hint}"

    def _behind(self) -> list[tuple[int, str]]:
        """The processes that hold up the others, each with what it does: silent ones, else those of the earliest
        phase, and of these the ones that wait in no collective. Empty where the store cannot be read."""
        if self.board is None:
            return [(self.rank, "")]
        try:
            earlier = self.board.entries()
            for _ in range(3):  # as long as any process needs for a beat; the own ones go on, for others look, too
                time.sleep(_BEAT)
                self._beat(self._open[-1])
            entries = self.board.entries()
        except (*_STORE_GONE, IndexError):  # no phase is open any more
            return []

        def order(rank: int) -> tuple[bool, int, bool]:
            silent = rank != self.rank and entries[rank].get("beat") == earlier[rank].get("beat")
            return not silent, entries[rank].get("number", 0), entries[rank].get("waiting", False)

        least = min(order(rank) for rank in entries)
        return [(rank, _doing(entry, not least[0])) for rank, entry in entries.items() if order(rank) == least]

    def _tell(self, error: Exception) -> None:
        """Makes an error the first cause of the run, unless there is one already: then it gets that as a note."""
        now = self._open[-1]
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        text = f"rank {self.rank} failed in phase {now.name!r} of step {now.step}: {said}"
        first = {"rank": self.rank, "text": text, "code": FAILED}
        if self.board is not None:
            with suppress(*_STORE_GONE):
                first = self._first_cause(error, first)
            if first["text"] != text:
                error.add_note(f"first cause: {first['text']}")
        record_cause(first["text"])

    def _first_cause(self, error: Exception, own: dict[str, Any]) -> dict[str, Any]:
        assert self.board is not None
        if _connection_lost(error):
            gone = [] if self.board.first() else [item for item in self._behind() if "without a sign" in item[1]]
            if gone and self.board.first() is None:
                own = own | {"rank": gone[0][0], "text": f"{_and(gone)}: it was killed, or its machine is gone"}
        return self.board.fail(own)

    def _end(self, line: str, code: int, stacks: bool = True) -> None:
        """Says why and ends the process at once: what hangs cannot be asked to clean up."""
        first = {"rank": self.rank, "text": line, "code": code}
        if self.board is not None:
            with suppress(*_STORE_GONE):
                first = self.board.fail(first)
        record_cause(first["text"])
        if stacks:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        restore_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
        print(f"{restore_cursor}error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


class _Board:
    """One entry per process and the first failure of the run, in the launcher's store."""

    _made = itertools.count()  # trainers are made in the same order on every process

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(host, port, None, False, timedelta(seconds=10), wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = distributed.PrefixStore(f"mmft/watchdog/{attempt}/{next(self._made)}", store)

    def say(self, entry: dict[str, Any]) -> None:
        self._store.set(str(self.rank), json.dumps(entry))

    def entries(self) -> dict[int, dict[str, Any]]:
        """What each process said last; empty for one that has said nothing yet."""
        ranks = range(self.world)
        return {i: json.loads(self._store.get(str(i))) if self._store.check([str(i)]) else {} for i in ranks}

    def fail(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Makes this the first failure, unless there is one; returns the one there is."""
        return json.loads(self._store.compare_set("first", "", json.dumps(entry)))

    def first(self) -> dict[str, Any] | None:
        return json.loads(self._store.get("first")) if self._store.check(["first"]) else None


def _in_collective(thread: int) -> bool:
    """Whether a thread stands in a call of `torch.distributed`. The one in a backward pass cannot be seen."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_filename != distributed_c10d.__file__:
        frame = frame.f_back
    return frame is not None


def _connection_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it was made from, only says that another process is gone from a collective."""
    while error is not None:
        if isinstance(error, distributed.DistError):  # NCCL's, and those of the store
            return True
        if isinstance(error, RuntimeError) and "gloo" in str(error).lower():
            return True
        error = error.__cause__
    return False


def _doing(entry: dict[str, Any], silent: bool) -> str:
    if not entry:
        return "which has not begun"
    where = f"phase {entry['phase']!r} of step {entry['step']}"
    if silent:
        return f"which is without a sign of life since {where}"
    return f"which is in {where} since {entry['seconds']:.0f} s"


def _and(found: list[tuple[int, str]]) -> str:
    """Up to eight processes in words."""
    named = [f"rank {rank}, {doing}" for rank, doing in found[:8]]
    return "; ".join(named) + (f"; {len(found) - 8} more" if len(found) > 8 else "")


def record_cause(text: str) -> None:
    """Leaves the first cause where torchrun looks for it, to be the end of its report; the first one stays."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        data = {"message": {"message": redact(text), "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(data, file)

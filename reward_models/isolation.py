"""A reward function of your own in a child process, so that it may raise, hang or crash without harming the run.

The child is a fresh interpreter (never a fork: the parent may hold torch's threads), started with the parent's module
search path. Parent and child talk over a socket pair of their own, so printing is harmless: what the user's code
writes to stdout appears on stderr. Each call has a deadline; past it the child is killed with its whole process group.

Messages are pickles. That is safe here alone: both ends are this program, and nobody else can reach the pair.

Left out: killing what leaves the process group on purpose (`setsid`), and limits on memory.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reward_models.own import one_row, read_message, row_range, write_message

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from reward_models.own import run_child; run_child()"
_NAMED_ROWS = 8
_SEARCH = 4.0  # seconds in which a fresh process looks for the row that ended or held up another
_ENOUGH = 1.0  # of them, without an answer to a single row, that say something of that row
_MARKER = "REWARD_MODELS_CHILD"  # in the environment of the child and of what it starts


class Isolated:
    """The reward `module:name` or `path/to/file.py:name` in a child process of its own.

    `name` is a function (options are passed to every call) or a class (options go to its constructor, the instance is
    called); plain or `async`. It is given what any reward is given and may return the same things, pictures included.
    If it has `increments`, so has this object.

    timeout: seconds one call may take, the search for a failing row included. startup_timeout: seconds until the
    module has to be imported and the class built. Calls from several threads take turns.

    Raises ValueError at construction if the function cannot be loaded (with the end of the child's traceback), and if
    a column cannot be sent. A call raises RuntimeError if the function raises (naming the first row that raises by
    itself, found by scoring the rows one by one) or its process dies (naming exit code or signal), and TimeoutError
    past the deadline. After both, another child has four seconds to find the row that does the same by itself; it is
    named, too. The next call then starts a fresh child. `close()`, `with`, garbage collection and the end of the
    program all stop the child; if the program is killed, the kernel tells the child and it dies too (Linux).
    """

    def __init__(
        self,
        path: str,
        options: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        *,
        startup_timeout: float = 120.0,
    ) -> None:
        if _MARKER in os.environ:
            raise ValueError(
                f"reward {path!r}: a reward's child process cannot start another one; if this file makes its own "
                'Isolated when it is imported, put that under `if __name__ == "__main__":`'
            )
        source, _, attribute = path.rpartition(":")
        if not source or not attribute:
            raise ValueError(f"reward {path!r}: expected 'package.module:name' or 'path/to/file.py:name'")
        for what, seconds in (("timeout", timeout), ("startup_timeout", startup_timeout)):
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
                raise ValueError(f"reward {path!r}: {what} must be a positive number of seconds, got {seconds!r}")
        if source.endswith(".py"):  # fixed now: the working directory may change before a child is started again
            source = str(Path(source).resolve())
        self.path, self.options, self.timeout, self.startup_timeout = (
            path,
            dict(options or {}),
            timeout,
            startup_timeout,
        )
        self.__name__ = attribute
        self._target = f"{source}:{attribute}"
        self._lock = threading.Lock()
        self._process: _Process | None = None
        said = self._start()
        self.signature: str = said["signature"]
        if said["increments"]:
            self.increments = self._increments

    def __call__(self, prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> Any:
        """What the function returns for these rows, or one of the errors named above."""
        values, logged = self._ask("__call__", {"prompts": prompts, "completions": completions, **columns})
        if logged is None:
            return values
        from reward_models.rewards import Scored

        return Scored(values, logged)

    def _increments(self, pieces: Sequence[Sequence[str]], **columns: Any) -> list[np.ndarray]:
        values, _ = self._ask("increments", {"pieces": pieces, **columns})
        return [np.asarray(row, dtype=np.float64) for row in values]

    def close(self) -> None:
        """Stop the child. A later call starts another."""
        with self._lock:
            if self._process is not None:
                self._process.stop()
                self._process = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return _again, (self.path, self.options, self.timeout, self.startup_timeout)

    def __repr__(self) -> str:
        return f"Isolated({self.path!r}, {self.options!r}, timeout={self.timeout:g})"

    def _start(self) -> dict[str, Any]:
        process = _Process()
        deadline = time.monotonic() + self.startup_timeout
        try:
            process.send(pickle.dumps((self._target, self.options), protocol=5), deadline)
            state, said = process.receive(deadline)
        except TimeoutError:
            process.stop()
            raise ValueError(f"reward {self.path!r}: not loaded within {self.startup_timeout:g} s") from None
        except (EOFError, OSError):
            raise ValueError(f"reward {self.path!r}: its process {process.cause()} while loading") from None
        except BaseException:
            process.stop()
            raise
        if state != "ready":
            process.stop()
            raise ValueError(f"reward {self.path!r} cannot be loaded: {said}")
        self._process = process
        return said

    def _ask(self, method: str, columns: dict[str, Any]) -> tuple[Any, Any]:
        message = self._packed(method, columns)
        rows = row_range(columns)
        with self._lock:
            if self._process is None or not self._process.usable():
                self._start()
            process = self._process
            assert process is not None
            self._process = None  # put back only after a complete exchange: anything else leaves the two out of step
            deadline = time.monotonic() + self.timeout
            failure: str | None = None
            try:
                process.send(message, deadline)
                state, said = process.receive(deadline)
                if state == "raised":
                    failure, said = said, None
                    state, said = process.receive(deadline)
            except TimeoutError:
                process.stop()
                if failure is not None:
                    raise self._raised(failure, "no row found before the time limit", columns) from None
                raise TimeoutError(
                    f"reward {self.path!r}: no answer within {self.timeout:g} s for {_named(rows, columns)}; "
                    f"its process was stopped{self._suspect(method, columns)}"
                ) from None
            except (EOFError, OSError):
                cause = process.cause()
                if failure is not None:
                    raise self._raised(failure, f"its process {cause} in the search for the row", columns) from None
                raise RuntimeError(
                    f"reward {self.path!r}: its process {cause} on {_named(rows, columns)}"
                    f"{self._suspect(method, columns)}"
                ) from None
            except _OutOfStep:
                process.stop()
                raise RuntimeError(
                    f"reward {self.path!r}: its process answered an earlier call again, on {_named(rows, columns)}; "
                    "does it fork? It was stopped"
                ) from None
            except BaseException:  # such as Ctrl-C: the child is still busy with a call nobody waits for
                process.stop()
                raise
            self._process = process
        if failure is not None:
            where = "no row raises by itself" if said is None else _named([said], columns)
            raise self._raised(failure, where, columns)
        return said

    def _suspect(self, method: str, columns: dict[str, Any]) -> str:
        """The row that by itself ends a process, or gets no answer either; "" where none is found in time."""
        rows, deadline, began = row_range(columns), time.monotonic() + _SEARCH, None
        if len(rows) < 2:
            return ""
        process, i = _Process(), 0
        try:
            process.send(pickle.dumps((self._target, self.options), protocol=5), deadline)
            process.receive(deadline)
            for i in rows:
                began = time.monotonic()
                process.send(self._packed(method, one_row(columns, i)), deadline)
                if process.receive(deadline)[0] == "raised":
                    process.receive(deadline)
        except TimeoutError:
            seconds = 0.0 if began is None else time.monotonic() - began
            alone = _named([i], columns)
            return f"; {alone} alone got no answer in {seconds:.1f} s either" if seconds > _ENOUGH else ""
        except (EOFError, OSError):
            return "" if began is None else f"; {_named([i], columns)} does it alone: the process {process.cause()}"
        except _OutOfStep:
            return ""
        finally:
            process.stop()
        return ""

    def _raised(self, failure: str, where: str, columns: dict[str, Any]) -> RuntimeError:
        """The first line says all that matters; below it stands the end of the child's traceback."""
        said, _, details = failure.partition("\n")
        return RuntimeError(f"reward {self.path!r} raised ({where} of {len(row_range(columns))}): {said}\n{details}")

    def _packed(self, method: str, columns: dict[str, Any]) -> bytes:
        try:
            return pickle.dumps((method, columns), protocol=5)
        except Exception as error:
            for key, column in columns.items():
                try:
                    pickle.dumps(column, protocol=5)
                except Exception as cause:
                    raise ValueError(
                        f"reward {self.path!r}: column {key!r} cannot be sent to its process: {_line(cause)}"
                    ) from cause
            raise ValueError(f"reward {self.path!r}: columns cannot be sent to its process: {_line(error)}") from error


def _again(path: str, options: dict[str, Any], timeout: float, startup_timeout: float) -> Isolated:
    return Isolated(path, options, timeout, startup_timeout=startup_timeout)


class _OutOfStep(Exception):
    """An answer to another message than the last one."""


class _Process:
    """One child, the parent's end of the pair, and a pipe whose closing means that the parent is gone."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.sent = 0
        self.socket, other = socket.socketpair()
        watched, life = os.pipe()
        try:
            ends = [other.fileno(), watched]
            self.popen = subprocess.Popen(
                [sys.executable, "-u", "-X", "faulthandler", "-c", _CHILD, json.dumps(sys.path), *map(str, ends)],
                pass_fds=ends,
                env={**os.environ, _MARKER: "1"},
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,  # a process group of its own, to be killed as one
            )
        except BaseException:
            self.socket.close()
            os.close(life)
            raise
        finally:
            other.close()
            os.close(watched)
        self._finalizer = weakref.finalize(self, _kill, self.popen, self.socket, life, self.owner)

    def usable(self) -> bool:
        """False after it died between calls, and in a forked copy of the parent (which must not share the pair)."""
        alive = self.owner == os.getpid() and self.popen.poll() is None and not _dying(self.popen.pid)
        if not alive:
            self.stop()
        return alive

    def send(self, message: bytes, deadline: float) -> None:
        self.socket.settimeout(max(1e-3, deadline - time.monotonic()))
        self.sent += 1
        write_message(self.socket, message)

    def receive(self, deadline: float) -> tuple[str, Any]:
        """State and value of the answer to the last message. Raises _OutOfStep if it answers another."""

        def wait(sock: socket.socket) -> None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)

        answered, state, said = pickle.loads(read_message(self.socket, wait))
        if answered != self.sent:
            raise _OutOfStep
        return state, said

    def cause(self) -> str:
        """How it died; stops what is left of its group."""
        try:
            code: int | None = self.popen.wait(timeout=2)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        if code is None:
            return "closed its connection"
        if code < 0:
            names = {s.value: s.name for s in signal.Signals}
            return f"died (signal {-code}, {names.get(-code, 'unknown')})"
        return f"ended by itself (exit code {code})"

    def stop(self) -> None:
        self._finalizer()


def _kill(popen: subprocess.Popen[bytes], connection: socket.socket, life: int, owner: int) -> None:
    connection.close()
    os.close(life)
    if os.getpid() != owner:  # a fork of the parent: the child is not ours
        return
    try:
        os.killpg(popen.pid, signal.SIGKILL)  # the group outlives its leader while grandchildren run
    except (ProcessLookupError, PermissionError):
        pass
    try:
        popen.wait(timeout=5)
    except subprocess.TimeoutExpired:  # stuck in the kernel; nothing more can be done
        pass


def _dying(pid: int) -> bool:
    """Whether a process has been killed but cannot be waited for yet, because threads of it are still going down."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in b"ZX"
    except OSError:  # no /proc on this system, or the process is gone
        return False


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _named(rows: Sequence[int], columns: Mapping[str, Any]) -> str:
    ids = columns.get("id")
    known = isinstance(ids, Sequence) and not isinstance(ids, str) and len(ids) >= len(row_range(columns))
    names = [f"{i} (id {ids[i]!r})" if known else str(i) for i in rows[:_NAMED_ROWS]]  # type: ignore[index]
    more = f", … ({len(rows)} rows)" if len(rows) > _NAMED_ROWS else ""
    return ("row " if len(rows) == 1 else "rows ") + ", ".join(names) + more

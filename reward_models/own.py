"""Functions of your own: how one is found by its path, and the child process that runs it for `isolation.Isolated`.

The child knows the standard library and numpy; torch is imported only if the user's code does so.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = struct.Struct("!Q")
TRACEBACK_LINES = 12


def load_function(path: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The reward `module:name` or `file.py:name`, in this process.

    Options are bound to a function as keyword arguments; of a class, the instance made with them is returned.

    Raises ValueError naming the file or the nearest name, and what the import raises.
    """
    source, _, attribute = path.rpartition(":")
    if source.endswith(".py"):
        file = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file) if file.is_file() else None
        if spec is None or spec.loader is None:
            raise ValueError(f"no such file: {source}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise ValueError(f"{source} has no function {attribute!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if isinstance(function, type):
        function = function(**options)
        if not callable(function):
            raise ValueError(f"instances of {attribute} cannot be called; give the class a __call__")
        return function
    if not options:
        return function

    def bound(*args: Any, **columns: Any) -> Any:
        return function(*args, **columns, **options)

    bound.__name__ = bound.__qualname__ = f"{attribute}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    return bound


def read_message(connection: socket.socket, wait: Callable[[socket.socket], None] = lambda _: None) -> bytearray:
    """One message. `wait` is called before each read. EOFError if the other end is gone."""

    def exactly(count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            wait(connection)
            got = connection.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]
        return data

    return exactly(LENGTH.unpack(exactly(LENGTH.size))[0])


def row_range(columns: Mapping[str, Any]) -> range:
    column = columns.get("completions", columns.get("pieces"))
    return range(len(column) if column is not None else 0)


def run_child() -> None:
    """The child's whole life: load, then answer one message at a time until the parent closes the pair."""
    connection, watched = socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3])
    for end in (connection.fileno(), watched):
        os.set_inheritable(end, False)
    sys.argv[:] = ["reward"]
    _die_with_parent(watched)
    target, options = pickle.loads(read_message(connection))
    try:
        function = load_function(target, options)
    except BaseException as error:  # SystemExit at import too
        return _reply(connection, "failed", _told(error))
    signature = getattr(function, "signature", None)
    said = {"signature": signature and str(signature), "increments": callable(getattr(function, "increments", None))}
    _reply(connection, "ready", said)
    loop = asyncio.new_event_loop()  # one for all calls, so that an async reward may keep its connections open
    while True:
        try:
            message = read_message(connection)
        except (EOFError, ConnectionError):
            return
        call, columns = None, {}
        try:
            method, columns = pickle.loads(message)
            call = function if method == "__call__" else getattr(function, method)
            answer = _answer(call, columns, loop)
        except BaseException as error:
            _reply(connection, "raised", _told(error))
            _reply(connection, "row", call and _failing_row(call, columns, loop))
        else:
            _reply(connection, "values", answer)


def _die_with_parent(watched: int) -> None:
    """Have the kernel kill this process group when the parent's end of the pipe closes, whatever runs here then.

    A thread would have to wait for the interpreter's lock, which a hanging C extension may hold. PR_SET_PDEATHSIG
    fires when the *thread* of the parent that started this process ends. Elsewhere than on Linux, the child ends when
    it next reads from the parent.
    """
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(watched, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([watched], [], [], 0)[0]:  # gone already
            os._exit(1)


def _reply(connection: socket.socket, state: str, said: Any) -> None:
    message = pickle.dumps((state, said), protocol=5)
    connection.sendall(LENGTH.pack(len(message)) + message)


def _told(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    own = [i for i, line in enumerate(lines) if line.startswith("  File ") and __file__ not in line]
    return "\n".join(lines[max(own[0] if own else 0, len(lines) - TRACEBACK_LINES) :])


def _answer(call: Callable[..., Any], columns: dict[str, Any], loop: asyncio.AbstractEventLoop) -> tuple[Any, Any]:
    returned = call(**columns)
    if inspect.isawaitable(returned):
        returned = loop.run_until_complete(_awaited(returned))
    if isinstance(returned, tuple) and hasattr(returned, "logged"):
        return _plain(returned[0]), {key: _plain(column) for key, column in returned.logged.items()}
    return _plain(returned), None


async def _awaited(returned: Any) -> Any:
    return await returned


def _plain(value: Any) -> Any:
    """Numbers, None and text as they are, and lists of them: nothing that the parent would need to import.

    An array keeps its shape as an array, and what is no number becomes its `repr`, for the caller's checks to refuse.
    """
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().float().numpy()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "biuf":
        return value
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return [_plain(item) for item in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)


def _failing_row(call: Callable[..., Any], columns: dict[str, Any], loop: asyncio.AbstractEventLoop) -> int | None:
    rows = len(row_range(columns))
    if rows == 1:
        return 0
    for i in range(rows):
        one = {
            key: column[i : i + 1] if isinstance(column, (list, tuple, np.ndarray)) and len(column) == rows else column
            for key, column in columns.items()
        }
        try:
            _answer(call, one, loop)
        except BaseException:
            return i
    return None

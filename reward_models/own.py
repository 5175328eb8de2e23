"""Functions of your own: how one is found by its path, and the child process that runs it for `isolation.Isolated`.

The child knows the standard library and numpy; torch is imported only if the user's code does so.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import hashlib
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
import time
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = struct.Struct("!Q")
TRACEBACK_LINES = 12
_FILE = "reward_file_"  # before the stem of a file: the name of the module made from it
_GIVEN = ("self", "prompts", "completions")  # parameters that are no options


def load_function(path: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The reward `module:name` or `file.py:name`, in this process.

    Options are bound to a function as keyword arguments; of a class, the instance made with them is returned. What
    says no `signature` of its own gets that of `signature_of`.

    Raises ValueError naming the file, the nearest name or an option that is no named parameter (one that `**columns`
    would swallow is mistyped), and what the import raises.
    """
    source, _, attribute = path.rpartition(":")
    if source.endswith(".py"):
        file = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(f"{_FILE}{file.stem}", file) if file.is_file() else None
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
    check_options(attribute, function, options)
    if isinstance(function, type):
        made = function(**options)
        if not callable(made):
            raise ValueError(f"instances of {attribute} cannot be called; give the class a __call__")
        if not hasattr(made, "signature"):
            try:
                made.signature = signature_of(function, options)
            except AttributeError:  # __slots__
                pass
        return made
    if not options:
        return function

    def bound(*args: Any, **columns: Any) -> Any:
        return function(*args, **columns, **options)

    bound.__name__ = bound.__qualname__ = f"{attribute}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    said = getattr(function, "signature", None)
    signature = "|".join([str(said), *_listed(options)]) if said else signature_of(function, options)
    bound.signature = signature  # type: ignore[attr-defined]
    return bound


def check_options(attribute: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that a function, or the constructor of a class, has no parameter for."""
    try:
        names = parameters(function)
    except (TypeError, ValueError):  # written in C
        return
    for option in options:
        if option not in names:
            near = difflib.get_close_matches(option, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its named parameters are {', '.join(names) or 'none'}"
            raise ValueError(f"{attribute} has no option {option!r}; {hint}")


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Named parameters of a function, or of a class and those that its `**keywords` may reach by inheritance."""
    makers = [function]
    if isinstance(function, type):
        makers += [vars(base)["__init__"] for base in function.__mro__[:-1] if "__init__" in vars(base)]
    named: dict[str, inspect.Parameter] = {}
    for maker in makers:
        found = inspect.signature(maker).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named |= {p.name: p for p in found if p.kind in kinds and p.name not in named}
        if not any(p.kind is p.VAR_KEYWORD for p in found):
            break
    return {name: parameter for name, parameter in named.items() if name not in _GIVEN}


def signature_of(function: Any, options: Mapping[str, Any] | None = None) -> str:
    """`my_rewards.py:brief|limit:12|source:0f3a…`: where it is, its options, a hash of its source.

    Of an instance, the class stands for it. Without source at hand the code is hashed, without file names and line
    numbers; what is written in C has no hash. What the function calls or reads is not covered.
    """
    said = dict(options or {})
    while isinstance(function, functools.partial):
        said = {**{str(i): value for i, value in enumerate(function.args)}, **function.keywords, **said}
        function = function.func
    kind = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(kind, "__module__", None) or "?"
    module = f"{module.removeprefix(_FILE)}.py" if module.startswith(_FILE) else module
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        source = _code(kind)
    words = [f"{module}:{kind.__qualname__}", *_listed(said)]
    words += [f"source:{hashlib.sha256(source.encode()).hexdigest()[:12]}"] if source else []
    return "|".join(words).replace("\n", "\\n")


def _listed(options: Mapping[str, Any]) -> list[str]:
    return [f"{key}:{value}" for key, value in sorted(options.items())]


def _code(value: Any) -> str:
    """Instructions, names and constants of a function or of a class's methods; empty for what has none."""
    if isinstance(value, types.CodeType):
        constants = [_code(constant) or repr(constant) for constant in value.co_consts]
        return repr((value.co_code.hex(), value.co_names, value.co_varnames, constants))
    if isinstance(value, tuple | frozenset):  # a frozenset has no order of its own
        parts = [_code(part) or repr(part) for part in value]
        return repr(parts if isinstance(value, tuple) else sorted(parts))
    if isinstance(value, type):
        return "".join(f"{name}={code}" for name, member in sorted(vars(value).items()) if (code := _code(member)))
    return _code(value.__code__) if hasattr(value, "__code__") else ""


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


def write_message(connection: socket.socket, message: bytes) -> None:
    connection.sendall(LENGTH.pack(len(message)))
    connection.sendall(message)


def row_range(columns: Mapping[str, Any]) -> range:
    column = columns.get("completions", columns.get("pieces"))
    return range(len(column) if column is not None else 0)


def one_row(columns: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The columns of row i alone; what is no column stays."""
    rows = len(row_range(columns))
    return {
        key: column[i : i + 1] if isinstance(column, (list, tuple, np.ndarray)) and len(column) == rows else column
        for key, column in columns.items()
    }


def run_child() -> None:
    """The child's whole life: load, then answer one message at a time until the parent closes the pair."""
    connection, watched = socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3])
    for end in (connection.fileno(), watched):
        os.set_inheritable(end, False)
    sys.argv[:] = ["reward"]
    _die_with_parent(watched)
    pid, number = os.getpid(), 1  # number: of messages that came in; each answer carries it

    def reply(state: str, said: Any) -> None:
        if os.getpid() != pid:  # a fork that the reward made and let return: one answer is enough
            os._exit(0)
        write_message(connection, pickle.dumps((number, state, said), protocol=5))

    target, options = pickle.loads(read_message(connection))
    try:
        function = load_function(target, options)
    except BaseException as error:  # SystemExit at import too
        return reply("failed", _told(error))
    signature = getattr(function, "signature", None) or signature_of(function)
    said = {"signature": str(signature), "increments": callable(getattr(function, "increments", None))}
    reply("ready", said)
    loop = asyncio.new_event_loop()  # one for all calls, so that an async reward may keep its connections open
    while True:
        try:
            message = read_message(connection)
        except (EOFError, ConnectionError):
            return
        number += 1
        call, columns = None, {}
        try:
            method, columns = pickle.loads(message)
            call = function if method == "__call__" else getattr(function, method)
            answer = _answer(call, columns, loop)
        except BaseException as error:
            reply("raised", _told(error))
            reply("row", call and failing_row(call, columns, loop))
        else:
            reply("values", answer)


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


def _told(error: BaseException) -> str:
    """What was raised in one line, and below it the end of the traceback."""
    said = " ".join("".join(traceback.format_exception_only(error)).split())
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    own = [i for i, line in enumerate(lines) if line.startswith("  File ") and __file__ not in line]
    return "\n".join([said, *lines[max(own[0] if own else 0, len(lines) - TRACEBACK_LINES) :]])


def _answer(
    call: Callable[..., Any], columns: Mapping[str, Any], loop: asyncio.AbstractEventLoop | None
) -> tuple[Any, Any]:
    returned = call(**columns)
    if loop is not None and inspect.isawaitable(returned):
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
        value = value.detach().cpu().double().numpy()
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


def failing_row(
    call: Callable[..., Any],
    columns: Mapping[str, Any],
    loop: asyncio.AbstractEventLoop | None = None,
    seconds: float = float("inf"),
) -> int | None:
    """The first row that raises when it is scored by itself; None where none does, or none was found in this time."""
    rows, deadline = len(row_range(columns)), time.monotonic() + seconds
    if rows == 1:
        return 0
    for i in range(rows):
        if time.monotonic() > deadline:
            return None
        try:
            _answer(call, one_row(columns, i), loop)
        except BaseException:
            return i
    return None

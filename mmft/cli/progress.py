"""Progress of long work, on standard error and only for a terminal: `mmft … > file` and logs stay clean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mmft.cli import interrupts


class Advance(Protocol):
    def __call__(self, n: int = 1, label: str | None = None) -> None: ...


@contextmanager
def progress(total: int | None, label: str) -> Iterator[Advance]:
    """A bar that goes away when the work is done.

    Args:
        total: pieces of work; None = nobody knows, so that something merely moves.
        label: what is being done, such as "writing captions".

    Yields:
        ``advance(n, label)``: so many more pieces are done, and what is being done now, where that is another thing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    if total is not None:
        columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    # What is printed meanwhile goes above the bar, on standard error; unless results are sent to a file or a pipe.
    above = sys.stdout.isatty()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=above
    ) as bar:
        task = bar.add_task(label, total=total)

        def advance(n: int = 1, label: str | None = None) -> None:
            if interrupts.asked():  # and swallowed
                raise KeyboardInterrupt
            bar.update(task, advance=n, description=label)

        yield advance

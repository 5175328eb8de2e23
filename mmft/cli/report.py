"""`mmft report` and `mmft compare`: what runs came to, as pages for a browser (docs/report.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmft.cli.files import prepare

Open = Annotated[bool, typer.Option("--open", help="open the page in the browser")]


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")], open: Open = False) -> None:
    """Writes report.html of a run anew, and says what it says: finished, still training, or killed.

    Examples:
      mmft report runs/caption_ppo
    """
    from mmft.evaluation.report import headline_of, write_report

    path = write_report(run)
    print(headline_of(run).text)
    _show(path, open)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="run folders; the first is the measure")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the page (default: compare.html beside the first run)")
    ] = None,
    open: Open = False,
) -> None:
    """Lays runs side by side: held-out scores, paired differences, curves, recipes, captions.

    Examples:
      mmft compare runs/caption_ppo runs/caption_a2c
      mmft compare runs/caption_ppo runs/caption_a2c --output compare.html
    """
    from mmft.evaluation.compare import compare_runs, write_comparison

    prepare(output)
    comparison = compare_runs(runs)
    _table(comparison)
    _show(write_comparison(comparison, output or runs[0].resolve().parent / "compare.html"), open)


def _table(comparison) -> None:
    """The held-out scores on the terminal, and what cannot be compared."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mmft.evaluation.captioning import metric_info

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # 80 columns, the default in a file, would cut the table
    table = Table(title="Held-out, after training, 95 % intervals", title_justify="left")
    table.add_column("")
    first = comparison.names[0]
    for heading in [*comparison.names, *(f"{name} − {first}" for name in comparison.names[1:])]:
        table.add_column(escape(heading), justify="right")
    colours = {"good": "[green]", "bad": "[red]", "open": "[default]"}
    for row in comparison.rows:
        label = f"reward: {metric_info(row.name).label}" if "/" in row.name else metric_info(row.name).label
        changes = [
            f"{colours[state]}{difference}{f' ({span})' if span else ''}[/]"
            for difference, span, state in comparison.changes(row)
        ]
        table.add_row(escape(label), *(value for value, _, _ in comparison.cells(row)), *changes)
    console.print(table)
    for text in [*(verdict.text for verdict in comparison.verdicts), *comparison.notes]:
        console.print(text, markup=False, emoji=False, highlight=False)


def _show(path: Path, open_it: bool) -> None:
    print(path)
    if open_it:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())

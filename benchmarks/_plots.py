"""One style for the plots of all benchmarks. matplotlib is asked for only where a plot is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# mmft in blues, others in warm colours; whatever has no side of its own takes them in this order.
COLOURS = ("#2a6f97", "#61a5c2", "#c1121f", "#f4a261", "#6a994e", "#8d99ae", "#5e548e", "#bc6c25")


@contextmanager
def figure(file: Path, panels: int = 1, size: tuple[float, float] = (6.4, 3.6)) -> Iterator[Sequence[Any]]:
    """``panels`` axes side by side, each of ``size`` inches; saved as ``file`` (.png, .svg, .pdf) when the block ends.

    with figure(path) as (axes,):
        axes.plot(...)
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"axes.prop_cycle": pyplot.cycler(color=COLOURS), "font.size": 9, "legend.frameon": False}
    style |= {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.axisbelow": True, "svg.hashsalt": "mmft"}  # the same numbers give the same file
    with pyplot.rc_context(style):
        made, axes = pyplot.subplots(
            1, panels, figsize=(size[0] * panels, size[1]), layout="constrained", squeeze=False
        )
        try:
            yield list(axes[0])
            file.parent.mkdir(parents=True, exist_ok=True)
            made.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)
        finally:
            pyplot.close(made)


def stacked(axes: Any, bars: Mapping[str, Mapping[str, float]], xlabel: str) -> None:
    """Horizontal bars, one a line, made of named pieces in the order of the first: ``{bar: {piece: length}}``."""
    pieces = list(dict.fromkeys(name for bar in bars.values() for name in bar))
    left = dict.fromkeys(bars, 0.0)
    for piece in pieces:
        lengths = [bar.get(piece, 0.0) for bar in bars.values()]
        axes.barh(list(bars), lengths, left=list(left.values()), label=piece, height=0.62)
        left = {name: at + length for (name, at), length in zip(left.items(), lengths)}
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(xlabel)
    axes.legend(ncols=len(pieces), loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8, handlelength=1)

"""`mmft merge`: a trained adapter and its base model as one plain model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmft.cli.progress import progress


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, adapter, or user/name on the Hub")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new one")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="what the adapter stands on, where it cannot know")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="of the weights; auto = the base model's")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
    ] = False,
) -> None:
    """Folds an adapter into its base model: a folder for transformers alone, compared before it is kept.

    Examples:
      mmft merge runs/caption_ppo merged
      mmft merge runs/caption_ppo merged_small --dtype bfloat16
    """
    import torch

    # DeepSpeed, which transformers loads when it saves, would else say on the terminal that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from mmft.inference.merge import TOLERANCE
    from mmft.inference.merge import merge as fold

    with progress(None, "merging, loading again, comparing"):
        made = fold(run, folder, base=base, dtype=dtype, trust_remote_code=trust_remote_code)
    learned = f"; the adapter itself changed them by up to {made.changed:.2g}" if made.changed else ""
    size = sum(path.stat().st_size for path in made.folder.iterdir())
    print(f"{made.folder}: {size / 1e6:,.1f} MB, {made.dtype}")
    print(
        f"loaded again: {made.same} of {made.captions} greedy captions are the same; log-probs differ by at most "
        f"{made.difference:.1g} nats (allowed {TOLERANCE[made.dtype]:g}{learned})"
    )
    for note in made.notes:
        print(note)

"""`mmft evaluate`: what a model's captions of held-out pictures are worth (docs/evaluation.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmft.cli.files import prepare


def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="run folder, adapter, model, user/name, or predictions.json")
    ],
    data: Annotated[str | None, typer.Option(metavar="NAME", help="data set, card or folder (else the run's)")] = None,
    split: Annotated[str | None, typer.Option(help="part of the data (else the run's held-out one, or test)")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="the first so many pictures")] = None,
    references: Annotated[
        Path | None, typer.Option(metavar="FILE", help="COCO captions, for a file of predictions")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="pictures without references, to send the captions in")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="else all that can be computed here; docs/evaluation.md")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="another source: differences, intervals, p values")
    ] = None,
    slice_by: Annotated[
        list[str] | None, typer.Option("--slice", metavar="COLUMN", help="scores by a column; may be repeated")
    ] = None,
    method: Annotated[
        Literal["greedy", "beam", "sample", "best-of"] | None, typer.Option(help="how words are chosen (greedy)")
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="beams, or draws (beam 4, sample 1, best-of 8)")] = None,
    temperature: Annotated[float | None, typer.Option(help="of draws (1.0)")] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="NAME", help="what best-of chooses by; 'run' is the run's own reward")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="length, in tokens at most")] = None,
    prompt: Annotated[str | None, typer.Option(help="instead of the one it was trained with")] = None,
    seed: Annotated[int | None, typer.Option(help="of draws (0)")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="what an adapter stands on, where it cannot know")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
    ] = False,
    clip: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="a CLIP model: is the caption like the picture?")
    ] = None,
    objects: Annotated[
        Path | None, typer.Option(metavar="FILE", help="objects for the CHAIR metrics: word, synonym, … a line")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="leave out pictures without a prediction")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="for predictions and scores (else a folder in the run's)")
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the scores there, too")] = None,
) -> None:
    """Scores captions of held-out pictures, with intervals, and writes them as the COCO server takes them.

    Examples:
      mmft evaluate runs/caption_ppo
      mmft evaluate runs/caption_ppo --against scenes-vlm --slice background
      mmft evaluate runs/caption_ppo --method sample --num 5 --rows 100
      mmft evaluate predictions.json --references captions.json
    """
    writing = {"method": method, "num": num, "temperature": temperature, "max_new_tokens": max_new_tokens}
    writing |= {"reward": reward, "prompt": prompt, "seed": seed}
    prepare(file)
    from mmft.cli.progress import progress
    from mmft.inference.evaluate import evaluate as score
    from mmft.inference.evaluate import usual_folder

    found = score(
        source,
        data,
        split=split,
        rows=rows,
        references=references,
        pictures_in=pictures,
        metrics=None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()],
        against=against,
        slice_by=slice_by or (),
        base=base,
        trust_remote_code=trust_remote_code,
        clip=clip,
        objects=objects,
        allow_missing=allow_missing,
        output=output or usual_folder,
        progress=progress,
        **{name: value for name, value in writing.items() if value is not None},
    )
    print(found.table())
    if found.folder:
        print(f"\nwritten to {found.folder}")
    if file:
        file.write_text(json.dumps(found.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

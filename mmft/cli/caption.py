"""`mmft caption`: what a trained model says of pictures."""

from __future__ import annotations

import gc
import json
import mimetypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmft.cli.files import prepare

_TOGETHER = 16  # files between one line of output and the next


def caption(
    pictures: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE…", help="files, or folders of them; clips and sounds if it knows them"),
    ],
    model: Annotated[
        str, typer.Option(metavar="SOURCE", help="run folder, adapter, user/name on the Hub, or a model")
    ] = "scenes-vlm",
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="what an adapter stands on, where it cannot know")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="instead of the one it was trained with")] = None,
    method: Annotated[
        Literal["greedy", "beam", "sample", "best-of"], typer.Option(help="how words are chosen")
    ] = "greedy",
    num: Annotated[int | None, typer.Option(min=1, help="beams, or draws (beam 4, sample 1, best-of 8)")] = None,
    temperature: Annotated[float, typer.Option(help="of draws")] = 1.0,
    reward: Annotated[
        str | None, typer.Option(metavar="NAME", help="what best-of chooses by: a reward, or file.py:function")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="length, in tokens at most")] = None,
    seed: Annotated[int, typer.Option(help="of draws")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
    ] = False,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the captions there, too")] = None,
) -> None:
    """Writes captions of pictures, one line each: file, colon, caption.

    What cannot be read is named on standard error, the rest is captioned all the same, and the exit code is 1.

    Examples:
      mmft caption photos/images
      mmft caption photos/images --model runs/caption_ppo --method beam --json captions.json
      mmft caption photos/images/0.jpg --model runs/caption_ppo --method sample --num 5
    """
    files = _files(pictures)
    prepare(file)
    options = {"method": method, "num": num, "temperature": temperature, "max_new_tokens": max_new_tokens}
    options |= {"prompt": prompt, "reward": reward, "seed": seed}
    gc.disable()  # imports make a million objects, all of which stay: looking through them takes a fifth of the time
    try:
        from mmft.cli.progress import progress
        from mmft.inference.captioner import Captioner

        captioner = Captioner(model, base=base, trust_remote_code=trust_remote_code)
    finally:
        gc.freeze()  # and in looking through them later, at the end of the process above all
        gc.enable()
    lines: list[dict[str, str]] = []
    captioner.write([], **options)  # what is wrong with the options is no fault of any picture
    with progress(len(files), "writing captions") as advance:
        for start in range(0, len(files), _TOGETHER):
            found = _captions(captioner, files[start : start + _TOGETHER], options)
            for line in found:
                if "caption" in line:
                    print(f"{line['file']}: {line['caption']}", flush=True)
                else:
                    print("error:", line["error"], file=sys.stderr)
            lines += found
            advance(min(_TOGETHER, len(files) - start))
    if file:
        file.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if failed := sum("error" in line for line in lines):
        raise typer.Exit(2 if failed == len(lines) else 1)


def _captions(captioner: Any, files: Sequence[str], options: dict[str, Any]) -> list[dict[str, str]]:
    """``{"file", "caption"}`` for each caption, ``{"file", "error"}`` for each file that cannot be used."""
    try:
        texts = captioner.write(captioner.rows(files), **options).texts
    except ValueError as error:
        if len(files) == 1:
            return [{"file": files[0], "error": str(error)}]
        return [line for file in files for line in _captions(captioner, [file], options)]
    each = len(texts) // len(files)
    return [{"file": files[i // each], "caption": text} for i, text in enumerate(texts)]


def _files(given: Sequence[str]) -> list[str]:
    """The files, and in place of a folder the pictures in it, by name. ValueError for a folder without any."""
    found: list[str] = []
    for name in given:
        if not Path(name).is_dir():
            found.append(name)
            continue
        inside = next((own for own in map(_pictures_in, (Path(name), Path(name) / "images")) if own), None)
        if inside is None:
            raise ValueError(f"{name} holds no pictures; expected files such as .jpg and .png in it, or in images/")
        found += map(str, inside)
    return found


def _pictures_in(folder: Path) -> list[Path]:
    kinds = ("image/", "video/", "audio/")
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if (mimetypes.guess_type(path.name)[0] or "").startswith(kinds) and path.is_file()]

"""Evaluation of a run, an adapter, a model or a file of predictions: scores, files for the COCO server, comparisons.

evaluate("runs/caption_ppo")                                        # on its own held-out split
evaluate("runs/caption_ppo", against="scenes-vlm")                  # is it better, and is that sure?
evaluate("predictions.json", references="captions.json")            # what another program wrote
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmft.evaluation.clip import expect_clip
from mmft.evaluation.coco_files import write_predictions
from mmft.evaluation.scores import Captioned
from mmft.evaluation.slices import groups_of
from mmft.evaluation.suite import SUITE, known, score
from mmft.inference.evaluation_captions import (
    DRAWN,
    Captions,
    Progress,
    Reader,
    expect,
    is_predictions,
    opened,
    rewards_to_choose_by,
)
from mmft.inference.evaluation_pictures import Pictures, first, from_file, from_folder, from_rows, rows_for
from mmft.inference.evaluation_result import FILES, Evaluation, Side

if TYPE_CHECKING:
    from mmft.inference.captioner import Captioner


@contextmanager
def _silent(total: int, label: str) -> Iterator[Callable[[int], Any]]:
    yield lambda n: None


def evaluate(
    source: str | Path | Captioner,
    data: Any = None,
    *,
    split: str | None = None,
    rows: int | None = None,
    references: str | Path | None = None,
    pictures_in: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    against: str | Path | Captioner | None = None,
    slice_by: Sequence[str] = (),
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    clip: str | Path | None = None,
    objects: str | Path | None = None,
    allow_missing: bool = False,
    output: str | Path | Callable[[dict[str, Any]], str | Path | None] | None = None,
    progress: Progress = _silent,
    **writing: Any,
) -> Evaluation:
    """Scores captions of held-out pictures.

    Args:
        source: run folder, adapter, model (bundled name, folder, name on the Hub), `Captioner`, or a file of
            predictions in COCO's results format (``.json``).
        data: name, card, folder, or rows; None = the run's own, "scenes" for any other model.
        split: None = the run's held-out one on its own data, else "test".
        rows: the first so many; None = all, or the run's ``eval.rows`` on its own held-out split.
        references: COCO captions file, in place of ``data``, for a file of predictions.
        pictures_in: a folder of pictures without references, in place of ``data``: for a test split that keeps them.
        metrics: names in `mmft.evaluation.suite.SUITE`; None = all that can be computed here.
        against: another source for the same pictures.
        slice_by: columns of the data.
        base: the model that an adapter stands on.
        trust_remote_code: run Python code that comes with the models.
        clip: a CLIP model.
        objects: file of objects for the CHAIR metrics, one a line: a word, its synonyms, separated by commas.
        allow_missing: pictures without a prediction are left out.
        output: a folder to save everything in, or what makes it of the settings (`usual_folder`).
        writing: of `Captioner.write`: method, num, temperature, max_new_tokens, prompt, seed, and reward, which may be
            "run": the rewards of the source's recipe, for both sides.

    Raises:
        ValueError: whatever of this is missing, unknown or does not go together.
    """
    metrics = None if metrics is None else known(metrics)
    words = None if objects is None else read_objects(objects)
    _of_use([it for it in (source, against) if it is not None], writing, metrics, {"clip": clip, "objects": objects})
    if split is not None and (references is not None or pictures_in is not None):
        raise ValueError("--split: only a data set has splits; expected --data in place of --references or --pictures")
    _spare(output, source, against, references)
    if clip is not None:
        expect_clip(clip)
    main = opened(source, base, trust_remote_code)
    pictures = _pictures(main, data, split, rows, references, pictures_in)
    columns = pictures.columns(slice_by)
    groups = {name: groups_of(name, values) for name, values in columns.items()}  # before hours of captioning
    if not (isinstance(main, Path) or against is None or is_predictions(against)):
        writing.setdefault("max_new_tokens", main.max_new_tokens)  # both sides may write as much
    rewards = rewards_to_choose_by(main) if writing.get("reward") == "run" and not isinstance(main, Path) else None
    read = Reader(pictures, writing, data is not None, allow_missing, progress, rewards)
    other = Captions("", ()) if against is None else read(opened(against)) if is_predictions(against) else None
    if other is None and isinstance(against, str | Path):
        expect(against)
    sides = [read(main)]
    del main  # its memory, before the second one takes as much
    if against is not None:
        sides.append(other or replace(read, other_data=True)(opened(against, None, trust_remote_code)))
    kept = [i for i in range(len(pictures.ids)) if all(side.texts[i] is not None for side in sides)]
    if not kept:
        raise ValueError(f"no picture has a caption in both {sides[0].name} and {sides[-1].name}")
    settings = {"source": sides[0].name, "data": pictures.name} | ({} if rows is None else {"rows": rows})
    settings |= sides[0].settings
    output = output(settings) if callable(output) else output
    training = next((side.training for side in sides if side.training is not None), None)
    given = [side.given(pictures, kept, columns, training=training, objects=words, clip=clip) for side in sides]
    with _kept(output, given[0]):
        scored = [_scored(side.name, captions, metrics, progress) for side, captions in zip(sides, given, strict=True)]
        found = Evaluation(settings, *scored, groups=_among(groups, kept))
    if output is not None:
        found.folder = found.save(output)
    return found


def _scored(name: str, captions: Captioned, metrics: Sequence[str] | None, progress: Progress) -> Side:
    with progress(len(SUITE if metrics is None else metrics), f"scoring {name}") as advance:
        return Side(name, captions, score(captions, metrics, advance))


def _of_use(
    sources: Sequence[Any], writing: Mapping[str, Any], metrics: Sequence[str] | None, needed: Mapping[str, Any]
) -> None:
    """ValueError for options that would change nothing: somebody who gives them believes that they do.

    Args:
        needed: metric -> what it alone reads.
    """
    if writing and all(map(is_predictions, sources)):
        raise ValueError(f"{', '.join(writing)}: of no use for captions that are written already; expected a model")
    method = writing.get("method", "greedy")
    odd = [name for name in DRAWN if name in writing]
    if odd and method in ("greedy", "beam"):
        raise ValueError(f"{', '.join(odd)}: nothing is drawn by method {method!r}; expected 'sample' or 'best-of'")
    for name, value in needed.items():
        if value is not None and metrics is not None and name not in metrics:
            raise ValueError(f"--{name}: only the metric {name} reads it; expected it among --metrics")


def _spare(output: Any, *inputs: Any) -> None:
    """ValueError where saving would put other captions in the place of those that are read."""
    if not isinstance(output, str | Path):
        return
    written = {(Path(output) / name).resolve() for name in FILES}
    for file in (it for it in inputs if is_predictions(it)):
        if Path(file).resolve() in written:
            raise ValueError(f"--output {output}: {file} would be written over; expected another folder")


@contextmanager
def _kept(folder: str | Path | None, given: Captioned) -> Iterator[None]:
    """Captions are written before they are scored: what took hours must not be lost with a metric."""
    if folder is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "scores.json").unlink(missing_ok=True)  # of an evaluation before this one
    file = Path(folder) / "predictions.json"
    write_predictions(file, given.ids, given.captions)
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}. The captions are kept in {file}, and can be scored by themselves") from error


def _among(groups: Mapping[str, Mapping[str, np.ndarray]], kept: Sequence[int]) -> dict[str, dict[str, np.ndarray]]:
    """The groups with places among the pictures that are kept; without those of which none is."""
    return {
        column: {label: found for label, places in by.items() if len(found := np.flatnonzero(np.isin(kept, places)))}
        for column, by in groups.items()
    }


def usual_folder(settings: Mapping[str, Any]) -> Path | None:
    """Where an evaluation is kept: in the run, a folder for each split, number of rows that was asked for, and method;
    nowhere for a file of predictions.

    That of a model that is no run of ours lies in a folder ``evaluation`` where the user is.
    """
    source = settings["source"]
    if is_predictions(source):
        return None
    here = Path(source).expanduser()
    root = next((place for place in (here, here.parent) if (place / "recipe.yaml").is_file()), None)
    part = f"first{settings['rows']}" if "rows" in settings else None
    parts = [settings["data"].replace(", ", "-").strip("/."), part, settings["method"], settings.get("num")]
    name = "-".join(str(part) for part in ([] if root else [here.name]) + parts if part)
    return (root or Path()) / "evaluation" / re.sub(r"[^\w.-]+", "_", name)


def read_objects(path: str | Path) -> dict[str, list[str]]:
    """Word -> synonyms, from lines such as ``person, man, woman`` (the form of CHAIR's own list)."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected one object a line, with synonyms") from None
    words = [[word.strip().lower() for word in line.split(",") if word.strip()] for line in lines]
    found = {word[0]: word[1:] for word in words if word}
    if not found:
        raise ValueError(f"{path} names no object; expected one a line: a word, its synonyms, separated by commas")
    return found


def _pictures(
    main: Path | Captioner, data: Any, split: str | None, limit: int | None, references: Any, folder: Any
) -> Pictures:
    given = {"--data": data, "--references": references, "--pictures": folder}
    several = [name for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise ValueError(f"{' and '.join(several)} were both given; the pictures come from one of them")
    if isinstance(main, Path):
        if references is not None:
            return from_file(references).first(limit)
        if data is None:
            raise ValueError(f"{main}: what are these predictions held against? Give --references FILE, or --data NAME")
    elif references is not None:
        raise ValueError("--references goes with a file of predictions; a model needs the pictures: --data")
    elif folder is not None:
        return from_folder(folder, main.rows, limit)
    if data is not None and not isinstance(data, str | Path):
        rows = first(data, None if isinstance(main, Path) else limit)
        return from_rows(rows, "the rows given").first(limit)
    if isinstance(main, Path):
        return from_rows(*rows_for(None, str(data), split, None)).first(limit)
    return from_rows(*rows_for(main.recipe, None if data is None else str(data), split, limit))

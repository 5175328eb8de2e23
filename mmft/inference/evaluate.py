"""Evaluation of a run, an adapter, a model or a file of predictions: scores, files for the COCO server, comparisons.

evaluate("runs/caption_ppo")                                        # on its own held-out split
evaluate("runs/caption_ppo", against="scenes-vlm")                  # is it better, and is that sure?
evaluate("predictions.json", references="captions.json")            # what another program wrote
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmft.evaluation.scores import Captioned
from mmft.evaluation.slices import groups_of
from mmft.evaluation.suite import SUITE, known, score
from mmft.inference.evaluation_pictures import Pictures, first, from_file, from_rows, rows_for
from mmft.inference.evaluation_result import Evaluation, Side
from reward_models import DocumentFrequencies

if TYPE_CHECKING:
    from mmft.inference.captioner import Captioner

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], Any]]]  # total, label -> advance(n)
_DRAWS = {"temperature": 1.0, "seed": 0}  # of `Captioner.write`


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
    metrics: Sequence[str] | None = None,
    against: str | Path | Captioner | None = None,
    slice_by: Sequence[str] = (),
    base: str | Path | None = None,
    clip: str | Path | None = None,
    objects: str | Path | None = None,
    allow_missing: bool = False,
    output: str | Path | None = None,
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
        metrics: names in `mmft.evaluation.suite.SUITE`; None = all that can be computed here.
        against: another source for the same pictures.
        slice_by: columns of the data.
        base: the model that an adapter stands on.
        clip: a CLIP model.
        objects: file of objects for the CHAIR metrics, one a line: a word, its synonyms, separated by commas.
        allow_missing: pictures without a prediction are left out.
        output: a folder to save everything in.
        writing: of `Captioner.write`: method, num, temperature, max_new_tokens, prompt, seed, and reward, which may be
            "run": the rewards of the run's recipe.

    Raises:
        ValueError: whatever of this is missing, unknown or does not go together.
    """
    metrics = None if metrics is None else known(metrics)
    words = None if objects is None else read_objects(objects)
    if writing and all(is_predictions(it) for it in (source, against) if it is not None):
        raise ValueError(f"{', '.join(writing)}: of no use for captions that are written already; expected a model")
    main = _opened(source, base)
    pictures = _pictures(main, data, split, rows, references)
    columns = pictures.columns(slice_by)
    groups = {name: groups_of(name, values) for name, values in columns.items()}  # before hours of captioning
    read = _Reader(pictures, writing, data is not None, allow_missing, progress)
    sides = [read(main)]
    if against is not None:
        del main  # its memory, before the other one takes as much
        sides.append(read(_opened(against)))
    kept = [i for i in range(len(pictures.ids)) if all(side.texts[i] is not None for side in sides)]
    if not kept:
        raise ValueError(f"no picture has a caption in both {sides[0].name} and {sides[-1].name}")
    training = next((side.training for side in sides if side.training is not None), None)

    def scored(side: _Captions) -> Side:
        given = side.given(pictures, kept, columns, training=training, objects=words, clip=clip)
        with progress(len(SUITE if metrics is None else metrics), f"scoring {side.name}") as advance:
            return Side(side.name, given, score(given, metrics, advance))

    settings = {"source": sides[0].name, "data": pictures.name} | sides[0].settings
    found = Evaluation(settings, *map(scored, sides), groups=_among(groups, kept))
    if output is not None:
        found.save(output)
    return found


def _among(groups: Mapping[str, Mapping[str, np.ndarray]], kept: Sequence[int]) -> dict[str, dict[str, np.ndarray]]:
    """The groups with places among the pictures that are kept; without those of which none is."""
    return {
        column: {label: found for label, places in by.items() if len(found := np.flatnonzero(np.isin(kept, places)))}
        for column, by in groups.items()
    }


def is_predictions(source: Any) -> bool:
    """Whether a source is a file of captions, not a model."""
    return isinstance(source, str | Path) and str(source).endswith(".json")


def usual_folder(source: str | Path, found: Evaluation) -> Path | None:
    """Where an evaluation is kept: in the run, a folder for each split and method; nowhere for a file of predictions.

    That of a model that is no run of ours lies in a folder ``evaluation`` where the user is.
    """
    if is_predictions(source):
        return None
    here = Path(source).expanduser()
    root = next((place for place in (here, here.parent) if (place / "recipe.yaml").is_file()), None)
    parts = [found.settings["data"].replace(", ", "-"), found.settings["method"], found.settings.get("num")]
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


def _opened(source: str | Path | Captioner, base: str | Path | None = None) -> Path | Captioner:
    """A file of predictions, or a model ready to write."""
    if is_predictions(source):
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file; expected predictions as COCO's results format has them")
        return Path(source)
    if not isinstance(source, str | Path):
        return source
    from mmft.inference.captioner import Captioner

    return Captioner(source, base=base)


def _pictures(main: Path | Captioner, data: Any, split: str | None, limit: int | None, references: Any) -> Pictures:
    if references is not None:
        if not isinstance(main, Path):
            raise ValueError("--references goes with a file of predictions; a model needs the pictures: --data")
        if data is not None:
            raise ValueError("--references and --data were both given; the references come from one of them")
        return from_file(references).first(limit)
    if isinstance(main, Path) and data is None:
        raise ValueError(f"{main}: what are these predictions held against? Give --references FILE, or --data NAME")
    if data is not None and not isinstance(data, str | Path):
        rows = first(data, None if isinstance(main, Path) else limit)
        return from_rows(rows, "the rows given").first(limit)
    if isinstance(main, Path):
        return from_rows(*rows_for(None, str(data), split, None)).first(limit)
    return from_rows(*rows_for(main.recipe, None if data is None else str(data), split, limit))


@dataclass(frozen=True)
class _Captions:
    """What one source says of the pictures.

    texts: a caption each, or None; samples: several of each; ended: see `Captioned`; training: the document
    frequencies that a run left behind; settings: how the captions were written.
    """

    name: str
    texts: Sequence[str | None]
    samples: list[list[str]] | None = None
    ended: list[bool] | None = None
    training: DocumentFrequencies | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def given(
        self, pictures: Pictures, kept: Sequence[int], columns: Mapping[str, Sequence[Any]], **further: Any
    ) -> Captioned:
        """The captions of some pictures, with what is known of those."""
        claims = pictures.claims
        return Captioned(
            ids=[pictures.ids[i] for i in kept],
            captions=[self.texts[i] or "" for i in kept],
            references=[pictures.references[i] for i in kept],
            samples=None if self.samples is None else [self.samples[i] for i in kept],
            ended=None if self.ended is None else [self.ended[i] for i in kept],
            columns={name: [values[i] for i in kept] for name, values in columns.items()},
            claims=None if claims is None else lambda caption, place: claims(caption, kept[place]),
            picture=None if pictures.rows is None else lambda place: pictures.picture(kept[place]),
            **further,
        )


@dataclass(frozen=True)
class _Reader:
    """Gets the captions of the pictures out of a file or a model."""

    pictures: Pictures
    writing: dict[str, Any]
    other_data: bool  # than the model was trained on
    allow_missing: bool
    progress: Progress

    def __call__(self, source: Path | Captioner) -> _Captions:
        if isinstance(source, Path):
            return _Captions(str(source), self.pictures.predictions(source, self.allow_missing))
        name, training, options = source.source.name, _training(source), {"method": "greedy"} | self.writing
        if self.pictures.rows is None:
            raise ValueError(f"{name} needs the pictures to caption them: give --data in place of --references")
        if options["method"] in ("sample", "best-of"):
            options = _DRAWS | options
        if self.other_data and source.recipe is not None:
            options.setdefault("prompt", source.prompt)  # the one that it learned to answer; other data bring another
        settings = {key: value for key, value in options.items() if value is not None}
        if options.get("reward") == "run":
            options["reward"] = _reward_of(source, training)
        with self.progress(len(self.pictures.ids), f"captions by {name}") as advance:
            written = source.write(self.pictures.rows, **options, advance=advance)
        each = len(written.texts) // len(self.pictures.ids)
        groups = [written.texts[i : i + each] for i in range(0, len(written.texts), each)]
        texts, ended = [group[0] for group in groups], written.ended[::each]
        return _Captions(name, texts, groups if each > 1 else None, ended, training, settings)


def _training(source: Captioner) -> DocumentFrequencies | None:
    folder = Path(source.source.name).expanduser()
    for place in (folder, folder.parent):
        if source.recipe is not None and (file := place / "document_frequencies.npz").is_file():
            return DocumentFrequencies.load(file)
    return None


def _reward_of(source: Captioner, training: DocumentFrequencies | None) -> Any:
    if source.recipe is None or training is None:
        raise ValueError(f"reward 'run': {source.source.name} is no run folder, so it has no rewards to choose by")
    from mmft.training.run import rewards_of

    return rewards_of(source.recipe, training)

"""Who captions the pictures of an evaluation: a file of predictions, or a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmft.evaluation.scores import Captioned
from mmft.inference.evaluation_pictures import Pictures
from reward_models import DocumentFrequencies

if TYPE_CHECKING:
    from mmft.inference.captioner import Captioner

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], Any]]]  # total, label -> advance(n)
DRAWN = {"temperature": 1.0, "seed": 0}  # of `Captioner.write`


def is_predictions(source: Any) -> bool:
    """Whether a source is a file of captions, not a model."""
    return isinstance(source, str | Path) and str(source).endswith(".json")


def opened(
    source: str | Path | Captioner, base: str | Path | None = None, trust_remote_code: bool = False
) -> Path | Captioner:
    """A file of predictions, or a model ready to write."""
    if is_predictions(source):
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file; expected predictions as COCO's results format has them")
        return Path(source)
    if not isinstance(source, str | Path):
        return source
    from mmft.inference.captioner import Captioner

    return Captioner(source, base=base, trust_remote_code=trust_remote_code)


def expect(source: str | Path) -> None:
    """That a model is there, asked before another one writes for hours. Loads nothing."""
    from mmft.inference.source import find_source
    from mmft.vlm.load import resolve
    from mmft.vlm.model_files import own_file

    found = find_source(source)
    if own_file(resolve(found.model), "config.json") is None:
        raise ValueError(f"{source}: there is no such run, adapter or model here, and none on the Hub can be reached")


@dataclass(frozen=True)
class Captions:
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
class Reader:
    """Gets the captions of the pictures out of a file or a model."""

    pictures: Pictures
    writing: dict[str, Any]
    other_data: bool  # than those that the model was trained on, perhaps
    allow_missing: bool
    progress: Progress
    rewards: Any = None  # what reward "run" stands for; None = those of the model that writes

    def __call__(self, source: Path | Captioner) -> Captions:
        if isinstance(source, Path):
            return Captions(str(source), self.pictures.predictions(source, self.allow_missing))
        name, training, options = source.source.name, _training(source), {"method": "greedy"} | self.writing
        if self.pictures.rows is None:
            raise ValueError(f"{name} needs the pictures to caption them: give --data in place of --references")
        if options["method"] in ("sample", "best-of"):
            options = DRAWN | options
        if self.other_data and source.recipe is not None:
            options.setdefault("prompt", source.prompt)  # the one that it learned to answer; other data bring another
        settings = {key: value for key, value in options.items() if value is not None}
        if options.get("reward") == "run":
            options["reward"] = self.rewards or rewards_to_choose_by(source)
        with self.progress(len(self.pictures.ids), f"captions by {name}") as advance:
            written = source.write(self.pictures.rows, **options, advance=advance)
        each = len(written.texts) // len(self.pictures.ids)
        groups = [written.texts[i : i + each] for i in range(0, len(written.texts), each)]
        texts, ended = [group[0] for group in groups], written.ended[::each]
        return Captions(name, texts, groups if each > 1 else None, ended, training, settings)


def _training(source: Captioner) -> DocumentFrequencies | None:
    folder = Path(source.source.name).expanduser()
    for place in (folder, folder.parent):
        if source.recipe is not None and (file := place / "document_frequencies.npz").is_file():
            return DocumentFrequencies.load(file)
    return None


def rewards_to_choose_by(source: Captioner) -> Any:
    """The rewards of a run; ValueError for any other model."""
    training = _training(source)
    if source.recipe is None or training is None:
        raise ValueError(f"reward 'run': {source.source.name} is no run folder, so it has no rewards to choose by")
    from mmft.training.run import rewards_of

    return rewards_of(source.recipe, training)

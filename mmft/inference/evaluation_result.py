"""What an evaluation found, as text, as JSON, and as files that the COCO server takes."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mmft.evaluation import tables
from mmft.evaluation.coco_files import write_predictions, write_references
from mmft.evaluation.scores import Captioned, Scores, differences, slices

_LIBRARIES = ("mmft", "numpy", "torch", "transformers", "peft", "pycocoevalcap")
FILES = ("scores.json", "predictions.json", "predictions_against.json", "references.json", "per_image.jsonl")
_NEED_JAVA = ("meteor", "spice")  # what else was left out belongs to other data, or to options


@dataclass
class Side:
    """One source's captions of the pictures, and what the metrics say of them."""

    name: str
    given: Captioned
    scores: Scores


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        settings: what was evaluated, on what, how.
        side, other: the source, and what it is held against.
        scores, others: metric -> {"mean", "low", "high"} of either.
        difference: metric -> source minus other: {"mean", "low", "high", "relative", "p", "p_holm"}.
        groups: column -> value -> places of the pictures.
        slices: column -> value -> see `mmft.evaluation.scores.slices`.
        folder: where it was saved.
    """

    settings: dict[str, Any]
    side: Side
    other: Side | None = None
    groups: InitVar[Mapping[str, Mapping[str, np.ndarray]]] = MappingProxyType({})
    scores: dict[str, Any] = field(init=False)
    others: dict[str, Any] = field(default_factory=dict)
    difference: dict[str, Any] = field(default_factory=dict)
    slices: dict[str, Any] = field(init=False)
    folder: Path | None = None

    def __post_init__(self, groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self.scores = self.side.scores.summary()
        if self.other is not None:
            self.others = self.other.scores.summary()
            self.difference = differences(self.other.scores, self.side.scores)
        against = None if self.other is None else self.other.scores
        self.slices = {column: slices(self.side.scores, by, against) for column, by in groups.items()}

    def as_dict(self) -> dict[str, Any]:
        """What ``scores.json`` holds."""
        out: dict[str, Any] = {"settings": self.settings, "rows": len(self.side.given.ids), "scores": self.scores}
        if self.other is not None:
            out["against"] = {"source": self.other.name, "scores": self.others, "difference": self.difference}
        if self.slices:
            out["slices"] = self.slices
        found = self.side.scores
        return out | {"signatures": found.signatures, "left_out": found.left_out, "versions": _versions()}

    def table(self) -> str:
        """All of it for people."""
        told = ("source", "data", "rows")
        how = ", ".join(f"{key} {value}" for key, value in self.settings.items() if key not in told)
        number = len(self.side.given.ids)
        what = f"{number} picture{'s' * (number > 1)} of {self.settings['data']}"
        parts = [f"{what}; {how or 'captions as in the file'}"]
        if self.other is None:
            parts += [self.side.name, tables.score_table(self.scores)]
        else:
            parts.append(f"first: {self.side.name}, second: {self.other.name}")
            parts.append(tables.difference_table(self.scores, self.others, self.difference))
        metric = tables.headline(list(self.side.scores.sums))
        if metric in self.difference:
            parts.append(tables.verdict(metric, self.difference[metric]))
        parts += [
            f"by {column}\n{tables.slice_table(groups, metric)}" for column, groups in self.slices.items() if metric
        ]
        parts += self._notes()
        return "\n\n".join(parts)

    def _notes(self) -> list[str]:
        left_out = self.side.scores.left_out
        notes = [
            f"left out: {left_out[name]}" for name in _NEED_JAVA if name in left_out and any(self.side.given.references)
        ]
        if "reward" in self.settings:
            notes.append(
                "note: a reward chose among several captions. Where it reads the references, as CIDEr-D does, these "
                "scores are a ceiling, not what the model would reach by itself"
            )
        if self.side.given.samples is not None:
            notes.append("note: of several draws the first one is scored; self-CIDEr looks at all of them")
        return notes

    def save(self, folder: str | Path) -> Path:
        """``predictions.json`` and ``references.json`` as COCO has them, ``scores.json``, ``per_image.jsonl``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # those of an evaluation before this one
            (folder / name).unlink(missing_ok=True)
        given = self.side.given
        write_predictions(folder / "predictions.json", given.ids, given.captions)
        if any(given.references):
            write_references(folder / "references.json", given.ids, given.references)
        if self.other is not None:
            write_predictions(folder / "predictions_against.json", given.ids, self.other.given.captions)
        with (folder / "per_image.jsonl").open("w", encoding="utf-8") as file:
            for i in range(len(given.ids)):
                file.write(json.dumps(self._picture(i), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        # Comes last: where it is, the others belong to it.
        (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
        return folder

    def _picture(self, i: int) -> dict[str, Any]:
        """A line of ``per_image.jsonl``."""
        given = self.side.given
        line = {"image_id": given.ids[i], "caption": given.captions[i], "references": given.references[i]}
        if given.samples is not None:
            line["samples"] = given.samples[i]
        line["scores"] = _of_picture(self.side.scores, i)
        if self.other is not None:
            line["against"] = {
                "caption": self.other.given.captions[i],
                "scores": _of_picture(self.other.scores, i),
            }
        if given.columns:
            line["columns"] = {column: values[i] for column, values in given.columns.items()}
        return line


def _of_picture(scores: Scores, i: int) -> dict[str, float | None]:
    return {name: float(row[i]) if np.isfinite(row[i]) else None for name, row in scores.rows.items()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

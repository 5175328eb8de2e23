"""What a run folder says of its run, read with patience: a run may be unfinished, killed in mid-line or old."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.evaluation.curves import is_number
from mmft.recipe import RecipeError
from mmft.recipe.strict_yaml import load_document

RECIPE_LENGTH = 60_000
_FILES = ("metrics.jsonl", "samples.jsonl", "summary.json", "recipe.yaml")


@dataclass
class RunFiles:
    """A run folder.

    Attributes:
        metrics: lines of ``metrics.jsonl``, in the order of their steps.
        samples: lines of ``samples.jsonl``; all held-out rows where `every` is True, else some picked ones.
        summary: ``summary.json``, empty while the run goes on. Its sides hold intervals alone.
        alarms: what guards and diagnoses said.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    alarms: list[dict[str, Any]]
    recipe: str

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def every(self) -> bool:
        """Whether the samples are all held-out rows; shares over samples picked by their gain would mislead."""
        rows = self.summary.get("rows")
        return not is_number(rows) or len(self.samples) >= rows

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def shown_step(self) -> int | None:
        """The step after which the newest captions of the samples were written; None where nobody noted it."""
        step = self.samples[0].get("step") if self.samples else None
        return int(step) if is_number(step) else None

    def settings(self) -> dict[str, Any]:
        """The recipe as data; empty where there is none or it cannot be read."""
        try:
            return load_document(self.folder / "recipe.yaml").data
        except RecipeError:
            return {}


def read_run_files(folder: str | os.PathLike[str]) -> RunFiles:
    """Reads a run folder.

    Raises:
        ValueError: it is no folder, or none of a run's files is in it.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _FILES):
        what = "is no run folder" if folder.is_dir() else "does not exist" if not folder.exists() else "is no folder"
        raise ValueError(f"{folder} {what}; expected one that a recipe has written, with {', '.join(_FILES)}")
    recipe = folder / "recipe.yaml"
    summary = _object(folder / "summary.json")
    summary |= {side: _intervals(summary.get(side)) for side in ("before", "after", "difference") if side in summary}
    alarms = [line for line in _lines(folder / "alarms.jsonl") if line.get("text")]
    told = summary.get("alarms")
    return RunFiles(
        folder,
        [row for row in _lines(folder / "metrics.jsonl") if is_number(row.get("step"))],
        _lines(folder / "samples.jsonl"),
        summary,
        alarms or [a for a in (told if isinstance(told, list) else []) if isinstance(a, Mapping) and a.get("text")],
        recipe.read_text(encoding="utf-8", errors="replace")[:RECIPE_LENGTH] if recipe.is_file() else "",
    )


def _intervals(side: Any) -> dict[str, dict[str, Any]]:
    """Metric -> {"mean", ...}; a bare number stands for its mean, anything else is dropped."""
    found = {}
    for name, value in (side if isinstance(side, dict) else {}).items():
        if isinstance(value, dict):
            found[str(name)] = value
        elif is_number(value):
            found[str(name)] = {"mean": value}
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a half line at the end of a running file is no error."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

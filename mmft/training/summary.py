"""What a run came to, and has come to so far: ``summary.json``, ``samples.jsonl`` with pictures, the report."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmft.data.rows import columns_of
from mmft.evaluation.captioning import compare, summarise
from mmft.evaluation.findings import main_metric
from mmft.evaluation.report import write_report
from mmft.evaluation.word_credit import Increments, word_credit
from mmft.training.evaluate import Evaluation, text_row
from mmft.training.guards import Alarm
from mmft.vlm.media import media_of

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "trl", "datasets")
_FIRST, _EXTREME = 24, 12  # held-out samples kept with pictures: the first ones, the best gains, the worst regressions
_THUMBNAIL = 256  # longest side, pixels
_SHARE = 0.01  # of a run's time that reports may take while it goes on
_NO_COLUMNS = ("id", "prompt", "picture", "image", "images", "video", "audio", "references", "completion_ids")
_COLUMN_LENGTH = 60  # characters of a value that may tell kinds of pictures apart


def write_summary(
    run_dir: Path,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
    signatures: dict[str, str] | None = None,
    alarms: Sequence[Alarm] = (),
    rolled_back_to: int | None = None,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes ``summary.json``; returns its contents.

    Args:
        seconds: wall-clock time of the run.
        signatures: reward -> how exactly it is computed; those of the held-out metrics come with them.
        alarms: what the guards said.
        rolled_back_to: the step whose weights the run ended with, where a guard put them back.
        environment: as `environment_of`.
    """
    summary: dict[str, Any] = {"before": {}, "after": {}, "difference": {}}
    if before is not None and after is not None:
        summary = {
            "before": summarise(before.metrics),
            "after": summarise(after.metrics),
            "difference": compare(before.metrics, after.metrics),
            "rows": len(after.texts),
        }
    metrics = after.metrics if after is not None else {}
    summary |= {
        "seconds": round(seconds, 1),
        "signatures": {f"held-out {name}": text for name, text in getattr(metrics, "signatures", {}).items()}
        | {f"reward {name}": text for name, text in (signatures or {}).items()},
        "alarms": [alarm.as_dict() for alarm in alarms],
        "rolled_back_to": rolled_back_to,
        "environment": dict(environment or {}),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def environment_of(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Where a run ran, as far as it may be told to others: no names of machines or users."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


class LiveReport:
    """The held-out samples and the report of a run, written anew whenever there is something new to see.

    While the run goes on this takes no more than a hundredth of its time: a report that would take more is left out,
    and the next one has its news.

    Args:
        increments: metric -> the word by word form of it, for word credit; those of an evaluation come with it.
    """

    def __init__(self, run_dir: Path, dataset, increments: Mapping[str, Increments] | None = None):
        self.run_dir, self.dataset, self.increments = run_dir, dataset, dict(increments or {})
        self.seconds, self._usual = 0.0, 0.0  # spent here so far, and by the last report
        self._pictures: dict[int, str | None] = {}  # saved by this process; what lies there may be another run's
        self._began = time.perf_counter()
        self._unseen: tuple[Evaluation, Evaluation | None, int | None] | None = None

    def show(
        self, step: int, before: Evaluation | None, now: Evaluation | None = None, needed: bool = False
    ) -> str | None:
        """Writes ``samples.jsonl`` and ``report.html``; what went wrong in words, for a run outlives its report.

        Args:
            now: the newest evaluation, where there is one since the last call.
            needed: whatever it takes; the run ends here.
        """
        start = time.perf_counter()
        if before is not None and (now is not None or step == 0):
            self._unseen = before, now, step
        if not needed and self.seconds + self._usual > _SHARE * (start - self._began):
            return None
        problem = self._write()
        self._usual = time.perf_counter() - start
        self.seconds += self._usual
        return problem

    def _write(self) -> str | None:
        """Samples, where there are new ones, and the report; what went wrong in words."""
        try:
            if self._unseen is not None:
                self._write_samples(*self._unseen)
                self._unseen = None
            write_report(self.run_dir)
        except Exception as error:  # a full disk, a row that cannot be opened: nothing here is worth the run
            return f"no report: {type(error).__name__}: {error}"
        return None

    def finish(self, step: int | None, before: Evaluation | None, after: Evaluation | None) -> str | None:
        """Samples and report of the finished run, whose summary is written; what went wrong in words.

        Pictures that nothing shows any more go.
        """
        if before is not None and after is not None:
            self._unseen = before, after, step
        if problem := self._write():
            return problem
        kept = {name for name in self._pictures.values() if name}
        for path in (self.run_dir / "pictures").glob("*.jpg"):
            if str(path.relative_to(self.run_dir)) not in kept:
                path.unlink()
        return None

    def _write_samples(self, before: Evaluation, after: Evaluation | None, step: int | None) -> None:
        """One line per held-out sample; a picture and word credit for those that the report shows."""
        newest = after or before
        main = main_metric([name for name in newest.metrics if name in before.metrics])
        shown = set(range(_FIRST))
        if after is not None and main is not None:
            order = np.argsort(after.metrics[main] - before.metrics[main], kind="stable").tolist()
            shown |= {*order[-_EXTREME:], *order[:_EXTREME]}
        increments = (self.increments | getattr(newest.metrics, "increments", {})).get(main)
        (self.run_dir / "pictures").mkdir(exist_ok=True)
        self._pictures = {i: name for i, name in self._pictures.items() if i in shown}
        path = self.run_dir / "samples.jsonl"
        beside = path.with_name(f".{path.name}.part")
        with beside.open("w", encoding="utf-8") as file:
            for i in range(len(newest.texts)):
                row = text_row(self.dataset, i)
                line = {"id": str(row.get("id", i)), "step": step if after is not None else None}
                line |= {"picture": self._picture(i) if i in shown else None}
                columns = _columns(row | columns_of(self.dataset, i))
                line |= {"references": row.get("references", []), "columns": columns}
                for side, evaluation in (("before", before), ("after", after)):
                    line |= _side(side, evaluation, i)
                    if increments is not None and evaluation is not None and i in shown:
                        score = float(evaluation.metrics[main][i])
                        line[f"credit_{side}"] = word_credit(increments, evaluation.texts[i], line["references"], score)
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        os.replace(beside, path)

    def _picture(self, i: int) -> str | None:
        if i not in self._pictures:
            self._pictures[i] = _save_picture(self.dataset[i], self.run_dir / "pictures" / f"{i:05d}.jpg", self.run_dir)
        return self._pictures[i]


def _side(side: str, evaluation: Evaluation | None, i: int) -> dict[str, Any]:
    """The caption of one row and its scores, the reward's parts among them."""
    if evaluation is None:
        return {side: None, f"scores_{side}": {}}
    scores = {name: _number(values[i]) for name, values in (evaluation.metrics | evaluation.parts).items()}
    return {side: evaluation.texts[i], f"scores_{side}": scores}


def _columns(row: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What tells kinds of pictures apart: numbers and short text of the data's own columns; of lists their length."""
    found: dict[str, str | int | float] = {}
    for name, value in row.items():
        if name in _NO_COLUMNS or name.endswith("_id") or value is None:
            continue
        if isinstance(value, list | tuple):
            found[name] = len(value)
        elif isinstance(value, str | int) or (isinstance(value, float) and np.isfinite(value)):
            found[name] = value[:_COLUMN_LENGTH] if isinstance(value, str) else value
    return found


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _save_picture(row: dict[str, Any], path: Path, run_dir: Path) -> str | None:
    shown = (
        [row["image"]]
        if row.get("image")
        else row.get("images") or media_of(row, "?").get("video", [{}])[0].get("frames")
    )
    image = shown[len(shown) // 2] if shown else None  # of a clip its middle frame
    if image is None:
        return None
    image = image.convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(path, quality=88)
    return str(path.relative_to(run_dir))

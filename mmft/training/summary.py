"""What a run came to: ``summary.json`` and ``samples.jsonl`` with their pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mmft.evaluation.captioning import compare, summarise
from mmft.training.evaluate import Evaluation, text_row
from mmft.training.guards import Alarm
from mmft.vlm.media import media_of

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "trl", "datasets")
_FIRST, _EXTREME = 24, 12  # held-out samples kept with pictures: the first ones, the best gains, the worst regressions
_THUMBNAIL = 256  # longest side, pixels


def write_summary(
    run_dir: Path,
    dataset,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
    signatures: dict[str, str] | None = None,
    alarms: Sequence[Alarm] = (),
    rolled_back_to: int | None = None,
) -> dict[str, Any]:
    """Writes ``summary.json`` (and samples where there is an evaluation); returns its contents.

    Args:
        dataset: the held-out rows.
        seconds: wall-clock time of the run.
        signatures: reward -> how exactly it is computed; those of the held-out metrics come with them.
        alarms: what the guards said.
        rolled_back_to: the step whose weights the run ended with, where a guard put them back.
    """
    summary: dict[str, Any] = {"before": {}, "after": {}, "difference": {}}
    if before is not None and after is not None:
        summary = {
            "before": summarise(before.metrics),
            "after": summarise(after.metrics),
            "difference": compare(before.metrics, after.metrics),
            "rows": len(after.texts),
        }
        write_samples(run_dir, dataset, before, after)
    metrics = after.metrics if after is not None else {}
    summary |= {
        "seconds": round(seconds, 1),
        "signatures": {f"held-out {name}": text for name, text in getattr(metrics, "signatures", {}).items()}
        | {f"reward {name}": text for name, text in (signatures or {}).items()},
        "alarms": [alarm.as_dict() for alarm in alarms],
        "rolled_back_to": rolled_back_to,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def write_samples(run_dir: Path, dataset, before: Evaluation, after: Evaluation) -> None:
    """One line per held-out sample: references, before, after and both sides' scores; a picture for those shown."""
    main = next(iter(after.metrics))
    order = np.argsort(after.metrics[main] - before.metrics[main], kind="stable").tolist()
    shown = {*range(_FIRST), *order[-_EXTREME:], *order[:_EXTREME]}
    pictures = run_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    with (run_dir / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i in range(len(after.texts)):
            row = text_row(dataset, i)
            picture = _save_picture(dataset[i], pictures / f"{i:05d}.jpg", run_dir) if i in shown else None
            line = {"id": str(row.get("id", i)), "picture": picture, "references": row.get("references", [])}
            line |= {"before": before.texts[i], "after": after.texts[i]}
            for side, evaluation in (("scores_before", before), ("scores_after", after)):
                line[side] = {name: _number(values[i]) for name, values in evaluation.metrics.items()}
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


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

"""A run folder -> one self-contained ``report.html``: no network, no scripts, pictures inside.

Readable on a phone and in the dark. Everything that comes from a run (captions, references, recipe, names) is text to
the template, which escapes it; a model may well write ``<script>``.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from mmft.evaluation import curves, findings
from mmft.evaluation.captioning import metric_info
from mmft.evaluation.curves import Chart, is_number, series

SHOWN_FIRST, SHOWN_EXTREME = 12, 8  # pictures in the gallery: from the start, best gains, worst losses
PICTURE_SIDE = 320  # pixels
PICTURE_BYTES = 3_000_000  # of all pictures together, before base64 adds a third
TEXT_LENGTH = 500  # characters of a caption or reference
RECIPE_LENGTH = 60_000
_NOT_ON_CARDS = ("length", "bad_ending", "attribute_true", "attribute_total")  # the caption shows them itself
_RANK = {"good": "✓", "bad": "✗", "open": "·"}


@dataclass
class Card:
    """One held-out picture in the gallery."""

    id: str
    picture: str | None
    references: list[str]
    before: list[tuple[str, bool]]
    after: list[tuple[str, bool]]
    finished: bool
    scores: list[tuple[str, str, str]]


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` into a run folder; returns its path. A run that is not finished gives a shorter report.

    Raises:
        ValueError: `run_dir` is no folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is no run folder; expected one with metrics.jsonl, summary.json, samples.jsonl")
    metrics = [row for row in _read_lines(run_dir / "metrics.jsonl") if is_number(row.get("step"))]
    samples = _read_lines(run_dir / "samples.jsonl")
    recorded = _read_object(run_dir / "summary.json")
    scores = recorded if recorded.get("before") else recorded | findings.sample_summary(samples)
    scores = scores | {side: _intervals(scores.get(side)) for side in ("before", "after", "difference")}
    recipe = run_dir / "recipe.yaml"
    recipe_text = recipe.read_text(encoding="utf-8", errors="replace")[:RECIPE_LENGTH] if recipe.is_file() else ""
    main = findings.main_metric([n for n in scores["before"] if n in scores["after"]] or list(scores["before"]))
    name = _sample_key(main, samples)
    # Shares and groups over samples that were picked by their gain would mislead.
    rows = recorded.get("rows")
    every = samples if not is_number(rows) or len(samples) >= rows else []
    page = _template().render(
        title=run_dir.resolve().name,
        state=_state(metrics, recorded),
        headline=findings.headline(scores),
        honesty=findings.honesty(scores, metrics),
        where=findings.where(every, name) if name else [],
        words=findings.words_moved(every),
        rank=_RANK,
        table=_table(scores),
        charts=charts(metrics, scores),
        size=(curves.WIDTH, curves.HEIGHT, curves.LEFT, curves.RIGHT, curves.TOP, curves.BOTTOM),
        gallery=_gallery(run_dir, samples, name),
        metric=metric_info(name).label if name else "",
        recipe=recipe_text,
        signatures=_flat(recorded.get("signatures")),
        versions=_flat(recorded.get("versions")),
    )
    path = run_dir / "report.html"
    beside = path.with_name(".report.html.part")
    beside.write_text(page, encoding="utf-8", errors="replace")  # a lone surrogate must not cost the report
    os.replace(beside, path)
    return path


def charts(metrics: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[Chart]:
    """The curves of a run; those without a number are left out."""
    keys = list(dict.fromkeys(key for row in metrics for key in row))
    of = {key: series(metrics, key) for key in keys}
    draw = curves.chart
    found = [
        draw("Reward", [("mean", of.get("reward", []))], "Band: ± one standard deviation of a step.",
             band=of.get("reward_std")),
        *(draw(metric_info(k).label, [("mean", of[k])], "Part of the reward.")
          for k in keys if k.startswith("reward/")),
        *_held_out(metrics, scores, keys),
        draw("KL to the reference", [("nats per response", of.get("kl", []))]),
        draw("KL coefficient", [("kl_coef", of.get("kl_coef", []))]) if _varies(of.get("kl_coef")) else None,
        draw("Entropy", [("nats per token", of.get("entropy", []))]),
        draw("Explained variance of the critic", [("value", of.get("explained_variance", []))],
             "1 = knows the return, 0 = no better than a constant. Drawn at −1 where it is lower.", floor=-1.0),
        draw("Response length", [("tokens", of.get("response_length", []))]),
        draw("Responses that ended", [("share", of.get("ended_fraction", []))]),
        draw("Losses", [("policy", of.get("policy_loss", [])), ("value", of.get("value_loss", []))]),
        draw("Largest ratio", [("new / old", of.get("ratio_max", []))]),
        draw("Clipped tokens", [("share", of.get("clip_fraction", []))]),
        draw("Gradient norm", [("before clipping", of.get("grad_norm", []))]),
        draw("Learning rate", [("learning_rate", of.get("learning_rate", []))]) if _varies(of.get("learning_rate"))
        else None,
        draw("Throughput", [("tokens a second", of.get("tokens_per_second", []))]),
        draw("Time by phase", [(k.removeprefix("time/"), of[k]) for k in keys if k.startswith("time/")],
             "Seconds of a step, on top of each other.", stacked=True),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def _held_out(metrics, scores, keys: Sequence[str]) -> list[Chart | None]:
    """eval/<metric> over steps, between the scores before and after."""
    out = []
    last = max((row["step"] for row in metrics), default=0)
    for key in keys:
        if key.startswith("eval/"):
            name = key.removeprefix("eval/")
            points = series(metrics, key)
            ends = [(scores[side].get(name) or {}).get("mean") for side in ("before", "after")]
            start = [(0.0, ends[0])] if is_number(ends[0]) and points else []
            finish = [(float(last), ends[1])] if is_number(ends[1]) and points and points[-1][0] < last else []
            label = f"Held-out: {metric_info(name).label}"
            out.append(curves.chart(label, [("mean", start + points + finish)], marked=True))
    return out


def _varies(points: curves.Points | None) -> bool:
    return bool(points) and len({y for _, y in points if math.isfinite(y)}) > 1


def _table(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the before/after table."""
    before, after, difference = scores["before"], scores["after"], scores["difference"]
    rows = []
    for name in [*before, *(n for n in after if n not in before)]:
        info = metric_info(name)
        sides = [before.get(name) or {}, after.get(name) or {}]
        change = difference.get(name) or {}
        low, high, relative = change.get("low"), change.get("high"), change.get("relative")
        moved = is_number(low) and is_number(high) and (low > 0 or high < 0)
        state = ("good" if (low > 0) == (info.better > 0) else "bad") if moved and info.better else "open"
        mean = change.get("mean")
        if not is_number(mean) and all(is_number(side.get("mean")) for side in sides):
            mean = sides[1]["mean"] - sides[0]["mean"]
        rows.append(
            {
                "label": info.label,
                "state": state,
                "before": info.text(sides[0].get("mean")),
                "before_range": _range(info, sides[0]),
                "after": info.text(sides[1].get("mean")),
                "after_range": _range(info, sides[1]),
                "difference": info.text(mean, signed=True),
                "difference_range": _range(info, change, signed=True),
                "relative": findings.percent(relative) if is_number(relative) else "–",
            }
        )
    return rows


def _range(info, interval: Mapping[str, Any], signed: bool = False) -> str:
    low, high = interval.get("low"), interval.get("high")
    return f"{info.text(low, signed)} … {info.text(high, signed)}" if is_number(low) and is_number(high) else ""


def _gallery(run_dir: Path, samples: list[dict[str, Any]], name: str | None) -> list[tuple[str, list[Card]]]:
    """Titled groups of cards: biggest gains, worst losses, and the first ones, each picture once.

    A run may save fewer pictures than it scores; then only samples with a picture are shown.
    """
    samples = [s for s in samples if _picture_path(run_dir, s.get("picture"))] or samples
    better = (metric_info(name).better or 1) if name else 1
    gains = []
    for i, sample in enumerate(samples):
        old, new = findings.scores_of(sample, name) if name else (None, None)
        if is_number(old) and is_number(new) and new != old:
            gains.append((better * (new - old), i))
    gains.sort(key=lambda gain: (-gain[0], gain[1]))
    best = [i for gain, i in gains[:SHOWN_EXTREME] if gain > 0]
    worst = [i for gain, i in reversed(gains[-SHOWN_EXTREME:]) if gain < 0]
    used = {*best, *worst}
    first = [i for i in range(len(samples)) if i not in used][:SHOWN_FIRST]
    groups = [
        ("Biggest gains", best),
        ("Worst losses", worst),
        ("Not chosen: the first pictures of the set", first),
    ]
    budget = [PICTURE_BYTES]
    return [(title, [_card(run_dir, samples[i], budget) for i in chosen]) for title, chosen in groups if chosen]


def _card(run_dir: Path, sample: Mapping[str, Any], budget: list[int]) -> Card:
    before, after = (_clip(sample.get(side)) for side in ("before", "after"))
    old, new = sample.get("scores_before") or {}, sample.get("scores_after") or {}
    names = [n for n in dict.fromkeys([*old, *new]) if n not in _NOT_ON_CARDS][:6]
    scores = [
        (
            info.label.split(",")[0],
            *(info.text(side[n] if is_number(side.get(n)) else None) for side in (old, new)),
        )
        for n, info in ((n, metric_info(n)) for n in names)
    ]
    return Card(
        id=_clip(sample.get("id")),
        picture=_data_uri(run_dir, sample.get("picture"), budget),
        references=[_clip(r) for r in (sample.get("references") or [])[:8]],
        before=_marked(after, before),
        after=_marked(before, after),
        finished=sample.get("after") is not None,
        scores=scores,
    )


def _marked(other: str, text: str) -> list[tuple[str, bool]]:
    """Runs of words of `text`, True where `other` has no such words there."""
    mine, theirs = text.split(), other.split()
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, theirs, mine, autojunk=False).get_opcodes():
        if end > start:
            parts.append((" ".join(mine[start:end]), kind != "equal" and bool(theirs)))
    return parts


def _data_uri(run_dir: Path, name: Any, budget: list[int]) -> str | None:
    """A picture of the run folder as a small data URI; None when it is missing, unreadable or past the byte budget.

    Always encoded anew: whatever lies in the folder, only pixels get into the page.
    """
    path = _picture_path(run_dir, name)
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82)
    if buffer.tell() > budget[0]:
        return None
    budget[0] -= buffer.tell()
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture_path(run_dir: Path, name: Any) -> Path | None:
    """Where a sample's picture lies; None for none, and for paths that lead out of the run folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path = (run_dir / name).resolve()
    return path if path.is_relative_to(run_dir.resolve()) and path.is_file() else None


def _sample_key(main: str | None, samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The name under which samples carry the headline's metric."""
    names = list(dict.fromkeys(n for s in samples[:50] for n in (s.get("scores_before") or {})))
    short = (main or "").removeprefix("reward/")
    return next((n for n in (main, short, f"reward/{short}") if n in names), findings.main_metric(names))


def _state(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    steps = f"{int(metrics[-1]['step'])} steps" if metrics else "no steps yet"
    seconds = summary.get("seconds")
    if is_number(seconds):
        return f"{steps}, {seconds / 60:.1f} minutes in all"
    spent = sum(row["seconds"] for row in metrics if is_number(row.get("seconds")))
    return f"{steps}, {spent / 60:.1f} minutes of training" + ("" if summary.get("after") else "; not finished")


def _clip(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…"


def _intervals(side: Any) -> dict[str, dict[str, Any]]:
    """Metric -> {"mean", ...}; a bare number stands for its mean, anything else is dropped."""
    found = {}
    for name, value in (side if isinstance(side, dict) else {}).items():
        if isinstance(value, dict):
            found[str(name)] = value
        elif is_number(value):
            found[str(name)] = {"mean": value}
    return found


def _flat(versions: Any) -> list[tuple[str, str]]:
    return [(str(k), str(v)) for k, v in versions.items()] if isinstance(versions, dict) else []


def _read_lines(path: Path) -> list[dict[str, Any]]:
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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _template():
    environment = Environment(loader=PackageLoader("mmft.evaluation", "."), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    return environment.get_template("report.html.jinja")

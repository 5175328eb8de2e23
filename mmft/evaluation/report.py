"""A run folder -> one self-contained ``report.html``: no network, no scripts, pictures inside.

Readable on a phone and in the dark, while the run goes on and after it. Everything that comes from a run (captions,
references, recipe, names) is text to the templates, which escape it; a model may well write ``<script>``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from mmft.evaluation import curves, findings
from mmft.evaluation.captioning import METRICS, metric_info
from mmft.evaluation.charts import charts
from mmft.evaluation.curves import is_number
from mmft.evaluation.gallery import gallery, is_credited
from mmft.evaluation.groups import Group, groups_of
from mmft.evaluation.run_files import RunFiles, read_run_files

_MANY = 30  # kinds of pictures; a longer table is folded
RANK = {"good": "✓", "bad": "✗", "open": "·"}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` into a run folder; returns its path. A run that is not finished is shown as far as it is.

    Raises:
        ValueError: `run_dir` is no run folder.
    """
    run = read_run_files(run_dir)
    path = run.folder / "report.html"
    write_page(path, "report.html.jinja", **_contents(run))
    return path


def headline_of(run_dir: str | os.PathLike[str]) -> findings.Finding:
    """The report's sentence on a run: did it get better, by how much, how sure is that."""
    run = read_run_files(run_dir)
    return findings.headline(scores_of_run(run), None if run.finished else run.shown_step, run.finished)


def write_page(path: Path, template: str, **contents: Any) -> None:
    """Fills a template into a file, whole or not at all."""
    size = (curves.WIDTH, curves.HEIGHT, curves.LEFT, curves.RIGHT, curves.TOP, curves.BOTTOM)
    page = _templates().get_template(template).render(size=size, rank=RANK, **contents)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(page.replace("\0", "�"), encoding="utf-8", errors="replace")  # nor must a lone surrogate cost it
    os.replace(beside, path)


@lru_cache(maxsize=1)
def _templates() -> Environment:
    loader = PackageLoader("mmft.evaluation", ".")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def scores_of_run(run: RunFiles) -> dict[str, Any]:
    """before, after and difference: as the summary has them, and what else can be had from the samples; rows scored."""
    sampled, order = findings.sample_summary(run.samples) if run.every else {}, list(METRICS)
    found: dict[str, Any] = {}
    for side in ("before", "after", "difference"):
        scores = (sampled.get(side) or {}) | (run.summary.get(side) or {})
        names = sorted(scores, key=lambda name: order.index(name) if name in order else len(order))
        found[side] = {name: scores[name] for name in names}
    found["rows"] = run.summary.get("rows", sum(bool(s.get("scores_after")) for s in run.samples))
    if findings.too_few(found):
        found["difference"] = without_intervals(found["difference"])
    return found


def without_intervals(change: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Differences of so few pictures that only their means are worth a look."""
    return {name: {k: v for k, v in d.items() if k not in ("low", "high")} for name, d in change.items()}


def _contents(run: RunFiles) -> dict[str, Any]:
    """What the page is filled with."""
    scores = scores_of_run(run)
    step = None if run.finished else run.shown_step
    main = findings.main_metric([n for n in scores["before"] if n in scores["after"]] or list(scores["before"]))
    name = _sample_key(main, run.samples)
    every = run.samples if run.every else []  # shares and groups over picked samples would mislead
    checks = findings.checks(scores, run.metrics)
    groups = groups_of(every, name) if name else []
    moved = findings.moved_pictures(every, name) if name else None
    cards = gallery(run.folder, run.samples, name, "after" if step is None else f"after step {step}")
    return {
        "title": run.name,
        "state": _state(run),
        "headline": findings.headline(scores, step, run.finished),
        "short": findings.in_short(scores, checks, run.alarms, groups, moved, step),
        "warnings": findings.warnings(run.alarms, run.summary.get("rolled_back_to")),
        "checks": checks,
        "moved": moved,
        "groups": _group_rows(groups, name),
        "many_groups": len(groups) > _MANY,
        "words": findings.words_moved(every),
        "table": _table(scores),
        "charts": charts(run.metrics, scores),
        "gallery": cards,
        "credited": is_credited(cards),
        "metric": metric_info(name).label if name else "",
        "recipe": run.recipe,
        "signatures": _flat(run.summary.get("signatures")),
        "environment": _flat(run.summary.get("environment")),
        "versions": _flat(run.summary.get("versions")),
    }


def _table(scores: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Rows of the before/after table, under a title each: metrics, and the reward with its parts."""
    before, after, difference = scores["before"], scores["after"], scores["difference"]
    names = [*before, *(n for n in after if n not in before)]
    metrics = [n for n in names if not n.startswith("reward")] if any("/" not in n for n in names) else []
    rewards = [n for n in names if n not in metrics]
    rows = {n: _table_row(n, before.get(n) or {}, after.get(n) or {}, difference.get(n) or {}) for n in names}
    parts = [("", metrics), ("The reward and its parts" if metrics else "", rewards)]
    return [(title, [rows[n] for n in part]) for title, part in parts if part]


def _table_row(name: str, before: Mapping, after: Mapping, change: Mapping) -> dict[str, str]:
    info = metric_info(name)
    low, high, relative = change.get("low"), change.get("high"), change.get("relative")
    moved = is_number(low) and is_number(high) and (low > 0 or high < 0)
    mean = change.get("mean")
    if not is_number(mean) and all(is_number(side.get("mean")) for side in (before, after)):
        mean = after["mean"] - before["mean"]
    return {
        "label": f"{info.label} (part)" if "/" in name else info.label,
        "state": ("good" if (low > 0) == (info.better > 0) else "bad") if moved and info.better else "open",
        "before": info.text(before.get("mean")),
        "before_range": interval_text(info, before),
        "after": info.text(after.get("mean")),
        "after_range": interval_text(info, after),
        "difference": info.text(mean, signed=True),
        "difference_range": interval_text(info, change, signed=True),
        "relative": findings.percent(relative) if is_number(relative) else "–",
    }


def interval_text(info, interval: Mapping[str, Any], signed: bool = False) -> str:
    """ "low … high", empty where there is no interval."""
    low, high = interval.get("low"), interval.get("high")
    return f"{info.text(low, signed)} … {info.text(high, signed)}" if is_number(low) and is_number(high) else ""


def _group_rows(groups: Sequence[Group], name: str | None) -> list[tuple[str, list[dict[str, Any]]]]:
    """Groups of pictures as table rows, under the column that tells them apart."""
    if not groups or name is None:
        return []
    info = metric_info(name)
    return [
        (
            column,
            [
                {
                    "label": group.label[:60],
                    "size": group.size,
                    "before": info.text(group.before),
                    "after": info.text(group.after),
                    "difference": info.text(group.change["mean"], signed=True),
                    "range": interval_text(info, group.change, signed=True),
                    "state": group.state,
                }
                for group in members
            ],
        )
        for column, members in groupby(groups, key=lambda group: group.column)
    ]


def _sample_key(main: str | None, samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The name under which samples carry the headline's metric."""
    names = list(dict.fromkeys(n for s in samples[:50] for n in (s.get("scores_before") or {})))
    short = (main or "").removeprefix("reward/")
    return next((n for n in (main, short, f"reward/{short}") if n in names), findings.main_metric(names))


def _state(run: RunFiles) -> str:
    steps = f"{run.steps} steps" if run.metrics else "no steps yet"
    seconds = run.summary.get("seconds")
    if is_number(seconds):
        back = run.summary.get("rolled_back_to")
        kept = f"; the weights are those of step {back}, the best evaluated" if is_number(back) else ""
        return f"{steps}, {seconds / 60:.1f} minutes in all{kept}"
    planned = (run.settings().get("train") or {}).get("steps")
    if run.metrics and is_number(planned):
        steps = f"{run.steps} of {planned} steps"
    spent = sum(row["seconds"] for row in run.metrics if is_number(row.get("seconds")))
    when = f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"
    return f"{steps}, {spent / 60:.1f} minutes of training; not finished when this page was written ({when})"


def _flat(versions: Any) -> list[tuple[str, str]]:
    return [(str(k), str(v)) for k, v in versions.items()] if isinstance(versions, dict) else []

"""Several runs side by side -> one self-contained page, of the same kind as the report.

Differences are to the first run, paired over the held-out pictures that both were scored on. What cannot be compared
(other pictures, a metric that is computed otherwise, other rewards) is said, not compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.evaluation import captioning, curves, findings
from mmft.evaluation.captioning import metric_info
from mmft.evaluation.charts import SINGLE, held_out
from mmft.evaluation.curves import Chart, Points, is_number, series
from mmft.evaluation.findings import Finding
from mmft.evaluation.gallery import (
    PICTURE_BYTES,
    Caption,
    Card,
    card_scores,
    clip,
    credit_scale,
    data_uri,
    is_credited,
    picture_path,
    words_of,
)
from mmft.evaluation.groups import LEAST
from mmft.evaluation.report import interval_text, scores_of_run, without_intervals, write_page
from mmft.evaluation.run_files import RunFiles, read_run_files

MOST_RUNS = 6  # colours that can be told apart
_APART, _FIRST = 8, 8  # pictures shown: where the runs are furthest apart, and the first of the others
_UNCOMPARED = ("output.",)  # keys of a recipe that say where, not what

_OTHER_REWARDS = "The rewards of {} and {} are put together differently: their sums are no comparison."


@dataclass
class Row:
    """A metric of the table: what each run has, and what each run after the first has more than the first."""

    name: str
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    change: list[dict[str, Any]]


@dataclass
class Comparison:
    """Several runs; the first is what the others are compared with.

    Attributes:
        recipes: keys of the recipes whose values differ, with each run's value.
        notes: what cannot be compared, and what to know about the numbers.
    """

    runs: list[RunFiles]
    names: list[str]
    verdicts: list[Finding]
    rows: list[Row]
    recipes: list[tuple[str, list[str]]]
    notes: list[str]

    def cells(self, row: Row) -> list[tuple[str, str, str]]:
        """Each run's value of a metric in words: after, its interval, and where it came from."""
        info = metric_info(row.name)
        return [
            (
                info.text(after.get("mean")),
                interval_text(info, after),
                f"from {info.text(before['mean'])}" if is_number(before.get("mean")) else "",
            )
            for before, after in zip(row.before, row.after, strict=True)
        ]

    def changes(self, row: Row) -> list[tuple[str, str, str]]:
        """Each later run's difference to the first in words: the difference, its interval, good, bad or open."""
        info = metric_info(row.name)
        found = []
        for change in row.change:
            low, high = change.get("low"), change.get("high")
            sure = info.better and is_number(low) and is_number(high) and (low > 0 or high < 0)
            state = ("good" if (low > 0) == (info.better > 0) else "bad") if sure else "open"
            found.append((info.text(change.get("mean"), signed=True), interval_text(info, change, True), state))
        return found


def compare_runs(folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Reads runs and lays them side by side.

    Raises:
        ValueError: fewer than two folders, more than six, one twice, or one that is no run folder.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"{len(folders)} runs to compare; expected 2 to {MOST_RUNS}")
    runs = [read_run_files(folder) for folder in folders]
    resolved = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise ValueError(f"{runs[i].folder} is named twice; expected different runs")
    short = [run.name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run.folder) for run in runs]
    scores = [scores_of_run(run) for run in runs]
    notes = []
    for name, run, side in zip(names, runs, scores, strict=True):
        if not side["after"]:
            notes.append(f"{name} has no held-out result{'' if run.finished else ' yet'}.")
        elif not run.finished:
            notes.append(f"{name} is not finished: its captions are those of step {run.shown_step}.")
    paired: list[dict[str, Any]] = []
    for name, other in zip(names[1:], runs[1:], strict=True):
        change, said = _differences(runs[0], other, names[0], name)
        paired.append(change)
        notes += said
    metrics = list(dict.fromkeys(n for side in scores for n in side["after"]))
    for name, side in zip(names, scores, strict=True):
        if side["after"] and (absent := [_label(n) for n in metrics if n not in side["after"]]):
            notes.append(f"{name} was not scored by: {', '.join(absent)}.")
    rows = [
        Row(
            metric,
            [side["before"].get(metric) or {} for side in scores],
            [side["after"].get(metric) or {} for side in scores],
            [change.get(metric) or {} for change in paired],
        )
        for metric in metrics
    ]
    recipes = different_settings([run.settings() for run in runs])
    return Comparison(runs, names, _verdicts(names, rows), rows, recipes, notes)


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Writes the page; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    main = findings.main_metric([row.name for row in comparison.rows if any(row.after)])
    cards = _cards(comparison, main)
    write_page(
        path,
        "compare.html.jinja",
        title=" · ".join(comparison.names),
        names=comparison.names,
        verdicts=comparison.verdicts,
        notes=[Finding("open", note) for note in comparison.notes],
        rows=[(_label(row.name), comparison.cells(row), comparison.changes(row)) for row in comparison.rows],
        recipes=comparison.recipes,
        charts=overlaid(comparison),
        gallery=cards,
        metric=metric_info(main).label if main else "",
        credited=is_credited(cards),
    )
    return path


def _label(name: str) -> str:
    return f"{metric_info(name).label} (part of the reward)" if name.startswith("reward/") else metric_info(name).label


def _verdicts(names: Sequence[str], rows: Sequence[Row]) -> list[Finding]:
    """Per later run a sentence: is it better than the first in the main metric."""
    main = findings.main_metric([row.name for row in rows if any(row.change)])
    row = next((row for row in rows if row.name == main), None)
    if row is None:
        return []
    info, found = metric_info(row.name), []
    for name, change in zip(names[1:], row.change, strict=True):
        if not is_number(change.get("mean")):
            continue
        if not is_number(change.get("low")):
            what = f"{info.label}: {info.text(change['mean'], True)}"
            found.append(Finding("open", f"{name} and {names[0]} share too few pictures to tell them apart in {what}."))
            continue
        low, high = sorted((info.better or 1) * change[end] for end in ("low", "high"))
        state, verdict = ("good", "better than") if low > 0 else ("bad", "worse than") if high < 0 else (
            "open", "not clearly different from")  # fmt: skip
        text = (
            f"{name} is {verdict} {names[0]} in {info.label}: {info.text(change['mean'], True)}, "
            f"95 % interval {interval_text(info, change, True)}."
        )
        found.append(Finding(state, text))
    return found


def _differences(first: RunFiles, other: RunFiles, one: str, two: str) -> tuple[dict[str, Any], list[str]]:
    """Metric -> paired difference of the scores after training, and what cannot be compared."""
    mine, theirs = ({str(s.get("id")): s for s in run.samples if s.get("after") is not None} for run in (first, other))
    shared = [i for i in mine if i in theirs and mine[i].get("references") == theirs[i].get("references")]
    if not mine or not theirs:
        return {}, []
    if not shared:
        return {}, [f"{one} and {two} were scored on different pictures: their scores are no comparison."]
    notes = []
    if len(shared) < max(len(mine), len(theirs)):
        notes.append(
            f"Differences of {two} are over the {len(shared)} pictures that {one} was scored on, too; the scores of a "
            "run are over all of its own, and distinct word pairs are fewer among more captions."
        )
    here, there = (findings.columns_of([side[i] for i in shared], "scores_after") for side in (mine, theirs))
    here = {name: values for name, values in here.items() if name in there}
    alike = {key: first.settings().get(key) == other.settings().get(key) for key in ("data", "rewards")}
    # How it scores is written down at the end of a run; before, equal data and rewards are what can be known.
    if first.finished and other.finished:
        notes += _drop_incomparable(here, first, other, one, two)
    elif not alike["data"]:
        return {}, [*notes, f"Whether {one} and {two} are scored alike is known when both are finished: no comparison."]
    elif not alike["rewards"]:
        notes.append(_OTHER_REWARDS.format(one, two))
        here = {name: values for name, values in here.items() if not name.startswith("reward")}
    change = captioning.compare(here, there)
    return without_intervals(change) if len(shared) < LEAST else change, notes


def _drop_incomparable(scores: dict[str, Any], first: RunFiles, other: RunFiles, one: str, two: str) -> list[str]:
    """Takes out of the scores what the other run computes in another way; what that is, in words."""
    notes = []
    signatures = [run.summary.get("signatures") or {} for run in (first, other)]
    rewards = [
        (run.settings().get("rewards"), {k: v for k, v in said.items() if k.startswith("reward ")})
        for run, said in zip((first, other), signatures, strict=True)
    ]
    for name in list(scores):
        known = [s.get(f"held-out {name}") or s.get(name.replace("reward/", "reward ")) for s in signatures]
        known = [str(text).partition(": ")[2] or text for text in known]  # the weight of a part is no matter
        if name == "reward" and rewards[0] != rewards[1]:
            notes.append(_OTHER_REWARDS.format(one, two))
        elif known[0] != known[1]:
            notes.append(f"{_label(name)} is computed differently in {one} and {two}: no comparison.")
        else:
            continue
        del scores[name]
    return notes


def different_settings(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys of recipes whose values are not the same in all, with the values; a dash where a recipe has no such key."""
    flat = [dict(_flat(data)) for data in settings]
    keys = [k for k in dict.fromkeys(key for data in flat for key in data) if not k.startswith(_UNCOMPARED)]
    found = [(key, [_value(data[key]) if key in data else "–" for data in flat]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _flat(data: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(data, dict) and data:
        items = data.items()
    elif isinstance(data, list) and data:
        items = enumerate(data)
    else:
        return [(key, data)]
    return [pair for k, value in items for pair in _flat(value, f"{key}.{k}" if key else str(k))]


def _value(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else clip(value)


def overlaid(comparison: Comparison) -> list[Chart]:
    """Curves with a line per run, in the run's colour."""
    runs = comparison.runs
    evaluated = [held_out(run.metrics, scores_of_run(run)) for run in runs]
    keys = dict.fromkeys(key for run in runs for row in run.metrics for key in row)
    titles = {"reward": "Reward"} | {key: metric_info(key).label for key in keys if key.startswith("reward/")}
    titles |= {key: title for title, key, *_ in SINGLE if key not in ("kl_coef", "learning_rate")}
    notes, floors = {key: note for _, key, _, note, _ in SINGLE}, {key: floor for _, key, _, _, floor in SINGLE}

    def overlay(title: str, lines: Iterable[Points], *note: str, **options: Any) -> Chart | None:
        return curves.chart(title, list(zip(comparison.names, lines, strict=True)), *note, **options)

    names = dict.fromkeys(name for found in evaluated for name in found)
    drawn = [
        overlay(f"Held-out: {metric_info(name).label}", [found.get(name, []) for found in evaluated], marked=True)
        for name in names
    ]
    drawn += [
        overlay(title, [series(run.metrics, key) for run in runs], notes.get(key, ""), floor=floors.get(key))
        for key, title in titles.items()
    ]
    return [chart for chart in drawn if chart]


def _cards(comparison: Comparison, main: str | None) -> list[tuple[str, list[Card]]]:
    """Pictures that every run has captioned: those where the runs are furthest apart, and the first of the others."""
    by_run = [{str(s.get("id")): s for s in run.samples if s.get("after") is not None} for run in comparison.runs]
    shared = [i for i in by_run[0] if all(i in samples for samples in by_run)]
    shown = [i for i in shared if _picture_of(comparison, by_run, i)] or shared

    def spread(i: str) -> float:
        values = [(samples[i].get("scores_after") or {}).get(main) for samples in by_run]
        values = [value for value in values if is_number(value)]
        return max(values) - min(values) if len(values) > 1 else 0.0

    apart = [i for i in sorted(shown, key=spread, reverse=True)[:_APART] if spread(i) > 0]
    rest = [i for i in shown if i not in apart][:_FIRST]
    scale = credit_scale([samples[i].get("credit_after") for samples in by_run for i in [*apart, *rest]])
    budget = [PICTURE_BYTES]
    groups = [("Where the runs are furthest apart", apart), ("Not chosen: the first of the others", rest)]
    return [(t, [_card(comparison, by_run, i, budget, scale, main) for i in ids]) for t, ids in groups if ids]


def _card(comparison: Comparison, by_run: list, i: str, budget: list[int], scale: float, main: str | None) -> Card:
    samples, found = [run[i] for run in by_run], _picture_of(comparison, by_run, i)
    captions = [
        Caption(
            name,
            words_of(s.get("after"), samples[0].get("after") if k else None, s.get("credit_after"), scale, main),
            colour=k,
        )
        for k, (name, s) in enumerate(zip(comparison.names, samples, strict=True))
    ]
    return Card(
        id=clip(i),
        picture=data_uri(*found, budget) if found else None,
        references=[clip(r) for r in (samples[0].get("references") or [])[:8]],
        captions=captions,
        scores=card_scores([s.get("scores_after") or {} for s in samples]),
    )


def _picture_of(comparison: Comparison, by_run: list, i: str) -> tuple[Path, str] | None:
    """Folder and name of a picture, from the first run that kept it."""
    for run, samples in zip(comparison.runs, by_run, strict=True):
        name = samples[i].get("picture")
        if picture_path(run.folder, name):
            return run.folder, name
    return None

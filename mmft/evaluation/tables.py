"""The scores of an evaluation as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmft.evaluation.captioning import metric_info

_SURE = 0.05
_HEADLINES = ("CIDEr", "cider_d", "attribute_accuracy", "Bleu_4", "METEOR", "ROUGE_L")


def _label(name: str) -> str:
    """Beside the official CIDEr-D, that of training says what it is."""
    return "CIDEr-D, as in training" if name == "cider_d" else metric_info(name).label


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [("", "score", "95 % interval")]
    for name, score in scores.items():
        lines.append((_label(name), metric_info(name).text(score["mean"]), _interval(name, score)))
    return _aligned(lines)


def difference_table(
    scores: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, Any]],
) -> str:
    lines = [("", "first", "second", "first - second", "95 % interval", "p", "p (Holm)")]
    for name, score in scores.items():
        info = metric_info(name)
        line = [_label(name), info.text(score["mean"]), info.text(others.get(name, {}).get("mean"))]
        if found := differences.get(name):
            line += [info.text(found["mean"], signed=True), _interval(name, found, signed=True)]
            line += [_p(found["p"]), _p(found["p_holm"])]
        lines.append((*line, *[""] * (7 - len(line))))
    return _aligned(lines)


def verdict(name: str, difference: Mapping[str, Any]) -> str:
    """What a difference comes to, in words."""
    info = metric_info(name)
    size = info.text(abs(difference["mean"]))
    if difference["p_holm"] is None or difference["p_holm"] >= _SURE:
        return f"{_label(name)}: a difference of {size} may well be chance (p {_p(difference['p_holm'])}, corrected)."
    more, less = ("better", "worse") if info.better else ("higher", "lower")
    how = more if difference["mean"] * (info.better or 1) > 0 else less
    return (
        f"{_label(name)}: the first is {how} by {size} ({_interval(name, difference, signed=True)}); chance alone "
        f"would hardly do that (p {_p(difference['p_holm'])}, corrected)."
    )


def slice_table(groups: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """One metric of every slice."""
    kinds = {"scores": _label(name), "to_the_rest": "difference to the rest", "against": "first - second"}
    kinds = {kind: title for kind, title in kinds.items() if any(kind in group for group in groups.values())}
    lines = [["", "pictures", *(cell for title in kinds.values() for cell in (title, "95 % interval"))]]
    for label, group in groups.items():
        line = [label, str(group["rows"])]
        for kind in kinds:
            found = group.get(kind, {}).get(name)
            signed = kind != "scores"
            line += (
                [metric_info(name).text(found["mean"], signed), _interval(name, found, signed)] if found else ["–", "–"]
            )
        lines.append(line)
    return _aligned(lines)


def headline(names: Sequence[str]) -> str | None:
    """The metric that stands for all of them where there is room for one."""
    return next((name for name in _HEADLINES if name in names), names[0] if names else None)


def _interval(name: str, score: Mapping[str, Any], signed: bool = False) -> str:
    if score.get("low") is None:
        return "–"
    low, high = (metric_info(name).text(score[end], signed) for end in ("low", "high"))
    return f"{low} to {high}"


def _p(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart, the first one to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )

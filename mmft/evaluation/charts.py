"""Which curves a run has, of all that it logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmft.evaluation import curves
from mmft.evaluation.captioning import metric_info
from mmft.evaluation.curves import Chart, Points, is_number, series

# Scalars of a step with a chart of their own: title, key, label of the line, note, lowest value drawn.
SINGLE: tuple[tuple[str, str, str, str, float | None], ...] = (
    ("KL to the reference", "kl", "nats per response", "", None),
    ("KL coefficient", "kl_coef", "kl_coef", "", None),
    ("Entropy", "entropy", "nats per token", "", None),
    (
        "Explained variance of the critic",
        "explained_variance",
        "value",
        "1 = knows the return, 0 = no better than a constant. Drawn at −1 where it is lower.",
        -1.0,
    ),
    ("Response length", "response_length", "tokens", "", None),
    ("Responses that ended", "ended_fraction", "share", "", None),
    ("Repeated word pairs", "repetition", "share", "", None),
    ("Largest ratio", "ratio_max", "new / old", "", None),
    ("Clipped tokens", "clip_fraction", "share", "", None),
    ("Gradient norm", "grad_norm", "before clipping", "", None),
    ("Learning rate", "learning_rate", "learning_rate", "", None),
    ("Throughput", "tokens_per_second", "tokens a second", "", None),
)
_TRUE, _TOTAL = "eval/attribute_true", "eval/attribute_total"
_IF_VARIED = ("kl_coef", "learning_rate", "repetition", "clip_fraction")  # a flat line says nothing


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
        _shares(of),
        *(draw(f"Held-out: {metric_info(name).label}", [("mean", points)], marked=True)
          for name, points in held_out(metrics, scores).items()),
        *(draw(title, [(label, of.get(key, []))], note, floor=floor)
          for title, key, label, note, floor in SINGLE if key not in _IF_VARIED or varies(of.get(key))),
        draw("Losses", [("policy", of.get("policy_loss", [])), ("value", of.get("value_loss", []))]),
        draw("Time by phase", [(k.removeprefix("time/"), of[k]) for k in keys if k.startswith("time/")],
             "Seconds of a step, on top of each other.", stacked=True),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def _shares(of: Mapping[str, Points]) -> Chart | None:
    """How the parts of the reward divide its spread, where there are several."""
    lines = [(metric_info(k.removeprefix("share/")).label, of[k]) for k in of if k.startswith("share/")]
    return curves.chart("Which part moves the reward", lines, "Share of the spread.") if len(lines) > 1 else None


def held_out(metrics: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> dict[str, Points]:
    """Metric -> its evaluations over steps, between the scores before and after."""
    found = {}
    last = float(max((row["step"] for row in metrics), default=0))
    for key in dict.fromkeys(key for row in metrics for key in row):
        if not key.startswith("eval/") or key == _TOTAL:
            continue
        name, points = key.removeprefix("eval/"), series(metrics, key)
        if key == _TRUE:  # of all claims, not the mean of each caption's share
            totals, name = dict(series(metrics, _TOTAL)), "attribute_accuracy"
            points = [(x, y / totals[x]) for x, y in points if totals.get(x)]
        before, after = ((scores[side].get(name) or {}).get("mean") for side in ("before", "after"))
        start = [(0.0, before)] if is_number(before) and points else []
        finish = [(last, after)] if is_number(after) and points and points[-1][0] < last else []
        found[name] = start + points + finish
    return found


def varies(points: Points | None) -> bool:
    return bool(points) and len({y for _, y in points if math.isfinite(y)}) > 1

"""What a run shows, in plain sentences: did it get better, is the gain real, where is it worse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmft.evaluation.captioning import metric_info
from mmft.evaluation.curves import is_number
from mmft.evaluation.statistics import mean_interval, paired_bootstrap

MAIN_METRICS = ("cider_d", "reward/cider_d", "reward")  # the first one present carries the headline
BAD_ENDINGS = 0.01  # share of captions ending in a function word that counts as cheating
LENGTH_CHANGE = 0.20  # relative
VARIETY_LOSS = 0.20  # relative, of distinct word pairs
_LEAST_GROUP = 10  # rows below which a group says nothing


@dataclass
class Finding:
    """One sentence. state: good, bad, open (no answer in the numbers)."""

    state: str
    text: str


def main_metric(names: Sequence[str]) -> str | None:
    """The metric of the headline."""
    return next((name for name in MAIN_METRICS if name in names), names[0] if names else None)


def headline(summary: Mapping[str, Any]) -> Finding:
    """Did it get better, by how much, how sure is that."""
    before, after = summary.get("before") or {}, summary.get("after") or {}
    name = main_metric([name for name in before if name in after])
    if name is None:
        return Finding("open", "The run has no held-out result yet; what follows shows the training so far.")
    info, old, new = metric_info(name), before[name].get("mean"), after[name].get("mean")
    change = (summary.get("difference") or {}).get(name) or {}
    if not is_number(old) or not is_number(new):
        return Finding("open", f"Held-out {info.label} is not a number before or after training.")
    low, high = change.get("low"), change.get("high")
    relative = change.get("relative")
    if not is_number(relative):
        relative = (new - old) / abs(old) if old else None
    by = info.text(new - old, signed=True) + (f" or {percent(relative)}" if relative is not None else "")
    moved = f"Held-out {info.label} went from {info.text(old)} to {info.text(new)}, {by}."
    if not (is_number(low) and is_number(high)):
        return Finding("open", f"{moved} There is no interval, so this may be luck.")
    span = f"95 % interval of the difference: {info.text(low, True)} to {info.text(high, True)}"
    better = info.better or 1
    if (low if better > 0 else -high) > 0:
        return Finding("good", f"It got better. {moved} {span}: more than the choice of pictures explains.")
    if (high if better > 0 else -low) < 0:
        return Finding("bad", f"It got worse. {moved} {span}.")
    return Finding("open", f"No clear change. {moved} {span}, zero included.")


def honesty(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Whether the gain is real: endings, length, variety, the scores that were not trained on, collapse."""
    before, after = summary.get("before") or {}, summary.get("after") or {}
    difference = summary.get("difference") or {}
    found = []
    endings = _mean(after, "bad_ending")
    if endings is not None:
        share = metric_info("bad_ending")
        was = _mean(before, "bad_ending")
        start = f"{share.text(was)} before, " if was is not None else ""
        text = f"Captions ending in a function word: {start}{share.text(endings)} after (limit {_whole(BAD_ENDINGS)})."
        found.append(Finding("good" if endings <= BAD_ENDINGS else "bad", text))
    change = _relative(before, after, "length")
    if change is not None:
        text = (
            f"Length: {_mean(before, 'length'):.1f} words before, {_mean(after, 'length'):.1f} after, "
            f"{percent(change)} (limit ±{_whole(LENGTH_CHANGE)})."
        )
        found.append(Finding("good" if abs(change) <= LENGTH_CHANGE else "bad", text))
    found += [
        _not_falling(name, before, after, difference)
        for name in ("corpus_bleu_4", "attribute_accuracy")
        if name in before and name in after
    ]
    change = _relative(before, after, "distinct_2")
    if change is not None:
        limit = f"a loss past {_whole(VARIETY_LOSS)} means stock phrases"
        text = f"Variety (distinct word pairs): {percent(change)}; {limit}."
        found.append(Finding("good" if change >= -VARIETY_LOSS else "bad", text))
    return found + _collapse(metrics) + _alarms(summary.get("alarms") or [])


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the guards said while the run went on."""
    ends = {"stop": "; training was stopped", "rollback": "; training ended with the best evaluated weights"}
    return [
        Finding("bad", f"Guard {a['guard']} at step {a['step']}: {a['text']}{ends.get(a['action'], '')}.")
        for a in alarms
    ]


def _not_falling(name: str, before, after, difference) -> Finding:
    info, change = metric_info(name), difference.get(name) or {}
    text = f"{info.label}: {info.text(_mean(before, name))} before, {info.text(_mean(after, name))} after"
    low, high = change.get("low"), change.get("high")
    if is_number(high) and high < 0:
        return Finding("bad", f"{text}; it fell.")
    if is_number(low) and low > 0:
        return Finding("good", f"{text}; it rose too.")
    if is_number(low) and is_number(high):
        return Finding("good", f"{text}; no clear change.")
    return Finding("open", f"{text}; without an interval.")


def _collapse(metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Entropy, and how far the policy went from the reference."""
    found = []
    entropy = [m["entropy"] for m in metrics if is_number(m.get("entropy"))]
    if len(entropy) >= 2 and entropy[0] > 0:
        left = entropy[-1] / entropy[0]
        text = f"Entropy went from {entropy[0]:.2f} to {entropy[-1]:.2f} nats per token ({_whole(left)} left)."
        found.append(Finding("good" if left >= 0.1 else "bad", text))
    lost = Counter(name for m in metrics for name, value in m.items() if value is None)
    if lost:
        # Not bad in itself: a reward may have nothing to say about a step.
        text = ", ".join(f"{name} ({count})" for name, count in lost.most_common(6))
        found.append(Finding("open", f"Not a finite number in some steps: {text}."))
    return found


def where(samples: Sequence[Mapping[str, Any]], name: str) -> list[Finding]:
    """How a metric moved per caption, and in which kinds of pictures it moved least.

    Groups are made from references and ground truth, never from the score before: pictures picked for a bad score
    get better by chance alone (regression to the mean).
    """
    pairs = [(s, *scores_of(s, name)) for s in samples]
    pairs = [(s, old, new) for s, old, new in pairs if is_number(old) and is_number(new)]
    if not pairs:
        return []
    info = metric_info(name)
    better = info.better or 1
    gained = sum(better * (new - old) > 1e-9 for _, old, new in pairs)
    lost = sum(better * (new - old) < -1e-9 for _, old, new in pairs)
    total = len(pairs)
    same = total - gained - lost
    found = [
        Finding(
            "open",
            f"Of {total} pictures {gained} ({_whole(gained / total)}) score higher in {info.label}, "
            f"{lost} ({_whole(lost / total)}) lower, {same} ({_whole(same / total)}) the same.",
        )
    ]
    for label, members in _groups([s for s, _, _ in pairs]):
        if len(members) < _LEAST_GROUP:
            continue
        change = paired_bootstrap([pairs[i][1] for i in members], [pairs[i][2] for i in members], resamples=1000)
        found.append(
            Finding(
                "bad" if better * change["high" if better > 0 else "low"] < 0 else "open",
                f"{label} ({len(members)}): {info.text(change['mean'], True)} "
                f"[{info.text(change['low'], True)}, {info.text(change['high'], True)}]",
            )
        )
    return found


def _groups(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int]]]:
    """Kinds of pictures: by number of objects where that is known, else thirds by length of their references."""
    if all(isinstance(s.get("objects"), list) for s in samples):
        counts: dict[int, list[int]] = {}
        for i, sample in enumerate(samples):
            counts.setdefault(len(sample["objects"]), []).append(i)
        return [(f"{n} object{'s' if n != 1 else ''}", counts[n]) for n in sorted(counts)]
    lengths = [_reference_length(s) for s in samples]
    order = sorted(range(len(samples)), key=lambda i: lengths[i])
    third = len(order) // 3
    if not third:
        return []
    parts = [order[:third], order[third : len(order) - third], order[len(order) - third :]]
    names = ("short", "middling", "long")
    return [
        (
            f"{name} references, {min(lengths[i] for i in part):.0f} to {max(lengths[i] for i in part):.0f} words",
            part,
        )
        for name, part in zip(names, parts, strict=True)
    ]


def _reference_length(sample: Mapping[str, Any]) -> float:
    references = [r for r in sample.get("references") or [] if isinstance(r, str)]
    return sum(len(r.split()) for r in references) / len(references) if references else 0.0


def words_moved(samples: Sequence[Mapping[str, Any]], most: int = 8) -> tuple[list[str], list[str]]:
    """Words that captions use more, and less, than before, as "word (before → after)"; biggest change first."""
    old, new = Counter(), Counter()
    for sample in samples:
        if isinstance(sample.get("before"), str) and isinstance(sample.get("after"), str):
            old.update(_words(sample["before"]))
            new.update(_words(sample["after"]))
    moved = sorted(old.keys() | new.keys(), key=lambda w: (old[w] - new[w], w))
    more = [w for w in moved if new[w] > old[w]][:most]
    less = [w for w in reversed(moved) if new[w] < old[w]][:most]
    return [f"{w} ({old[w]} → {new[w]})" for w in more], [f"{w} ({old[w]} → {new[w]})" for w in less]


def _words(text: str) -> list[str]:
    return [word[:40] for word in text.lower().replace(".", " ").replace(",", " ").split()]


def sample_summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """before, after and difference out of the samples, for a run folder that has samples and no summary."""
    names = dict.fromkeys(n for s in samples for n in (s.get("scores_before") or {}))
    out: dict[str, Any] = {"before": {}, "after": {}, "difference": {}}
    for name in names:
        columns = list(zip(*(scores_of(s, name) for s in samples), strict=True))
        columns = [[v if is_number(v) else math.nan for v in column] for column in columns]
        for side, values in zip(("before", "after"), columns, strict=True):
            if any(map(math.isfinite, values)):
                out[side][name] = mean_interval(values)
        if any(math.isfinite(a) and math.isfinite(b) for a, b in zip(*columns, strict=True)):
            out["difference"][name] = paired_bootstrap(*columns)
    return out


def scores_of(sample: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """A metric of one sample, before and after; None where it was not scored."""
    return (sample.get("scores_before") or {}).get(name), (sample.get("scores_after") or {}).get(name)


def _mean(side: Mapping[str, Any], name: str) -> float | None:
    value = (side.get(name) or {}).get("mean")
    return value if is_number(value) else None


def _relative(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float | None:
    old, new = _mean(before, name), _mean(after, name)
    return None if old is None or new is None or old == 0 else (new - old) / abs(old)


def _whole(share: float) -> str:
    return f"{100 * share:.0f} %"


def percent(share: float) -> str:
    """A relative change for people."""
    return f"{100 * share:+.1f} %".replace("-", "−")

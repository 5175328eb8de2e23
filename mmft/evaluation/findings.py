"""What a run shows, in plain sentences: did it get better, by how much, is the gain real, where is it worse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mmft.evaluation.captioning import compare, distinct, metric_info, summarise
from mmft.evaluation.curves import is_number
from mmft.evaluation.groups import LEAST, Group, scores_of
from reward_models.metrics.text import simple

SIDES = ("before", "after")
MAIN_METRICS = ("cider_d", "reward/cider_d", "reward")  # the first one present carries the headline
BAD_ENDINGS = 0.01  # share of captions ending in a function word that counts as cheating
LENGTH_CHANGE = 0.20  # relative
VARIETY_LOSS = 0.20  # relative, of distinct word pairs
# What a guard must not say while a run goes on, if its gain is to be believed; spikes and the like are another matter.
_OF_CHEATING = ("bad_endings", "length_drift", "repetition", "share", "held_out", "blank_picture")


@dataclass
class Finding:
    """One sentence. state: good, bad, open (no answer in the numbers); name: what was looked at, in a word or two."""

    state: str
    text: str
    name: str = ""


def main_metric(names: Sequence[str]) -> str | None:
    """The metric of the headline."""
    return next((name for name in MAIN_METRICS if name in names), names[0] if names else None)


def headline(summary: Mapping[str, Any], step: int | None = None, finished: bool = False) -> Finding:
    """Did it get better, by how much, how sure is that.

    Args:
        step: of a run that goes on, the step of the newest evaluation.
        finished: there will be no further evaluation.
    """
    before, after = summary.get("before") or {}, summary.get("after") or {}
    name = main_metric([name for name in before if name in after])
    if name is None and finished:
        return Finding("open", "Nobody knows whether it got better: the run had no held-out pictures to be scored on.")
    if name is None:
        return Finding("open", "The run has no held-out result yet; what follows shows the training so far.")
    info, old, new = metric_info(name), before[name].get("mean"), after[name].get("mean")
    if not is_number(old) or not is_number(new):
        return Finding("open", f"Held-out {info.label} is not a number before or after training.")
    state, verdict = _verdict(summary, name)
    moved, span = f"Held-out {info.label} went from {_movement(summary, name)}.", _span(summary, name)
    if step is not None:
        moved = f"So far, after step {step}: {moved[0].lower()}{moved[1:]}"
    if not span:
        return Finding("open", f"{moved} {_no_interval(summary)}, so this may be luck.")
    ends = {"good": ": more than the choice of pictures explains.", "bad": ".", "open": ", zero included."}
    return Finding(state, f"{verdict} {moved} 95 % interval of the difference: {span}{ends[state]}")


def _verdict(summary: Mapping[str, Any], name: str) -> tuple[str, str]:
    """State of a metric's difference, and the same in words."""
    found, better = _interval(summary, name), metric_info(name).better or 1
    if found:
        low, high = sorted(better * end for end in found)
        if low > 0:
            return "good", "It got better."
        if high < 0:
            return "bad", "It got worse."
    return "open", "No clear change."


def _interval(summary: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Of a metric's difference; None where there is none, or too few pictures for it to mean anything."""
    change = (summary.get("difference") or {}).get(name) or {}
    low, high = change.get("low"), change.get("high")
    return (low, high) if is_number(low) and is_number(high) and not too_few(summary) else None


def too_few(summary: Mapping[str, Any]) -> bool:
    """Whether so few pictures were scored that a bootstrap of them is sure of anything; of one, its interval is 0."""
    rows = summary.get("rows")
    return is_number(rows) and rows < LEAST


def _no_interval(summary: Mapping[str, Any]) -> str:
    if not too_few(summary):
        return "There is no interval"
    rows = summary["rows"]
    return f"{rows} held-out picture{'s are' if rows != 1 else ' is'} too few for an interval (it takes {LEAST})"


def _movement(summary: Mapping[str, Any], name: str) -> str:
    """ "2.698 to 4.205, +1.507 or +55.9 %"; both means have to be numbers."""
    info, old, new = metric_info(name), summary["before"][name]["mean"], summary["after"][name]["mean"]
    relative = ((summary.get("difference") or {}).get(name) or {}).get("relative")
    if not is_number(relative):
        relative = (new - old) / abs(old) if old else None
    share = f" or {percent(relative)}" if relative is not None else ""
    return f"{info.text(old)} to {info.text(new)}, {info.text(new - old, signed=True)}{share}"


def _span(summary: Mapping[str, Any], name: str) -> str:
    """The interval of a metric's difference in words; nothing where there is none."""
    found, info = _interval(summary, name), metric_info(name)
    return f"{info.text(found[0], True)} to {info.text(found[1], True)}" if found else ""


@dataclass
class Answer:
    """A question that everybody asks of a run, and where on the page the evidence is."""

    question: str
    state: str
    text: str
    place: str


def in_short(
    scores: Mapping[str, Any],
    checks: Sequence[Finding],
    alarms: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    moved: Finding | None,
    step: int | None = None,
) -> list[Answer]:
    """Four questions with a line each: better? by how much? is it cheating? where is it worse?

    Args:
        checks: of `honesty`.
        moved: the sentence of `moved_pictures`.
        step: as in `headline`.
    """
    before, after = scores.get("before") or {}, scores.get("after") or {}
    name = main_metric([n for n in before if n in after])
    if name is None or not all(is_number(side[name].get("mean")) for side in (before, after)):
        return []
    info, (state, _) = metric_info(name), _verdict(scores, name)
    span = _span(scores, name)
    so_far = f" So far: this is step {step}." if step is not None else ""
    better = {
        "good": f"Yes: held-out {info.label} rose by more than the choice of pictures explains.",
        "bad": f"No, it got worse: held-out {info.label} fell.",
        "open": f"Not clearly: the interval of the difference in {info.label} includes zero."
        if span
        else f"Nobody knows. {_no_interval(scores)}.",
    }[state]
    much = f"{info.label} {_movement(scores, name)}" + (f"; 95 % interval {span}" if span else "")
    return [
        Answer("Did it get better?", state, better + so_far, "scores"),
        Answer("By how much?", state, f"{much}.", "scores"),
        _cheating(checks, alarms),
        _worse(groups, moved, info),
    ]


def _cheating(checks: Sequence[Finding], alarms: Sequence[Mapping[str, Any]]) -> Answer:
    question = "Is it cheating?"
    told = list(dict.fromkeys(str(a.get("guard")) for a in alarms if a.get("guard") in _OF_CHEATING))
    warned = f" While it trained, guards warned of {', '.join(told)}." if told else ""
    failed = [check for check in checks if check.state == "bad"]
    judged = [check for check in checks if check.state != "open"]
    if failed:
        names = ", ".join(dict.fromkeys(check.name for check in failed))
        text = f"Perhaps: {len(failed)} of {len(judged)} checks failed ({names}). Look at the pictures.{warned}"
        return Answer(question, "bad", text, "checks")
    if not judged:
        return Answer(question, "open", f"Not looked at: the metrics it takes were not computed.{warned}", "pictures")
    text = f"No sign of it: {len(judged)} of {len(judged)} checks passed.{warned}"
    return Answer(question, "open" if told else "good", text, "checks")


def _worse(groups: Sequence[Group], moved: Finding | None, info) -> Answer:
    question, better = "Where is it worse?", info.better or 1
    if moved is None:
        return Answer(question, "open", "Unknown: not all held-out captions were kept.", "pictures")
    worse = [group for group in groups if group.state == "bad"]
    named = min(groups, key=lambda group: better * group.change["mean"], default=None)
    if worse:
        kinds = "; ".join(f"{g.column} {g.label} ({info.text(g.change['mean'], True)})" for g in worse[:3])
        return Answer(question, "bad", f"{moved.text} Worse as a kind: {kinds}.", "where")
    least = ""
    if named is not None:
        change = f"{named.column} {named.label} ({info.text(named.change['mean'], True)})"
        least = f" No kind of picture is worse by more than luck explains; lowest: {change}."
    return Answer(question, "open", f"{moved.text}{least}", "where" if groups else "pictures")


def honesty(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Whether the gain is real, with what the guards said while the run went on."""
    return checks(summary, metrics) + warnings(summary.get("alarms") or [], summary.get("rolled_back_to"))


def checks(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
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
        found.append(Finding("good" if endings <= BAD_ENDINGS else "bad", text, "endings"))
    change = _relative(before, after, "length")
    if change is not None:
        text = (
            f"Length: {_mean(before, 'length'):.1f} words before, {_mean(after, 'length'):.1f} after, "
            f"{percent(change)} (limit ±{_whole(LENGTH_CHANGE)})."
        )
        found.append(Finding("good" if abs(change) <= LENGTH_CHANGE else "bad", text, "length"))
    found += [
        _not_falling(name, before, after, difference)
        for name in ("corpus_bleu_4", "attribute_accuracy")
        if name in before and name in after
    ]
    main = main_metric([name for name in before if name in after])
    if main is not None and not main.startswith("reward") and _verdict(summary, "reward")[0] == "good":
        label, moved = metric_info(main).label, _mean(after, main) - _mean(before, main)
        text = f"The reward rose on held-out pictures ({_movement(summary, 'reward')})"
        if _verdict(summary, main)[0] == "good":
            state, end = "good", f", and so did {label}."
        elif moved * (metric_info(main).better or 1) > 0:
            state, end = "open", f"; {label} rose, too, but by no more than luck explains."
        else:
            state, end = "bad", f"; {label} did not."
        found.append(Finding(state, text + end, "reward without result"))
    change = _relative(before, after, "distinct_2")
    if change is not None:
        limit = f"a loss past {_whole(VARIETY_LOSS)} means stock phrases"
        text = f"Variety (distinct word pairs): {percent(change)}; {limit}."
        found.append(Finding("good" if change >= -VARIETY_LOSS else "bad", text, "variety"))
    return found + _collapse(metrics)


def warnings(alarms: Sequence[Mapping[str, Any]], rolled_back_to: int | None = None) -> list[Finding]:
    """What guards and diagnoses said while the run went on, each with its first words and how often it spoke.

    Args:
        rolled_back_to: the step whose weights the run ended with, where a guard put them back.
    """
    back = "" if rolled_back_to is None else f" with the weights of step {rolled_back_to}, the best evaluated"
    ends = {"stop": "; training was stopped", "rollback": f"; training ended{back}"}
    spoke: dict[str, list[Mapping[str, Any]]] = {}
    for alarm in alarms:
        spoke.setdefault(str(alarm.get("guard")), []).append(alarm)
    found = []
    for name, said in spoke.items():
        end = next((ends[a["action"]] for a in said if a.get("action") in ends), "")
        steps = ", ".join(str(a.get("step")) for a in said[1:6]) + (" …" if len(said) > 6 else "")
        again = f" Again at step {steps} ({len(said)} times in all)." if len(said) > 1 else ""
        text = str(said[0].get("text", "")).rstrip(".")
        found.append(Finding("bad", f"Step {said[0].get('step')}, {name}: {text}{end}.{again}", name))
    return found


def _not_falling(name: str, before, after, difference) -> Finding:
    info, change = metric_info(name), difference.get(name) or {}
    text = f"{info.label}: {info.text(_mean(before, name))} before, {info.text(_mean(after, name))} after"
    low, high = change.get("low"), change.get("high")
    if is_number(high) and high < 0:
        return Finding("bad", f"{text}; it fell.", info.label)
    if is_number(low) and low > 0:
        return Finding("good", f"{text}; it rose too.", info.label)
    if is_number(low) and is_number(high):
        return Finding("good", f"{text}; no clear change.", info.label)
    return Finding("open", f"{text}; without an interval.", info.label)


def _collapse(metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Entropy, and how far the policy went from the reference."""
    found = []
    entropy = [m["entropy"] for m in metrics if is_number(m.get("entropy"))]
    if len(entropy) >= 2 and entropy[0] > 0:
        left = entropy[-1] / entropy[0]
        text = f"Entropy went from {entropy[0]:.2f} to {entropy[-1]:.2f} nats per token ({_whole(left)} left)."
        found.append(Finding("good" if left >= 0.1 else "bad", text, "entropy"))
    lost = Counter(name for m in metrics for name, value in m.items() if value is None)
    if lost:
        # Not bad in itself: a reward may have nothing to say about a step.
        text = ", ".join(f"{name} ({count})" for name, count in lost.most_common(6))
        found.append(Finding("open", f"Not a finite number in some steps: {text}."))
    return found


def moved_pictures(samples: Sequence[Mapping[str, Any]], name: str) -> Finding | None:
    """On how many pictures a metric rose and fell; None where no picture was scored on both sides."""
    pairs = [scores_of(s, name) for s in samples]
    gains = [(metric_info(name).better or 1) * (new - old) for old, new in pairs if is_number(old) and is_number(new)]
    if not gains:
        return None
    total = len(gains)
    gained, lost = sum(gain > 1e-9 for gain in gains), sum(gain < -1e-9 for gain in gains)
    return Finding(
        "open",
        f"Of {total} pictures {gained} ({_whole(gained / total)}) are better in {metric_info(name).label}, "
        f"{lost} ({_whole(lost / total)}) worse, {total - gained - lost} the same.",
    )


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
    return [word[:40] for word in simple(text)]


def sample_summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """before, after and difference out of the samples: what a run without a summary shows, and the reward's parts."""
    old, new = (columns_of(samples, side) for side in ("scores_before", "scores_after"))
    both = [n for n in old if n in new]
    known = {n: np.isfinite(old[n]) & np.isfinite(new[n]) for n in both}
    paired = [{n: np.where(known[n], side[n], math.nan) for n in both if known[n].any()} for side in (old, new)]
    out = {
        "before": summarise(old) if old else {},
        "after": summarise(new) if new else {},
        "difference": compare(*paired) if paired[0] else {},
    }
    pairs = [[list(pairwise(_words(s[side]))) for s in samples if isinstance(s.get(side), str)] for side in SIDES]
    for side, rows in zip(SIDES, pairs, strict=True):
        if out[side] and any(rows):
            out[side]["distinct_2"] = {"mean": distinct(rows)[0]}
    return out


def columns_of(samples: Sequence[Mapping[str, Any]], side: str) -> dict[str, np.ndarray]:
    """Metric -> one number per sample, NaN where it was not scored; metrics without any are left out."""
    names = dict.fromkeys(n for s in samples for n in (s.get(side) or {}))
    values = {name: [(s.get(side) or {}).get(name) for s in samples] for name in names}
    found = {name: np.array([v if is_number(v) else math.nan for v in column]) for name, column in values.items()}
    return {name: column for name, column in found.items() if np.isfinite(column).any()}


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
    return f"{100 * share:+z.1f} %".replace("-", "−")

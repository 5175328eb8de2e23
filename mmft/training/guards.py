"""Live guards against reward hacking: each looks at one number of a step, and says when it has left its range.

A policy that has found a fault of its reward shows it in the text long before anybody reads a sample: captions that
break off, grow, shrink or repeat themselves, one part of the reward that crowds out the others, a reward that rises
while held-out metrics fall, or that is earned as well without the picture. A guard only compares numbers that the
step has computed anyway (means over all processes, so every process comes to the same answer). Beside them it tells
the spikes of the gradient, which the update has found (see `mmft.training.spikes`), and the failures of the algorithm
itself (see `mmft.training.diagnoses`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mmft.training.spikes import Spikes

if TYPE_CHECKING:
    from mmft.training.diagnoses import Diagnoses

ACTIONS = ("log", "stop", "rollback")
_SMOOTHED = 3  # steps that are averaged: a small batch is noisy
_PARTS = "share/"


@dataclass(frozen=True)
class Guard:
    """A limit and what happens beyond it.

    Attributes:
        limit: see `LIMITS`; the number beyond which the guard speaks.
        action: "log" says so; "stop" ends the training; "rollback" ends it and puts the best evaluated state back.
        every: steps between looks (of ``blank_picture``, whose look costs a sampling pass; 0 = never).
        patience: evaluations in a row, of ``held_out``.
    """

    limit: float
    action: str = "log"
    every: int = 1
    patience: int = 2

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action of a guard is {self.action!r}: expected one of {', '.join(ACTIONS)}")


# What each guard looks at, and the limit it has by default.
LIMITS = {
    "bad_endings": 0.2,  # share of responses that are empty or end in a function word
    "length_drift": 0.5,  # relative change of the words per response since the first steps
    "repetition": 0.2,  # mean share of word pairs that a response repeats
    "share": 0.95,  # of one part in the spread of the total, where there are several
    "held_out": 0.03,  # relative loss of the held-out metric since its best, while the reward is higher than then
    "blank_picture": 0.4,  # share of prompts whose blank picture earns what the true one does
}
# What each alarm means, and what to try.
_MEANING = {
    "bad_endings": "part of a sentence pays as well as the whole. Keep the option eos of cider_d and bleu, add the "
    "reward missing_eos or format, or end the run earlier",
    "length_drift": "the reward pays for length, not for what is said. Try the reward length, or less weight on the "
    "part that grew with it",
    "repetition": "saying things twice pays. Try the reward repetition, or a higher algorithm.kl_coef",
    "share": "the other parts hardly count. Try other weights, or normalize on the parts",
    "held_out": "what is learned pays on training pictures alone. Try eval.patience, more training rows, or a higher "
    "algorithm.kl_coef",
    "blank_picture": "the reward can be had without looking. Try `mmft doctor rewards`, and rewards that know what is "
    "in the picture",
}
DEFAULT_GUARDS = {name: Guard(limit, every=0 if name == "blank_picture" else 1) for name, limit in LIMITS.items()}


@dataclass(frozen=True)
class Alarm:
    """One guard that spoke."""

    guard: str
    step: int
    value: float
    limit: float
    action: str
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Guards:
    """Watches a run. `look` once a step, `held_out` once an evaluation; both return the alarms that begin there.

    A guard speaks when its number leaves the range, and again only after it has come back.

    Args:
        guards: name -> limit and action.
        skip_spikes: so many times the usual gradient is not learned from; None = it is, and told all the same.
        diagnoses: what tells the failures of the algorithm; None = nobody.
    """

    def __init__(
        self, guards: Mapping[str, Guard], skip_spikes: float | None = None, diagnoses: Diagnoses | None = None
    ):
        if odd := sorted(set(guards) - set(LIMITS)):
            raise ValueError(f"unknown guard {odd[0]!r}: expected one of {', '.join(LIMITS)}")
        self.guards, self.spikes, self.diagnoses = dict(guards), Spikes(skip_spikes), diagnoses
        self.best_step: int | None = None
        self._best: tuple[float, float | None] | None = None  # held-out metric at its best, training reward then
        self._worse = 0
        self._first: list[float] = []  # words per response of the first steps
        self._recent: deque[dict[str, float]] = deque(maxlen=_SMOOTHED)
        self._speaking: set[str] = set()
        self.alarms: list[Alarm] = []  # of the whole run

    @property
    def may_roll_back(self) -> bool:
        return any(guard.action == "rollback" for guard in self.guards.values())

    def wants_blank(self, step: int) -> bool:
        """Whether this step should also try blank pictures."""
        guard = self.guards.get("blank_picture")
        return guard is not None and guard.every > 0 and step % guard.every == 0

    def look(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms of one training step."""
        self._recent.append({k: v for k, v in metrics.items() if _is_read(k) and math.isfinite(v)})
        if len(self._first) < _SMOOTHED and "words" in metrics:
            self._first.append(float(metrics["words"]))
        found = [
            self._compare("bad_endings", step, self._mean("bad_ending"), "{:.0%} of responses end in mid-sentence"),
            self._compare("repetition", step, self._mean("repetition"), "responses repeat {:.0%} of their word pairs"),
            self._compare("length_drift", step, *self._drift()),
            self._compare("share", step, *self._largest_share()),
            self._compare(
                "blank_picture",
                step,
                metrics.get("blank_picture"),
                "{:.0%} of blank pictures earn as much as true ones",
            ),
            self._spike(step, metrics),
        ]
        ill = self.diagnoses.look(step, metrics) if self.diagnoses else []
        self.alarms += ill
        return [alarm for alarm in found if alarm] + ill

    def held_out(self, step: int, value: float | None, name: str = "the held-out metric") -> list[Alarm]:
        """The alarms of one evaluation: ``value`` of the main held-out metric (more is better)."""
        reward = self._mean("reward")
        if value is None or not math.isfinite(value):
            return []
        if self._best is None or value > self._best[0]:
            self._best, self.best_step, self._worse = (value, reward), step, 0
            self._speaking.discard("held_out")
            return []
        guard = self.guards.get("held_out")
        loss = (self._best[0] - value) / max(abs(self._best[0]), 1e-12)
        rose = reward is not None and (self._best[1] is None or reward > self._best[1])
        against = guard is not None and rose and loss > guard.limit
        self._worse = self._worse + 1 if against else 0
        if guard is None:
            return []
        text = f"{name} fell {{:.0%}} below its best of step {self.best_step} while the reward rose"
        alarm = self._compare("held_out", step, loss if self._worse >= guard.patience else 0.0, text)
        return [alarm] if alarm else []

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint."""
        return {
            "best_step": self.best_step,
            "best": self._best,
            "worse": self._worse,
            "first": self._first,
            "recent": list(self._recent),
            "speaking": sorted(self._speaking),
            "spikes": self.spikes.state_dict(),
            "diagnoses": self.diagnoses.state_dict() if self.diagnoses else None,
            "alarms": [alarm.as_dict() for alarm in self.alarms],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best_step, self._worse = state["best_step"], state["worse"]
        self._best = tuple(state["best"]) if state["best"] else None
        self._first, self._speaking = list(state["first"]), set(state["speaking"])
        self._recent = deque(state["recent"], maxlen=_SMOOTHED)
        self.spikes.load_state_dict(state["spikes"])
        if self.diagnoses and state.get("diagnoses"):  # a checkpoint of an earlier version has none
            self.diagnoses.load_state_dict(state["diagnoses"])
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]

    def forget_best(self) -> None:
        """As if nothing had been evaluated yet."""
        self.best_step, self._best, self._worse = None, None, 0

    # ---------------------------------------------------------------- numbers

    def _mean(self, name: str) -> float | None:
        values = [metrics[name] for metrics in self._recent if name in metrics]
        return sum(values) / len(values) if values else None

    def _drift(self) -> tuple[float | None, str]:
        words, first = self._mean("words"), sum(self._first) / max(len(self._first), 1)
        if words is None or not first or len(self._first) < _SMOOTHED:
            return None, ""
        how = "grew" if words > first else "shrank"
        return abs(words / first - 1), f"responses {how} by {{:.0%}}, from {first:.1f} to {words:.1f} words"

    def _largest_share(self) -> tuple[float | None, str]:
        """The part with the largest share of the total's spread, where at least two parts count."""
        names = sorted({name for metrics in self._recent for name in metrics if name.startswith(_PARTS)})
        shares = {name.removeprefix(_PARTS): self._mean(name) or 0.0 for name in names}
        if len(shares) < 2:
            return None, ""
        largest = max(shares, key=lambda name: shares[name])
        return shares[largest], f"{largest} makes {{:.0%}} of the reward's spread"

    def _spike(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Every spike is told: each is an event of its own."""
        if not metrics.get("spike"):
            return None
        done = "not learned from" if self.spikes.skips else "learned from all the same; train.skip_spikes skips such"
        ratio, limit = metrics["spike_ratio"], self.spikes.limit
        text = f"a gradient {ratio:.0f} times as long as usual (limit {limit:g}), {done}"
        self.alarms.append(Alarm("spike", step, ratio, limit, "skip" if self.spikes.skips else "log", text))
        return self.alarms[-1]

    def _compare(self, name: str, step: int, value: float | None, text: str) -> Alarm | None:
        guard = self.guards.get(name)
        if guard is None or value is None:
            return None
        if not value > guard.limit:
            self._speaking.discard(name)
            return None
        if name in self._speaking:
            return None
        self._speaking.add(name)
        told = f"{text.format(value)} (limit {guard.limit:.0%}): {_MEANING[name]}; see docs/guards.md"
        self.alarms.append(Alarm(name, step, value, guard.limit, guard.action, told))
        return self.alarms[-1]


def _is_read(name: str) -> bool:
    return name in ("bad_ending", "repetition", "words", "reward") or name.startswith(_PARTS)

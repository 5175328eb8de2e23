"""The classic failures of a run, told while it runs: what is wrong, what it means, what to try.

Guards (`mmft.training.guards`) ask whether the reward is cheated, and may end a run; their limits stand in the recipe.
A diagnosis asks whether the algorithm works at all, from numbers that the step has computed anyway, and only speaks:
once when it begins, and again only after ten steps without it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, variance
from typing import Any, NamedTuple

from mmft.training.config import PPOConfig
from mmft.training.guards import Alarm

_FIRST, _LAST = 10, 20  # steps that stand for the beginning, and for now, where one step says too little
_GONE = 10  # steps in a row; a number that hovers around its limit must not be told over and over
_READ = ("reward", "entropy", "explained_variance", "kl")


class Diagnosis(NamedTuple):
    """When a failure is spoken of, and how.

    Attributes:
        metric: the key of ``metrics.jsonl`` to look at; its entry in docs/metrics.md says more.
        limit: the value beyond which the run is ill, see `Diagnoses._numbers` for what is compared with it.
        steps: so many steps in a row, for a small batch is noisy.
        low: ill below the limit instead of above it.
        text: ``{value}`` and ``{limit}`` are filled in.
    """

    metric: str
    limit: float
    steps: int
    low: bool
    text: str


# Limits are where a run no longer recovers by itself, not where it could be better: a false alarm costs more trust than
# a late one. The bundled demo, a healthy run, stays far from all of them.
DIAGNOSES = {
    # Share of prompts; a group of equal rewards has no better and worse response to tell apart. Towards the end of a
    # good run many groups agree, so it takes nearly all of them.
    "equal_rewards": Diagnosis("equal_groups", 0.9, 2, False, "{cause}"),
    # Nats per token of the responses: at 0.5 the reference would write a caption of 14 words e^7 = 1,000 times more
    # rarely than the policy does. The demo ends at 0.14. With a target, three times that.
    "kl_running_away": Diagnosis(
        "kl",
        0.5,
        3,
        False,
        "the policy runs away from the model it started from (KL {value:.1f} nats per response, limit {limit:.1f}): it "
        "has left the language it knew, and its rewards mean little there. Try a higher algorithm.kl_coef (or an "
        "algorithm.kl_target), a lower train.learning_rate, or train.warmup_steps",
    ),
    # Of the first steps' mean. The demo keeps 0.4.
    "entropy_collapse": Diagnosis(
        "entropy",
        0.1,
        3,
        True,
        "the policy is almost certain of every word (entropy {value:.3f} nats per token, less than a tenth of what it "
        "was): it writes one caption over and over, and finds nothing new. Try algorithm.entropy_coef=0.01, a higher "
        "algorithm.kl_coef, a lower train.learning_rate, or a higher rollout.temperature",
    ),
    # Mean of 20 steps; a constant would explain 0. The demo has 0.1 after 20 steps, and 0.2 at the end.
    "critic_not_learning": Diagnosis(
        "explained_variance",
        0.02,
        3,
        True,
        "the critic foresees nothing (explained variance {value:.2f} over the last 20 steps; 1 is perfect, 0 is a "
        "constant): advantages are as noisy as without it. Try a higher train.value_learning_rate, a higher "
        "algorithm.vf_coef, more rollout.prompts_per_step, or model.critic=none (the other responses as baseline)",
    ),
    "no_gradient": Diagnosis(
        "grad_norm",
        1e-10,
        2,
        True,
        "the gradient is zero: no weight changes. Either every response to a prompt earns the same (equal_groups), or "
        "nothing that is trained takes part in the output; look at the rewards, model.tune and model.lora.target",
    ),
    # Nats per response; samples of an unchanged policy give 1e-5 in float32.
    "not_moving": Diagnosis(
        "kl",
        1e-3,
        5,
        True,
        "the policy still writes as the model it started from (KL {value:.4f} nats per response): its updates are too "
        "small to matter. Try a higher train.learning_rate, and model.dtype=float32 if weights are bfloat16, which "
        "rounds small steps away",
    ),
    # Share of responses. A few long ones are no failure.
    "never_ending": Diagnosis(
        "ended_fraction",
        0.5,
        5,
        True,
        "{value:.0%} of responses end by themselves, the others are cut off at rollout.max_completion_length: they are "
        "scored as fragments. Try a higher rollout.max_completion_length, algorithm.missing_eos_penalty=1, or a prompt "
        "(data.prompt) that asks for one short sentence",
    ),
    # Share of tokens; around 0.1 to 0.2 is common, the demo has 0.002.
    "clipped": Diagnosis(
        "clip_fraction",
        0.3,
        3,
        False,
        "{value:.0%} of tokens are beyond PPO's clip and teach nothing: each step moves the policy too far. Try a "
        "lower train.learning_rate, fewer algorithm.num_ppo_epochs, or larger minibatches (algorithm.num_mini_batches)",
    ),
    # Standard errors between the mean of the first 10 steps and that of the last 20, after 40. At 1 the rise is no more
    # than chance.
    "reward_not_rising": Diagnosis(
        "reward",
        1.0,
        5,
        True,
        "the reward is no higher than in the first steps, chance considered: if held-out scores do not rise either, "
        "nothing was learned that pays. Try a "
        "higher train.learning_rate, more rollout.prompts_per_step or rollout.num_generations, a lower "
        "algorithm.kl_coef; and `mmft doctor rewards`, which asks whether the reward can tell good from bad",
    ),
}
_CRITIC_FROM, _MOVED_BY, _RISEN_BY = 20, 20, 40  # steps before the three slow ones are judged
# With few prompts a step, which ones were drawn hides a rise for long: runs of 4 a step showed theirs at step 80.
_RISEN_BY_PROMPTS = 640


class Diagnoses:
    """Looks at each step of a run. All processes come to the same answer, for they have the same numbers.

    Args:
        config: what the run was asked to do; a failure that it rules out is not looked for.
    """

    def __init__(self, config: PPOConfig):
        self.config = config
        self._first: dict[str, list[float]] = {"reward": [], "entropy": []}
        self._recent: deque[dict[str, float]] = deque(maxlen=_LAST)
        self._row: dict[str, int] = {}  # steps in a row: above 0 ill, below 0 sound
        self._speaking: set[str] = set()

    def look(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The failures that begin at this step."""
        self._remember(metrics)
        return [
            alarm for name, seen in self._numbers(step, metrics).items() if (alarm := self._judge(name, step, *seen))
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint; floats survive JSON bit by bit."""
        return {
            "first": self._first,
            "recent": list(self._recent),
            "row": self._row,
            "speaking": sorted(self._speaking),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first = {name: list(values) for name, values in state["first"].items()}
        self._recent = deque(state["recent"], maxlen=_LAST)
        self._row, self._speaking = dict(state["row"]), set(state["speaking"])

    def _remember(self, metrics: Mapping[str, float]) -> None:
        known = {name: float(metrics[name]) for name in _READ if math.isfinite(metrics.get(name, math.nan))}
        self._recent.append(known)
        for name, first in self._first.items():
            if name in known and len(first) < _FIRST:
                first.append(known[name])

    def _numbers(self, step: int, metrics: Mapping[str, float]) -> dict[str, tuple[float, float, str]]:
        """Failure -> value, limit and cause, for those that can be judged at this step."""
        config = self.config
        found: dict[str, tuple[float, float, str]] = {}

        def note(name: str, value: float | None, scale: float = 1.0, cause: str = "") -> None:
            if value is not None and math.isfinite(value):
                found[name] = (value, DIAGNOSES[name].limit * scale, cause)

        equal = _equal(metrics)
        note("equal_rewards", equal, cause=_cause(metrics, config))
        learns = equal is None or equal <= DIAGNOSES["equal_rewards"].limit
        if config.kl_coef > 0:
            by_length = DIAGNOSES["kl_running_away"].limit * max(metrics["response_length"], 1.0)
            limit = min(by_length, 3 * config.kl_target) if config.kl_target else by_length
            note("kl_running_away", metrics["kl"], limit / DIAGNOSES["kl_running_away"].limit)
            if learns and step > config.warmup_steps + _MOVED_BY:
                note("not_moving", self._mean("kl", 5))
        if self._first["entropy"]:
            note("entropy_collapse", self._mean("entropy", 3), fmean(self._first["entropy"][:3]))
        if learns and config.critic != "none" and step >= _CRITIC_FROM:
            note("critic_not_learning", self._mean("explained_variance", _LAST))
        if metrics["reward_std"] > 0:
            note("no_gradient", metrics.get("grad_norm"))
        note("never_ending", metrics["ended_fraction"])
        note("clipped", metrics.get("clip_fraction"))
        if learns and step >= max(_RISEN_BY, math.ceil(_RISEN_BY_PROMPTS / config.prompts_per_step)):
            note("reward_not_rising", self._rise())
        return found

    def _judge(self, name: str, step: int, value: float, limit: float, cause: str) -> Alarm | None:
        diagnosis, row = DIAGNOSES[name], self._row.get(name, 0)
        ill = value < limit if diagnosis.low else value > limit
        row = max(row, 0) + 1 if ill else min(row, 0) - 1
        self._row[name] = row
        if row <= -_GONE:
            self._speaking.discard(name)
        if row < diagnosis.steps or name in self._speaking:
            return None
        self._speaking.add(name)
        text = diagnosis.text.format(value=value, limit=limit, cause=cause)
        return Alarm(name, step, value, limit, "log", f"{text}; see docs/metrics.md#{diagnosis.metric}")

    def _mean(self, name: str, steps: int) -> float | None:
        values = [seen[name] for seen in list(self._recent)[-steps:] if name in seen]
        return fmean(values) if values else None

    def _rise(self) -> float | None:
        """How many standard errors the reward of the last steps is above that of the first."""
        first, last = self._first["reward"], [seen["reward"] for seen in self._recent if "reward" in seen]
        if len(first) < _FIRST or len(last) < _LAST:
            return None
        error = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
        rise = fmean(last) - fmean(first)
        return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0


def _equal(metrics: Mapping[str, float]) -> float | None:
    """Share of prompts whose responses all earned the same; of single responses, whether all prompts did."""
    return metrics.get("equal_groups", float(metrics["reward_std"] == 0.0))


def _cause(metrics: Mapping[str, float], config: PPOConfig) -> str:
    """Why rewards are equal, in words."""
    if not math.isfinite(metrics["reward"]):
        return (
            "all responses were dropped, for no reward had a number for them: nothing is learned. Look at the rewards "
            "(and their option nonfinite)"
        )
    alike = metrics.get("unique_responses", 1.0) * config.num_generations < 1.5
    if alike and config.num_generations > 1:
        return (
            "all responses to a prompt are the same text, so there is no better one to learn from. Try a higher "
            "rollout.temperature, algorithm.entropy_coef=0.01, or more rollout.num_generations"
        )
    what = "to nearly every response" if metrics["reward_std"] == 0.0 else "to all responses to a prompt"
    return (
        f"the rewards give the same number {what}, however they differ: nothing is learned. Is the reward a constant, "
        "or 0 for all that the model writes yet? Try `mmft doctor rewards`, a reward that grades (cider_d, bleu), or a "
        "model.name that can do a little of the task already (warm_start)"
    )

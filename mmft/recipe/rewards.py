"""The parts of a recipe that say what is rewarded, and what watches over it: `rewards` and `guards`.

The values are read by `reward_models.build_rewards` and `mmft/training/guards.py`; their meaning is explained in
docs/rewards/combination.md. Like the rest of the recipe this must not import anything heavy.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from mmft.recipe.strict_yaml import Section

# The keys of reward_models.named.BUILT_IN, which cannot be imported here; a test compares the two.
REWARDS = [
    "cider_d",
    "cider",
    "bleu",
    "rouge_l",
    "meteor",
    "spice",
    "coverage",
    "hallucination",
    "length",
    "repetition",
    "missing_eos",
    "novelty",
    "richness",
    "format",
    "preference",
    "http",
]
WITH_TIMEOUT = ["meteor", "spice", "http"]  # built-in rewards with an option `timeout`; compared by a test, too


def _not_zero(share: float) -> float:
    if share == 0:
        raise ValueError("a share of nothing")
    return share


class ScheduledWeight(Section):
    """A weight that moves from one value to another between two steps."""

    schedule: Literal["constant", "linear", "cosine"]  # constant: a jump at `start`
    from_: float = Field(0.0, alias="from")
    to: float = 1.0
    steps: int = Field(1, ge=1)
    start: int = Field(0, ge=0)


class ShareWeight(Section):
    """A weight adapted so that the part holds its share of the total."""

    share: Annotated[float, AfterValidator(_not_zero)] = Field(
        description="a number between 0 and 1 (> -1 and < 1, below 0 for a penalty), not 0", gt=-1, lt=1
    )


class ColumnWeight(Section):
    """A weight that each sample brings along."""

    column: str = Field(min_length=1)
    scale: float = 1.0


class WhenWeight(Section):
    """A weight for the samples whose columns hold these values, another for the rest."""

    when: dict[str, str | int | float | bool] = Field(min_length=1)
    weight: float = 1.0
    otherwise: float = 0.0


_FORMS = {"schedule": ScheduledWeight, "share": ShareWeight, "column": ColumnWeight, "when": WhenWeight}


def _form(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((f"<{key}>" for key in _FORMS if key in value), None)
    return next((f"<{key}>" for key, form in _FORMS.items() if isinstance(value, form)), "<number>")


Weight = Annotated[
    Annotated[float, Tag("<number>")]
    | Annotated[ScheduledWeight, Tag("<schedule>")]
    | Annotated[ShareWeight, Tag("<share>")]
    | Annotated[ColumnWeight, Tag("<column>")]
    | Annotated[WhenWeight, Tag("<when>")],
    Discriminator(_form),
]


def _a_reward(name: str) -> str:
    if name not in REWARDS and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", name):
        raise ValueError("unknown reward")
    return name


def _low_and_high(limits: list[float]) -> list[float]:
    if len(limits) != 2 or not limits[0] < limits[1]:
        raise ValueError("wrong limits")
    return limits


class Reward(Section):
    """One named part of the reward; weight 0 = logged only."""

    name: Annotated[str, AfterValidator(_a_reward)] = Field(
        description=f"{', '.join(REWARDS)}, or your own package.module:function or path/to/file.py:function",
        examples=REWARDS,
    )
    as_: str | None = Field(None, alias="as", min_length=1)  # its name in logs; null = its own name
    weight: Weight = Field(
        1.0,
        description="a finite number, or a section with one of "
        "{schedule, from, to, steps, start}, {share}, {column, scale}, {when, weight, otherwise}",
    )
    credit: Literal["last", "dense", "shaping"] = "last"
    normalize: Literal["running", "batch", "group"] | None = None
    clip: Annotated[list[float], AfterValidator(_low_and_high)] | None = Field(
        None, description="[low, high] with low < high, or null"
    )
    nonfinite: Literal["raise", "drop", "zero"] = "raise"
    timeout: float | None = Field(None, gt=0)  # seconds per call, yours in a child process; null = no limit, no child
    options: dict[str, Any] = {}  # keyword arguments of the reward

    @property
    def label(self) -> str:
        """Its name in logs."""
        return self.as_ or self.name.rpartition(":")[2]


Action = Literal["log", "stop", "rollback"]


class BadEndings(Section):
    """Share of responses that are empty or end in a function word."""

    limit: float = Field(0.2, ge=0, le=1)
    action: Action = "log"


class LengthDrift(Section):
    """Change of the mean response length since the first steps, relative to it."""

    limit: float = Field(0.5, gt=0)
    action: Action = "log"


class Repetition(Section):
    """Mean share of word pairs that a response repeats."""

    limit: float = Field(0.2, ge=0, le=1)
    action: Action = "log"


class DominantShare(Section):
    """Share of one part in the spread of the total reward, where several parts count."""

    limit: float = Field(0.95, ge=0, le=1)
    action: Action = "log"


class HeldOut(Section):
    """Loss of the held-out metric since its best, relative to it, while the reward is higher than it was then."""

    limit: float = Field(0.03, ge=0)
    patience: int = Field(2, ge=1)  # evaluations in a row
    action: Action = "log"


class BlankPicture(Section):
    """Share of prompts whose response to a grey picture earns what those to the true one do on average."""

    every: int = Field(0, ge=0)  # steps; 0 = off, for every look costs a sampling pass
    limit: float = Field(0.4, ge=0, le=1)
    action: Action = "log"


class Guards(Section):
    """Monitors against a reward that is cheated (mmft/training/guards.py); null = off."""

    bad_endings: BadEndings | None = BadEndings()
    length_drift: LengthDrift | None = LengthDrift()
    repetition: Repetition | None = Repetition()
    share: DominantShare | None = DominantShare()
    held_out: HeldOut | None = HeldOut()
    blank_picture: BlankPicture | None = BlankPicture()

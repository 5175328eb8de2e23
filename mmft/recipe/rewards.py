"""The parts of a recipe that say what is rewarded, and what watches over it: `rewards` and `guards`.

The values are read by `reward_models.build_rewards` and `mmft/training/guards.py`; their meaning is explained in
docs/rewards/combination.md. Like the rest of the recipe this must not import anything heavy.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, WithJsonSchema

from mmft.recipe.messages import Expected
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

    schedule: Literal["constant", "linear", "cosine"] = Field(description="constant: a jump at `start`")
    from_: float = Field(0.0, alias="from", description="the weight before")
    to: float = Field(1.0, description="the weight after")
    steps: int = Field(1, ge=1, description="how many it takes")
    start: int = Field(0, ge=0, description="the step at which it begins")


class ShareWeight(Section):
    """A weight adapted so that the part holds its share of the total."""

    share: Annotated[
        float,
        AfterValidator(_not_zero),
        Expected("a number between 0 and 1 (> -1 and < 1, below 0 for a penalty), not 0"),
    ] = Field(
        description="of the spread of the total, between 0 and 1; below 0 for a penalty",
        gt=-1,
        lt=1,
        json_schema_extra={"not": {"const": 0}},
    )


class ColumnWeight(Section):
    """A weight that each sample brings along."""

    column: str = Field(min_length=1, description="the data set's column that holds it")
    scale: float = Field(1.0, description="factor on it")


class WhenWeight(Section):
    """A weight for the samples whose columns hold these values, another for the rest."""

    when: dict[str, str | int | float | bool] = Field(min_length=1, description="column: value, all of them")
    weight: float = Field(1.0, description="for samples that have them")
    otherwise: float = Field(0.0, description="for the rest")


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


_OWN = r"[^:]+:[A-Za-z_]\w*"  # module:function


def _a_reward(name: str) -> str:
    if name not in REWARDS and not re.fullmatch(_OWN, name):
        raise ValueError("unknown reward")
    return name


def _low_and_high(limits: list[float]) -> list[float]:
    if len(limits) != 2 or not limits[0] < limits[1]:
        raise ValueError("wrong limits")
    return limits


class Reward(Section):
    """One named part of the reward. Each part is explained in docs/rewards."""

    name: Annotated[
        str,
        AfterValidator(_a_reward),
        WithJsonSchema({"anyOf": [{"enum": REWARDS}, {"type": "string", "pattern": f"^{_OWN}$"}]}),
        Expected(f"{', '.join(REWARDS)}, or your own package.module:function or path/to/file.py:function"),
    ] = Field(
        description="what scores; your own: package.module:function or path/to/file.py:function", examples=REWARDS
    )
    as_: str | None = Field(None, alias="as", min_length=1, description="its name in logs; null = its own name")
    weight: Annotated[
        Weight,
        Expected(
            "a finite number, or a section with one of "
            "{schedule, from, to, steps, start}, {share}, {column, scale}, {when, weight, otherwise}"
        ),
    ] = Field(
        1.0, description="factor on its score; 0 = logged only. A number, a schedule, a share, a column or a condition"
    )
    credit: Literal["last", "dense", "shaping"] = Field(
        "last", description="paid at the last token, word by word, or as potential-based shaping"
    )
    normalize: Literal["running", "batch", "group"] | None = Field(
        None, description="to mean 0, variance 1: over the run so far, the batch, or the responses to a prompt"
    )
    clip: Annotated[
        Annotated[list[float], AfterValidator(_low_and_high), Field(min_length=2, max_length=2)] | None,
        Expected("[low, high] with low < high, or null"),
    ] = Field(None, description="limits of its score, such as [-1, 1]; null = none")
    nonfinite: Literal["raise", "drop", "zero"] = Field(
        "raise", description="a score that is no finite number ends the run, drops the sample, or counts 0"
    )
    timeout: float | None = Field(
        None, gt=0, description="seconds per call; your own then runs in a child process. null = no limit, no child"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the reward")

    @property
    def label(self) -> str:
        """Its name in logs."""
        return self.as_ or self.name.rpartition(":")[2]


Action = Annotated[
    Literal["log", "stop", "rollback"],
    Field(description="say so; end the run; or end it and put the best evaluated state back"),
]


class BadEndings(Section):
    """Share of responses that are empty or end in a function word."""

    limit: float = Field(0.2, ge=0, le=1, description="the share beyond which it speaks")
    action: Action = "log"


class LengthDrift(Section):
    """Change of the mean response length since the first steps, relative to it."""

    limit: float = Field(0.5, gt=0, description="0.5 = half as long again, or half as long")
    action: Action = "log"


class Repetition(Section):
    """Mean share of word pairs that a response repeats."""

    limit: float = Field(0.2, ge=0, le=1, description="the share beyond which it speaks")
    action: Action = "log"


class DominantShare(Section):
    """Share of one part in the spread of the total reward, where several parts count."""

    limit: float = Field(0.95, ge=0, le=1, description="the share beyond which it speaks")
    action: Action = "log"


class HeldOut(Section):
    """Loss of the held-out metric since its best, relative to it, while the reward is higher than it was then."""

    limit: float = Field(0.03, ge=0, description="the loss beyond which it speaks")
    patience: int = Field(2, ge=1, description="evaluations in a row")
    action: Action = "log"


class BlankPicture(Section):
    """Share of prompts whose response to a grey picture earns what those to the true one do on average."""

    every: int = Field(0, ge=0, description="steps between looks; 0 = off, for every look costs a sampling pass")
    limit: float = Field(0.4, ge=0, le=1, description="the share beyond which it speaks")
    action: Action = "log"


class Guards(Section):
    """Monitors against a reward that is cheated (docs/guards.md)."""

    bad_endings: BadEndings | None = Field(BadEndings(), description="captions that break off; null = off")
    length_drift: LengthDrift | None = Field(LengthDrift(), description="captions that grow or shrink; null = off")
    repetition: Repetition | None = Field(Repetition(), description="captions that repeat themselves; null = off")
    share: DominantShare | None = Field(DominantShare(), description="one part decides alone; null = off")
    held_out: HeldOut | None = Field(HeldOut(), description="a reward that rises while the metric falls; null = off")
    blank_picture: BlankPicture | None = Field(
        BlankPicture(), description="a reward earned without the picture; null = off"
    )

"""One part of a combined reward: the function and how it counts, checked when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from reward_models.named import with_increments
from reward_models.normalisation import NORMALISATIONS
from reward_models.returned import POLICIES
from reward_models.weights import Weight, form_of, parse_weight

RewardFunction = Callable[..., Any]

CREDITS = ("last", "dense", "shaping")


@dataclass(frozen=True)
class RewardPart:
    """One named reward and how it counts.

    function: the reward. weight: a number or one of the forms of `reward_models.weights`; 0 = logged only.
    credit: last: the score belongs to the last token. dense: each token gets what it adds to the score, by the
    function's `increments`. shaping: the score stays on the last token, and the scores of the prefixes are potentials.
    normalize: None, running (over all training so far), batch (this call) or group (the responses to one prompt); the
    last two not with shaping, whose potentials may not depend on what comes after the prefix.
    clip: (low, high) for the score after normalisation, before the weight.
    nonfinite: raise, drop (leave the row out of the update) or zero (as if the reward had returned 0).
    Raises ValueError naming the part.
    """

    name: str
    function: RewardFunction
    weight: Weight = 1.0
    credit: str = "last"
    normalize: str | None = None
    clip: tuple[float, float] | None = None
    nonfinite: str = "raise"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a reward's name must be text, got {self.name!r}")
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"reward {self.name!r}: {error}") from None

    def _check(self) -> None:
        if not callable(self.function):
            raise ValueError(f"expected a function, got {type(self.function).__name__}")
        object.__setattr__(self, "weight", parse_weight(self.weight))
        for key, choices in (("credit", CREDITS), ("normalize", (None, *NORMALISATIONS)), ("nonfinite", POLICIES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected one of {', '.join(map(str, choices))}")
        if self.clip is not None:
            object.__setattr__(self, "clip", _limits(self.clip))
        if self.credit == "last":
            return
        if self.clip is not None and self.credit == "dense":
            raise ValueError(f"clip and credit {self.credit} exclude each other: a clipped score has no increments")
        if self.credit == "shaping" and self.normalize in ("batch", "group"):
            raise ValueError(
                f"credit shaping and normalize {self.normalize} exclude each other: the deviation depends on how the "
                "response goes on, so the prefix scores would be no potentials; use running or none"
            )
        if not callable(getattr(self.function, "increments", None)):
            raise ValueError(
                f"credit {self.credit} needs a reward with increments, which {called(self.function)} has not; "
                f"built-in rewards that have them: {', '.join(with_increments()) or 'none'}"
            )

    @property
    def signature(self) -> str:
        """Name, how it counts, and what the function says of itself, else its name and a hash of its source."""
        from reward_models.own import signature_of  # here: it imports asyncio, which not every use needs

        weight = f"{self.weight:g}" if isinstance(self.weight, float) else str(self.weight)
        options = [f"credit:{self.credit}"] if self.credit != "last" else []
        options += [f"normalize:{self.normalize}"] if self.normalize else []
        options += [f"clip:{self.clip[0]:g}..{self.clip[1]:g}"] if self.clip else []
        options += [f"nonfinite:{self.nonfinite}"] if self.nonfinite != "raise" else []
        says = getattr(self.function, "signature", None) or signature_of(self.function)
        return "|".join([f"{self.name} x {weight}", *options]) + f": {says}"

    @property
    def kind(self) -> str:
        """What a saved state must agree on: name, form of the weight, credit and normalisation."""
        form = form_of(self.weight)
        options = [f"weight:{form}"] if form != "number" else []
        options += [f"credit:{self.credit}"] if self.credit != "last" else []
        options += [f"normalize:{self.normalize}"] if self.normalize else []
        return "|".join([self.name, *options])


def _limits(clip: Any) -> tuple[float, float]:
    numbers = isinstance(clip, list | tuple) and all(isinstance(x, Real) and not isinstance(x, bool) for x in clip)
    if not numbers or len(clip) != 2 or not clip[0] < clip[1]:
        raise ValueError(f"clip is {clip!r}, expected (low, high) with low < high")
    return float(clip[0]), float(clip[1])


def called(function: Any) -> str:
    """What a function or object is called in messages."""
    return getattr(function, "__qualname__", None) or type(function).__qualname__

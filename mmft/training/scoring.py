"""The reward side as a trainer meets it: what it is given as rewards, whose weights they may share, how they fail."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

from mmft.vlm.policy import Policy
from reward_models import WeightedRewards


def as_rewards(reward_funcs, weights: list[float] | None):
    """One function, a list of them, or a ready combination -> a callable that returns total and parts."""
    if isinstance(reward_funcs, WeightedRewards):
        if weights is not None:
            raise ValueError("reward_weights belongs to plain functions; WeightedRewards has weights of its own")
        return reward_funcs
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    weights = weights if weights is not None else [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} entries for {len(functions)} reward functions")
    names: list[str] = []
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return WeightedRewards(list(zip(names, functions, weights, strict=True)))


class RewardError(RuntimeError):
    """A reward failed in the middle of a run."""


@contextmanager
def rewards_at(step: int):
    """Errors of rewards in one line: step, reward, row and what was raised. The reward's own error is the cause."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a reward that calls sys.exit must not look like a run that ended well
        where = ", ".join(note.removeprefix("in ") for note in getattr(error, "__notes__", []))
        said = f"{where}: {type(error).__name__}: {error}" if where else str(error)
        raise RewardError(f"step {step}: {said}") from error


def share_backbone(rewards, policy: Policy) -> None:
    """Lets learned rewards read the policy's own frozen base weights, one adapter more, instead of a second copy."""
    for part in rewards.parts:
        share = getattr(part.function, "share", None)
        if share is None or not hasattr(policy.model, "peft_config"):
            continue
        try:
            share(policy.model, policy.pictures.processor)
        except ValueError as reason:
            warnings.warn(f"reward {part.name!r} loads a model of its own: {reason}", stacklevel=2)

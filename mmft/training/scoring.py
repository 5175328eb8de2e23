"""The reward side as a trainer meets it: what it is given as rewards, whose weights they may share, how they fail."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mmft.vlm.policy import Policy
from reward_models import DocumentFrequencies, WeightedRewards
from reward_models.named import load_reward
from reward_models.rewards import RewardScores


def as_rewards(reward_funcs, weights: list[float] | None, rows: Any = None):
    """One function or name, a list of them, or a ready combination -> a callable that returns total and parts.

    Args:
        reward_funcs: names are those of recipes: built in, or ``path/to/file.py:function``.
        rows: of training; the references in them tell rewards by name how often words are used.

    Raises:
        ValueError: no reward has that name, or it needs what the rows have not.
    """
    if isinstance(reward_funcs, WeightedRewards):
        if weights is not None:
            raise ValueError("reward_weights belongs to plain functions; WeightedRewards has weights of its own")
        return reward_funcs
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    weights = weights if weights is not None else [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} entries for {len(functions)} reward functions")
    frequencies = _frequencies(rows) if any(isinstance(function, str) for function in functions) else None
    names: list[str] = []
    for i, function in enumerate(functions):
        if isinstance(function, str):
            name, functions[i] = function.rpartition(":")[2], load_reward(function, {}, frequencies)
        else:
            name = getattr(function, "__name__", type(function).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return WeightedRewards(list(zip(names, functions, weights, strict=True)))


def _frequencies(rows: Any) -> DocumentFrequencies | None:
    """Document frequencies of the references of rows; None where they have none."""
    if hasattr(rows, "references"):
        return DocumentFrequencies.from_references(rows.references())
    if rows is None or "references" not in (getattr(rows, "column_names", None) or rows[0]):
        return None
    if hasattr(rows, "column_names"):
        return DocumentFrequencies.from_references(rows["references"])  # a `datasets.Dataset`: no picture is opened
    return DocumentFrequencies.from_references([row["references"] for row in rows])


def score_texts(rewards, texts: list[str], rows: Sequence[dict[str, Any]], ended: list[bool]) -> RewardScores:
    """What the rewards say of texts, in the form that they know from training. The rows come opened."""
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(k for row in rows for k in row)}
    prompts = columns.pop("prompt", [""] * len(rows))
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    return rewards(prompts=prompts, completions=completions, ended=ended, **columns)


class HeldOutParts:
    """The reward and its parts on held-out rows, for the report alone.

    A run goes on without them where a reward fails: held-out rows may lack a column that it needs. That is told once.
    """

    def __init__(self, rewards):
        self.rewards, self.failed = rewards, False

    def __call__(self, texts: list[str], rows: Sequence[dict[str, Any]], ended: list[bool]) -> dict[str, np.ndarray]:
        if self.failed:
            return {}
        try:
            found = score_texts(self.rewards, texts, rows, ended)
        except (Exception, SystemExit) as error:
            self.failed = True
            where = ", ".join(note.removeprefix("in ") for note in getattr(error, "__notes__", []))
            said = f"{where}: {error}" if where else str(error)
            warnings.warn(f"the report will not have the reward's parts on held-out rows: {said}", stacklevel=2)
            return {}
        return {"reward": np.asarray(found.plain)} | {f"reward/{k}": np.asarray(v) for k, v in found.parts.items()}


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

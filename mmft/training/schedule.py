"""Which rows a step learns from, and at which learning rate: functions of the step alone.

So a resumed run needs neither a cursor nor a scheduler's state, and any number of processes shares the same rows.
"""

from __future__ import annotations

import math

import numpy as np

from mmft.batch import PromptBatch
from mmft.training.config import PPOConfig


def rows_of_step(step: int, rows: int, config: PPOConfig, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
    """(place in the order of the whole run, index of the row) of the prompts that this process has in a step.

    Args:
        rows: size of the training set; every pass through it is shuffled anew.
    """
    first = (step - 1) * config.prompts_per_step
    # Runs of M = num_mini_batches rows in turns, so that each process holds its share of every minibatch.
    mine = [
        place
        for place in range(first, first + config.prompts_per_step)
        if (place - first) // config.num_mini_batches % world == rank
    ]
    order = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(rows) for epoch in {p // rows for p in mine}
    }
    return [(place, int(order[place // rows][place % rows])) for place in mine]


def places(prompts: PromptBatch) -> list[int]:
    """Where each prompt stands in the order of the whole run; its row id says so after the @."""
    return [int(row_id.rpartition("@")[2]) for row_id in prompts.row_ids]


def learning_rate_factor(step: int, config: PPOConfig) -> float:
    """What the learning rates are multiplied by in a step: warm-up, then the decay that was asked for."""
    factor = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    progress = (step - 1) / max(config.max_steps, 1)
    if config.lr_scheduler_type == "linear":
        factor *= 1.0 - progress
    elif config.lr_scheduler_type == "cosine":
        factor *= 0.5 * (1.0 + math.cos(math.pi * progress))
    return factor

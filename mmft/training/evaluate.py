"""Held-out evaluation: greedy responses to rows, and what the metrics say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmft.training.rollout import decode
from mmft.vlm.generate import generate
from mmft.vlm.policy import Policy

# texts and rows of a held-out set -> metric -> one number per row
Metrics = Callable[[list[str], Sequence[dict[str, Any]]], dict[str, np.ndarray]]


@dataclass
class Evaluation:
    """Responses to held-out rows, in the rows' order, and metric -> (rows,) numbers."""

    texts: list[str]
    metrics: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        return {name: float(np.nanmean(values)) for name, values in self.metrics.items() if not np.isnan(values).all()}


@torch.no_grad()
def evaluate(
    policy: Policy,
    dataset,
    metrics: Metrics,
    rows: int,
    max_new_tokens: int,
    batch: int = 64,
    accelerator: Accelerator | None = None,
    reference: bool = False,
) -> Evaluation:
    """Greedy responses to the first ``rows`` rows, shared by the processes.

    Args:
        dataset: rows as the trainers take them.
        batch: prompts decoded together.
        reference: of the policy with its adapters switched off.
    """
    size = min(len(dataset), rows)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = range(size)[rank::world]
    texts: list[tuple[int, str]] = []
    for start in range(0, len(mine), batch):
        chunk = list(mine[start : start + batch])
        opened = [dataset[i] for i in chunk]
        ids = [str(row.get("id", i)) for row, i in zip(opened, chunk, strict=True)]
        prompts = policy.pictures.prompts(opened, ids, policy.device)
        with policy.as_reference() if reference else nullcontext(), _autocast(accelerator):
            responses, _ = generate(policy, prompts, 1, max_new_tokens, temperature=0.0)
        texts += zip(chunk, decode(policy, responses), strict=True)
    if world > 1:
        texts = gather_object(texts)
    ordered = [text for _, text in sorted(texts)]
    return Evaluation(ordered, metrics(ordered, [text_row(dataset, i) for i in range(size)]))


def text_row(dataset, index: int) -> dict[str, Any]:
    """A row without opening its picture, where the dataset can."""
    return dataset.text(index) if hasattr(dataset, "text") else dataset[index]


def _autocast(accelerator: Accelerator | None):
    return accelerator.autocast() if accelerator else nullcontext()

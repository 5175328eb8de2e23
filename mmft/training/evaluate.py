"""Held-out evaluation: greedy responses to rows, and what the metrics say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmft.vlm.generate import decode, generate
from mmft.vlm.policy import Policy

# texts, rows and "ended by itself" of a held-out set -> metric -> one number per row
Metrics = Callable[[list[str], Sequence[dict[str, Any]], list[bool]], dict[str, np.ndarray]]


@dataclass
class Evaluation:
    """Responses to held-out rows, in the rows' order, and metric -> (rows,) numbers.

    parts: "reward" and "reward/PART" -> (rows,), for the report; NaN = not scored. Empty where they are the metrics.
    """

    texts: list[str]
    metrics: dict[str, np.ndarray]
    parts: dict[str, np.ndarray] = field(default_factory=dict)

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
    parts: Metrics | None = None,
) -> Evaluation:
    """Greedy responses to the first ``rows`` rows, shared by the processes.

    Args:
        dataset: rows as the trainers take them.
        batch: prompts decoded together.
        parts: the reward and its parts of a batch, whose rows come opened.
    """
    size = min(len(dataset), rows)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = range(size)[rank::world]
    found: list[tuple[int, str, bool, list[int], dict[str, float]]] = []
    for start in range(0, len(mine), batch):
        chunk = list(mine[start : start + batch])
        opened = [dataset[i] for i in chunk]
        ids = [str(row.get("id", i)) for row, i in zip(opened, chunk, strict=True)]
        prompts = policy.pictures.prompts(opened, ids, policy.device)
        with _autocast(accelerator):
            responses, _ = generate(policy, prompts, 1, max_new_tokens, temperature=0.0)
        tokens = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
        texts, ended = decode(policy, responses), responses.ended.tolist()
        opened = [row | {"completion_ids": ids} for row, ids in zip(opened, tokens, strict=True)]
        scores = parts(texts, opened, ended) if parts else {}
        by_row = [{name: float(values[k]) for name, values in scores.items()} for k in range(len(chunk))]
        found += zip(chunk, texts, ended, tokens, by_row, strict=True)
    if world > 1:
        found = gather_object(found)
    found.sort(key=lambda response: response[0])
    texts, ended = [text for _, text, _, _, _ in found], [done for _, _, done, _, _ in found]
    opened = [text_row(dataset, i) | {"completion_ids": ids} for i, _, _, ids, _ in found]
    names = dict.fromkeys(name for *_, scores in found for name in scores)
    scored = {name: np.array([scores.get(name, np.nan) for *_, scores in found]) for name in names}
    return Evaluation(texts, metrics(texts, opened, ended), scored)


def text_row(dataset, index: int) -> dict[str, Any]:
    """A row without opening its picture, where the dataset can."""
    return dataset.text(index) if hasattr(dataset, "text") else dataset[index]


def _autocast(accelerator: Accelerator | None):
    return accelerator.autocast() if accelerator else nullcontext()

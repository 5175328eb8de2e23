"""What a checkpoint and the run that resumes it must have in common: a resumed run is to be the same run.

Settings that a user may want to change on the way (learning rate, number of steps, how often to save) do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mmft.training.distributed import layout
from mmft.training.evaluate import text_row
from mmft.vlm.media import NAMES
from reward_models.preference.backbone import fingerprint as weights_digest

if TYPE_CHECKING:
    from mmft.training.trainer import PPOTrainer
    from mmft.vlm.policy import Policy

_MOST_ROWS = 20_000  # looked at, spread evenly: a second's work
_MEDIA = {"images", *NAMES}


def fingerprint(trainer: PPOTrainer) -> dict[str, Any]:
    """Field -> plain value. Asked before a checkpoint is loaded, where every weight is whole."""
    config, model = trainer.config, trainer.policy.model
    adapters = getattr(model, "peft_config", {})
    trained = [adapters[name] for name in model.active_adapters] if adapters else []
    shapes = {n: list(p.shape) for n, p in trainer.policy.named_parameters() if p.requires_grad}
    held_out = trainer.eval_dataset
    return {
        "algorithm": type(config).__name__.removesuffix("Config").lower(),
        "seed": config.seed,
        "critic": config.critic,
        "prompts_per_step": config.prompts_per_step,
        "num_generations": config.num_generations,
        "lora_rank": [adapter.r for adapter in trained],
        "lora_target": [_target(adapter.target_modules) for adapter in trained],
        "optimizer": config.optimizer,
        "trained_weights": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16],
        "base_model": weights_digest(model),
        "start": _start(trainer.policy),
        "dataset": rows_digest(trainer.train_dataset),
        "held_out": None if held_out is None else rows_digest(held_out, config.eval_rows),
        "rewards": trainer.signatures(),
        **layout(trainer.accelerator),
    }


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], where: str, allowed: Collection[str] = ()) -> None:
    """Compares two fingerprints.

    Args:
        allowed: fields that may differ.

    Raises:
        ValueError: naming every field that differs with both values, and how to go on all the same; or an unknown
            field in ``allowed``.
    """
    if odd := sorted(set(allowed) - set(now)):
        raise ValueError(f"--allow-change {odd[0]}: expected one of {', '.join(now)}")
    wrong = [name for name in differing(saved, now) if name not in allowed]
    if wrong:
        flags = " ".join(f"--allow-change {name}" for name in wrong)
        raise ValueError(
            f"{where}: {told(wrong, saved, now)}. It would not be the same run; to resume all the same: {flags}"
        )


def differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields in which two fingerprints differ."""
    return [name for name in now if saved.get(name) != now[name]]


def told(fields: Collection[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Old and new value of each field."""
    return "; ".join(f"made with {name} {saved.get(name)}, this run has {name} {now[name]}" for name in fields)


def rows_digest(dataset: Any, limit: int | None = None) -> str:
    """Number and content of rows as text: ids, prompts, references and whatever else can be written as JSON.

    Pictures are known by the row's id or file name; opening them all would take minutes. Of more than 20,000 rows so
    many are looked at.

    Args:
        limit: the first so many rows only.
    """
    if hasattr(dataset, "remove_columns"):  # of `datasets`, where reading a row opens its pictures
        dataset = dataset.remove_columns([name for name in dataset.column_names if name in _MEDIA])
    size = len(dataset) if limit is None else min(limit, len(dataset))
    digest = hashlib.sha256(str(size).encode())
    for i in range(0, size, -(-size // _MOST_ROWS)):
        row = {name: value for name, value in text_row(dataset, i).items() if name not in _MEDIA}
        digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return f"{size} rows {digest.hexdigest()[:16]}"


def _target(modules: Any) -> Any:
    return modules if isinstance(modules, str) else sorted(modules)


def _start(policy: Policy) -> str | None:
    """The adapter that training started from and that the reference keeps; None for a new one, which says nothing."""
    digest = hashlib.sha256()
    kept = [reference for reference in policy._reference if hasattr(reference, "peft_config")]
    for name, weight in sorted(kept[0].named_parameters()) if kept else ():
        if "lora_" in name or "modules_to_save" in name:
            digest.update(name.encode() + weight.detach().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if kept else None

"""Folders as runs leave them, without the training: every trained weight is moved at random instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmft.recipe import Recipe
from mmft.recipe.sections import Model
from mmft.training.checkpoint import save_adapter
from mmft.vlm.generate import decode, generate
from mmft.vlm.load import build_policy, load_model, tune
from mmft.vlm.policy import Policy

# What `model` of a recipe may be, each with traces of its own in the run folder.
TUNED: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4}},
    "dora": {"lora": {"r": 4, "dora": True}},
    "rslora": {"lora": {"r": 4, "rslora": True}},
    "hybrid": {"tune": "hybrid", "lora": {"r": 4}},
    "frozen": {"tune": "frozen", "trained_layers": 1},
    "full": {"tune": "full"},
    "nf4": {"quantize": "nf4", "lora": {"r": 4}},
}


def made_run(folder: Path, model: dict[str, Any], scale: float = 0.1, **recipe: Any) -> Policy:
    """Writes adapter/ or model/, processor/ and recipe.yaml; the policy they are of."""
    options = Model(**model)
    torch.manual_seed(0)
    base, processor = load_model(options.name, options.quantize)
    policy = build_policy(base, processor, tune(base, options), needs_reference=False)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * scale * (1.0 if "lora_" in name else 3 * parameter.std()))
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(policy, folder)
    processor.save_pretrained(folder / "processor")
    Recipe(model=options, **recipe).dump(folder / "recipe.yaml")
    return policy.eval()


def greedy(policy: Policy, rows: list[dict[str, Any]], length: int = 24) -> list[str]:
    prompts = policy.pictures.prompts(rows, [str(i) for i in range(len(rows))], policy.device)
    return decode(policy, generate(policy, prompts, 1, length, 0.0)[0])

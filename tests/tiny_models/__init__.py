"""Tiny random checkpoints of real families, built here: no download, about a second each.

Each is saved with `save_pretrained`, model and processor, and loads the way a hub id does. They keep what makes each
family hard: LLaVA's dropped class token and early feature layer; tiles (LLaVA-NeXT and OneVision, SmolVLM, Idefics3,
InternVL) or pictures of any size (Qwen, Mistral 3, Pixtral), so that the number of picture tokens follows the shape of
the picture; OneVision's one tile a picture where there are several; Idefics2's sliding window, shorter than its
prompts; Qwen's multimodal rotary positions, windows (2.5) and deepstack features (3). The weights are drawn wide enough
that the softmax has peaks and that the picture matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from tiny_models import idefics, llava, more, qwen, tiles

# Family (the model_type of the configuration, but for Pixtral) -> a function without arguments that makes (model,
# processor).
_BUILDERS: dict[str, Callable] = {
    **llava.BUILDERS,
    **idefics.BUILDERS,
    **qwen.BUILDERS,
    **tiles.BUILDERS,
    **more.BUILDERS,
}
FAMILIES = list(_BUILDERS)


@torch.no_grad()
def _widen(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix so that signals keep their size: the usual std 0.02 makes 64 wide models uniform."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, 0.5, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, 1 / math.sqrt(fan_in), generator=generator)
            if module.bias is not None:
                module.bias.normal_(0.0, 0.1, generator=generator)
    for table in model.parameters():
        # Positions, class tokens and latents that start alike (zeros, ones): a mix-up of them would not be seen.
        if table.dim() > 1 and bool((table == table.flatten()[0]).all()):
            table.normal_(0.0, 0.5, generator=generator)
    head = model.get_output_embeddings().weight
    head.normal_(0.0, 0.2, generator=generator)


def build(family: str, folder: Path | str, seed: int = 0) -> Path:
    """Write a tiny fp32 checkpoint of `family`, with its processor, into `folder` (made if missing).

    Returns:
        The folder, ready for `AutoModelForImageTextToText` and `AutoProcessor`.

    Raises:
        KeyError: for a family that is not in FAMILIES.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _BUILDERS[family]()
        _widen(model, torch.Generator().manual_seed(seed))
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

"""Features of sounds where a model has no method of its own for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling


def qwen2_audio_features(
    body: nn.Module, input_features: Tensor, feature_attention_mask: Tensor, **kwargs
) -> BaseModelOutputWithPooling:
    """Sounds (S, mel bins, frames) and their mask (S, frames) -> a (tokens, H) tensor per sound.

    `Qwen2AudioModel` does this inside its forward: silence behind a sound is neither heard nor given tokens.
    """
    tower = body.audio_tower
    heard, tokens = tower._get_feat_extract_output_lengths(feature_attention_mask.sum(-1))
    steps = (input_features.shape[-1] - 2) // 2 + 1  # behind the tower's convolutions
    mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=input_features.new_zeros(len(input_features), steps, 1, dtype=tower.dtype),
        attention_mask=(torch.arange(steps, device=heard.device) < heard[:, None]).long(),
    )
    features = body.multi_modal_projector(tower(input_features, attention_mask=mask).last_hidden_state)
    return BaseModelOutputWithPooling(pooler_output=[f[:n] for f, n in zip(features, tokens.tolist(), strict=True)])

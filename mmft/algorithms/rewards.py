"""From one score per response to one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from mmft.algorithms.masked import zero_outside


def token_rewards(
    scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float, shaping: Tensor | None = None
) -> Tensor:
    """r_t = -kl_coef * kl_t + shaping_t, and the score on top at the last real token (Ziegler et al. 2019, eq. 2).

    Args:
        scores: (N,) score of each whole response.
        kl: (N, T) KL of each token, nats.
        response_mask: (N, T) bool.
        kl_coef: cost of a nat; >= 0.
        shaping: (N, T) dense rewards, or None.

    Returns:
        (N, T), 0 outside the mask. A response without a real token gets nothing: it took no action that the score
        could reward, so its score is not read.
    """
    assert scores.shape == kl.shape[:1], f"scores {tuple(scores.shape)} do not fit kl {tuple(kl.shape)}"
    rewards = -kl_coef * zero_outside(kl, response_mask)
    if shaping is not None:
        rewards = rewards + zero_outside(shaping, response_mask)
    left = response_mask.flip(-1).cumsum(-1).flip(-1)  # real tokens from here to the end
    last = response_mask & (left == 1)
    return rewards + torch.where(last, scores[:, None], torch.zeros_like(scores[:, None]))


def apply_missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """scores - penalty where the response was cut off before its end-of-sequence token: (N,), (N,) bool -> (N,)."""
    assert ended.dtype == torch.bool and ended.shape == scores.shape
    return torch.where(ended, scores, scores - penalty)

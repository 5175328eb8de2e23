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


def potential_shaping(potentials: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """F_t = gamma * Phi(s_{t+1}) - Phi(s_t) (Ng, Harada and Russell 1999, eq. 2).

    Phi is 0 before the first token and in the terminal state, whatever ``potentials`` holds there, so that
    sum_t gamma^t F_t = 0 for every response: the shaped return from the start is the unshaped one, and the best
    policy stays the best. What changes is when the credit arrives. With gamma = 1 and the score itself as potential,
    score on the last token + F equals the increments of the score, token by token.

    Args:
        potentials: (N, T), Phi of the state after each token.
        mask: (N, T) bool; masked tokens are skipped as if they were not there.
        gamma: the discount of the returns; another one would change the best policy.

    Returns:
        (N, T), 0 outside the mask.
    """
    potentials = zero_outside(potentials, mask)
    left = mask.flip(-1).cumsum(-1).flip(-1)
    after = torch.where(left == 1, torch.zeros_like(potentials), potentials)  # the end is worth nothing
    before, carry = [], potentials.new_zeros(len(potentials))
    for phi, real in zip(after.unbind(1), mask.unbind(1), strict=True):
        before.append(carry)
        carry = torch.where(real, phi, carry)
    return zero_outside(gamma * after - torch.stack(before, 1), mask) if before else after


def apply_missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """scores - penalty where the response was cut off before its end-of-sequence token: (N,), (N,) bool -> (N,)."""
    assert ended.dtype == torch.bool and ended.shape == scores.shape
    return torch.where(ended, scores, scores - penalty)

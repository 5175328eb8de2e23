"""Credit assignment: what each token earned, and how that compares with what was foreseen.

Time runs over the real tokens alone. A False in the mask is skipped as if it were not there, at the end (padding), at
the start, or in between (tokens that the policy did not choose): results equal those of the response with its masked
tokens cut out. The episode ends at the last real token; nothing is bootstrapped beyond it, whether the response ended
by itself or was cut off. Results are 0 outside the mask. All tensors are (N, T); the loop runs over T only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmft.algorithms.masked import zero_outside


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{l >= 0} gamma^l r_{t+l} (Sutton & Barto 2018, eq. 3.8), by G_t = r_t + gamma G_{t+1} (eq. 3.9).

    gamma = 0: the rewards. gamma = 1: rewards still to come.
    """
    return _accumulate(zero_outside(rewards, mask), mask, gamma)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 11 to 16) and the critic's targets.

        delta_t = r_t + gamma V_{t+1} - V_t          (V = 0 after the last real token)
        A_t     = sum_{l >= 0} (gamma lam)^l delta_{t+l}
        R_t     = A_t + V_t

    lam = 0: A_t = delta_t (little variance, all of the critic's bias). lam = 1: A_t + V_t = the discounted return
    (no bias).

    Args:
        values: V of the state *before* each token, in the units of the rewards.

    Returns:
        (advantages, returns), both (N, T), 0 outside the mask.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    deltas = zero_outside(rewards + gamma * _next(values, mask) - values, mask)
    advantages = _accumulate(deltas, mask, gamma * lam)
    return advantages, advantages + values


def td_lambda_returns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The lambda-return (Sutton & Barto 2018, eq. 12.3), by its recursion (eq. 12.18):

        G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1})          (V = G = 0 after the last real token)

    lam = 0: one-step TD target. lam = 1: the discounted return. Equals ``gae(...)[1]``.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    targets = zero_outside(rewards + gamma * (1 - lam) * _next(values, mask), mask)
    return _accumulate(targets, mask, gamma * lam)


def leave_one_out(scores: Tensor, group_size: int, keep: Tensor | None = None) -> Tensor:
    """A_i = s_i - mean of the other scores of its group (Kool et al. 2019, "Buy 4 REINFORCE samples").

    The baseline of a response is independent of that response, so the policy gradient stays unbiased; the mean over
    the whole group, itself included, would shrink it by (G - 1) / G.

    Args:
        scores: (N,), the ``group_size`` responses of one prompt next to each other.
        keep: (N,) bool, None = all. A response left out gets 0 and takes no part in the others' means; so does one
            that has no other left to be compared with.

    Returns:
        (N,); each group sums to 0.

    Raises:
        ValueError: groups of one, or scores that do not fill whole groups.
    """
    if group_size < 2:
        raise ValueError(
            f"leave_one_out needs at least 2 responses to each prompt, got {group_size}: "
            "raise num_generations or train a critic"
        )
    if scores.dim() != 1 or len(scores) % group_size:
        raise ValueError(f"leave_one_out: scores {tuple(scores.shape)} do not fill whole groups of {group_size}")
    kept = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep
    groups, number = zero_outside(scores, kept).view(-1, group_size), kept.view(-1, group_size).sum(-1, keepdim=True)
    others = (groups.sum(-1, keepdim=True) - groups) / (number - 1).clamp_min(1)
    return zero_outside(groups - others, kept.view(-1, group_size) & (number > 1)).view(-1)


def _accumulate(x: Tensor, mask: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay * y_{next real token}, 0 outside the mask; x is 0 there already."""
    carry = x.new_zeros(x.shape[0])
    out = []
    for x_t, real in zip(reversed(x.unbind(1)), reversed(mask.unbind(1)), strict=True):
        carry = torch.where(real, x_t + decay * carry, carry)
        out.append(carry)
    return zero_outside(torch.stack(out[::-1], 1), mask) if out else x


def _next(x: Tensor, mask: Tensor) -> Tensor:
    """x at the next real token, 0 where there is none."""
    following = x.new_zeros(x.shape[0])
    out = []
    for x_t, real in zip(reversed(x.unbind(1)), reversed(mask.unbind(1)), strict=True):
        out.append(following)
        following = torch.where(real, x_t, following)
    return torch.stack(out[::-1], 1) if out else x

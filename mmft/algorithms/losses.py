"""What the optimizer minimises. Every loss is a sum over real tokens divided by ``denominator``.

``denominator`` is the number of real tokens of this call (the default), or, for a loss made of several microbatches
or processes, of all of them: then the shares add up to the loss of the whole, whatever the cut. With no real token
the loss is 0. Statistics are plain means over the real tokens of this call, without gradient.

Inputs are (N, T). Only ``new_…`` carries a gradient; everything else is data and is detached here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmft.algorithms.kl import kl_estimate
from mmft.algorithms.masked import masked_mean, masked_sum, zero_outside


def ppo_policy_loss(
    new_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float | tuple[float, float],
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp(new - old) (Schulman et al. 2017, eq. 7, with its sign turned).

    The gradient of a token is exactly 0 once its ratio has gone beyond the clip in the direction its advantage asked
    for, and whole in the other direction. At r = 1 it is that of ``a2c_policy_loss``. An exploded ratio is not capped
    here: it is to be seen, and stopped, before the step.

    Args:
        cliprange: eps for (1 - eps, 1 + eps), or (low, high) for (1 - low, 1 + high).

    Returns:
        (loss (), stats), stats being 0-d tensors: ``ratio_mean``; ``ratio_max`` (0 without a token);
        ``clip_fraction``, the share of tokens whose gradient the clip took away; ``approx_kl``, k3 of
        KL(old || new), nats per token.
    """
    low, high = (cliprange, cliprange) if isinstance(cliprange, int | float) else cliprange
    assert low >= 0 and high >= 0, f"cliprange {cliprange} is negative"
    old_logprobs = zero_outside(old_logprobs.detach(), mask)
    advantages = zero_outside(advantages.detach(), mask)
    new_logprobs = zero_outside(new_logprobs, mask)
    ratio = torch.exp(new_logprobs - old_logprobs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    loss = _share(torch.maximum(plain, clipped), mask, denominator)
    with torch.no_grad():
        stats = {
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": zero_outside(ratio, mask).max() if mask.numel() else ratio.sum(),
            "clip_fraction": masked_mean((clipped > plain).to(ratio.dtype), mask),
            "approx_kl": masked_mean(kl_estimate(old_logprobs, new_logprobs, "k3"), mask),
        }
    return loss, stats


def value_loss(
    new_values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float | None = None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 (V - R)^2, or with a clip 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    The clip is that of the PPO authors' code (OpenAI baselines, ppo2), not of the paper: a value that has moved by
    more than c towards its return gets no gradient.

    Returns:
        (loss (), {"clip_fraction": share of tokens whose gradient the clip took away, 0-d}).
    """
    new_values = zero_outside(new_values, mask)
    returns = zero_outside(returns.detach(), mask)
    plain = (new_values - returns).square()
    if cliprange_value is None:
        return _share(0.5 * plain, mask, denominator), {"clip_fraction": plain.new_zeros(())}
    assert cliprange_value >= 0, f"cliprange_value {cliprange_value} is negative"
    old_values = zero_outside(old_values.detach(), mask)
    bounded = new_values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    clipped = (bounded - returns).square()
    loss = _share(0.5 * torch.maximum(plain, clipped), mask, denominator)
    return loss, {"clip_fraction": masked_mean((clipped > plain).to(plain.dtype).detach(), mask)}


def a2c_policy_loss(
    new_logprobs: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """-A log pi: (), whose gradient is minus the policy gradient (Mnih et al. 2016, section 4)."""
    new_logprobs = zero_outside(new_logprobs, mask)
    return _share(-zero_outside(advantages.detach(), mask) * new_logprobs, mask, denominator)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """H = -sum_v p_v log p_v, p = softmax(logits): (…, V) -> (…), nats.

    Banned tokens (logit -inf) have p = 0 and add nothing, to the value or to the gradient (0 log 0 = 0, where plain
    arithmetic gives NaN). A row with every token banned has no distribution: NaN.
    """
    logprobs = torch.log_softmax(logits, -1)
    return -(logprobs.exp() * logprobs.masked_fill(logits == -torch.inf, 0)).sum(-1)


def _share(x: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Sum over the mask / denominator; a denominator of 0 (no token anywhere) counts as 1."""
    count = torch.as_tensor(mask.sum() if denominator is None else denominator, dtype=x.dtype, device=x.device)
    return masked_sum(x, mask) / torch.where(count > 0, count, torch.ones_like(count))

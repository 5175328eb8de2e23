"""Where the critic starts: fitted by least squares to the first step's returns instead of at zero.

A value head that starts at zero needs several steps of gradient descent before it says anything, and until then the
advantages are the bare returns. The head is linear, so the best one for the first batch is known in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmft.algorithms.returns import discounted_returns
from mmft.batch import Rollout
from mmft.training.config import PPOConfig
from mmft.vlm.policy import Policy

# Penalties that are tried, in shares of each feature's own variance; infinity is the mean return alone.
# Of equal ones the strongest wins: with a single prompt there is nothing to choose by.
_RIDGES = (float("inf"), 10.0, 1.0, 1e-1, 1e-2, 1e-3)


@torch.no_grad()
def fit_critic(policy: Policy, rollout: Rollout, config: PPOConfig, halves: list[int], reduce=None) -> None:
    """Sets the value head to the ridge regression of the discounted returns on the last hidden states.

    Monte Carlo policy evaluation with a linear function (Bradtke and Barto 1996, with lambda = 1). The prompts are
    split into halves; the penalty is the one whose fit to either half foretells the other half best. The head takes
    the fit to both; ``rollout.old.values`` become those of the fit to the *other* half, so that no weight of a
    response's value has seen its own return (the penalty, one number of six, has). All processes come to the same head.

    Args:
        rollout: with ``rewards`` (N, T) filled in.
        halves: 0 or 1 for each prompt; the same split however many processes share the prompts.
        reduce: sums a tensor over processes; None = one process.
    """
    rows = torch.tensor(halves).repeat_interleave(config.num_generations)
    hidden = _hidden(policy, rollout, config)
    mask = rollout.responses.mask
    half = rows.to(mask.device)[:, None].expand_as(mask)[mask]
    weight = rollout.update_mask[mask].double()
    returns = discounted_returns(rollout.rewards, mask, config.gamma)[mask].double()
    features = torch.cat([hidden.double(), returns.new_ones(len(returns), 1), returns[:, None]], -1)
    # Everything that a fit and its error need is in the products of features, one and return: (H + 2, H + 2).
    products = torch.stack([(features * (weight * (half == h))[:, None]).T @ features for h in (0, 1)])
    if reduce is not None:
        products = reduce(products.flatten()).view_as(products)
    errors = [sum(_error(products[1 - h], _ridge(products[h], ridge)) for h in (0, 1)) for ridge in _RIDGES]
    ridge = _RIDGES[int(torch.stack(errors).argmin())]
    both = _ridge(products.sum(0), ridge)
    policy.value_head.weight.copy_(both[None, :-1])
    policy.value_head.bias.copy_(both[-1:])
    other = torch.stack([_ridge(products[1 - h], ridge) for h in (0, 1)])  # (2, H + 1)
    values = (features[:, :-1] * other[half]).sum(-1)
    rollout.old.values = torch.zeros_like(rollout.old.values).masked_scatter(mask, values.to(rollout.old.values.dtype))


def _hidden(policy: Policy, rollout: Rollout, config: PPOConfig) -> Tensor:
    """(M, H) states from which the M real response tokens are predicted, in the order of the mask."""
    groups = list(range(len(rollout.prompts)))
    size = config.micro_prompts or len(groups)
    found = []
    for first in range(0, len(groups), size):
        some = groups[first : first + size]
        responses = rollout.responses.select_groups(some, config.num_generations)
        found.append(policy.predictors(rollout.prompts.select(some), responses))
    return torch.cat(found)


def _ridge(products: Tensor, ridge: float) -> Tensor:
    """(H + 1,) weights and bias from the products of (features, 1, target); the bias is not penalised."""
    count = products[-2, -2].clamp_min(1)
    means = products[-2] / count
    centred = products - count * torch.outer(means, means)
    covariance, cross = centred[:-2, :-2], centred[:-2, -1]
    if ridge == float("inf"):
        weights = torch.zeros_like(cross)
    else:
        spread = covariance.diagonal().clamp_min(0).sqrt()
        # A feature that does not vary (two prompts, say, and one token each) says nothing, whatever rounding left.
        spread = torch.where(spread > 1e-9 * products.diagonal()[:-2].sqrt(), spread, float("inf"))
        correlation = covariance / torch.outer(spread, spread) + ridge * torch.eye(len(cross)).to(covariance)
        weights = torch.linalg.solve(correlation, cross / spread) / spread
    return torch.cat([weights, (means[-1] - weights @ means[:-2])[None]])


def _error(products: Tensor, fit: Tensor) -> Tensor:
    """Sum of squared errors of a fit on the rows behind the products."""
    full = torch.cat([fit, -torch.ones_like(fit[:1])])
    return full @ products @ full

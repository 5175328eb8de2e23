"""Statistics over the real tokens, of one process or of all of them.

``reduce`` takes a 1-D tensor of sums and returns its sum over all processes; None = this process alone. Every
process must make the same call, a process without a single real token too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask is True, 0 elsewhere, whatever stands there. Any shape, the same for both.

    A product with the mask would keep NaN and inf (NaN * 0 = NaN), in the value and in the gradient.
    """
    assert mask.dtype == torch.bool, f"a mask is bool, not {mask.dtype}"
    assert x.shape == mask.shape, f"tensor {tuple(x.shape)} and mask {tuple(mask.shape)} differ in shape"
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x over the mask: (…) -> (). 0 for an empty mask."""
    return zero_outside(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Mean of x over the mask of all processes: (…) -> (). 0 for an empty mask."""
    _, mean, _ = _moments(x, mask, reduce)
    return mean.to(x.dtype)


def masked_var(x: Tensor, mask: Tensor, reduce: Reduce | None = None, unbiased: bool = True) -> Tensor:
    """Variance of x over the mask of all processes: sum (x - mean)^2 / (n - 1), or / n when not ``unbiased``.

    (…) -> (). 0 for a mask with no token or, ``unbiased`` or not, a single one.
    """
    count, _, squares = _moments(x, mask, reduce)
    return (squares / (count - int(unbiased)).clamp_min(1)).to(x.dtype)


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce | None = None, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask of all processes, with the unbiased variance.

    Args:
        shift_mean: True leaves the mean at 0 (advantages). False puts the mean back, unscaled (rewards, whose sign
            and offset mean something): whitened + mean.

    Returns:
        The shape of x; 0 outside the mask. Where every real value is the same: 0, or that value for ``shift_mean``
        False.
    """
    count, mean, squares = _moments(x, mask, reduce)
    var = squares / (count - 1).clamp_min(1)
    # Cleaned before the product too: garbage would come back through the gradient of the deviation.
    white = (zero_outside(x, mask) - mean) * torch.rsqrt(var + eps)
    if not shift_mean:
        white = white + mean
    return zero_outside(white.to(x.dtype), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask of all processes: (N, T) x 3 -> ().

    1 = the critic foresees every return; 0 = no better than a constant; below 0 = worse than a constant. A constant
    offset of the critic does not show. 0 where the returns do not vary (the ratio would be NaN), or the mask is
    empty.
    """
    _, mean, total = _moments(returns, mask, reduce)
    count, _, left = _moments(returns - values, mask, reduce)
    # Equal numbers such as 0.1 leave a rounding residue in the centred squares: not variance.
    constant = total <= count * (torch.finfo(total.dtype).eps * mean) ** 2
    return torch.where(constant, 0.0, 1 - left / torch.where(constant, 1.0, total)).to(returns.dtype)


def _moments(x: Tensor, mask: Tensor, reduce: Reduce | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and centred sum of squares, each ().

    The corrected two-pass algorithm (Chan, Golub & LeVeque 1983): the sum of centred values would be 0 without
    rounding; what it is instead corrects the squares. E[x^2] - E[x]^2 would lose all digits once
    |mean| >> deviation. bfloat16 counts no further than 256, so statistics are kept in float32 at least.
    """
    x = zero_outside(x, mask).to(torch.promote_types(x.dtype, torch.float32))
    sums = torch.stack([x.sum(), mask.sum().to(x.dtype)])
    total, count = (reduce(sums) if reduce else sums).unbind()
    n = count.clamp_min(1)
    mean = total / n
    centred = zero_outside(x - mean, mask)
    sums = torch.stack([centred.sum(), centred.square().sum()])
    residue, squares = (reduce(sums) if reduce else sums).unbind()
    return count, mean, (squares - residue**2 / n).clamp_min(0)

"""How far the policy has gone from the reference, and what that costs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) at each token, from the one token that the policy sampled.

    With d = log ref - log policy (Schulman 2020, "Approximating KL divergence"):
        k1 = -d              unbiased, of either sign
        k2 = d^2 / 2         biased, never negative, low variance
        k3 = e^d - 1 - d     unbiased, never negative

    Args:
        logprobs, ref_logprobs: (N, T), nats, of the tokens sampled from the policy.

    Returns:
        (N, T) in nats. There is no mask: garbage in is garbage out in that same place.

    Raises:
        ValueError: unknown ``kind``.
    """
    d = ref_logprobs - logprobs
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        # expm1 keeps the digits that e^d - 1 loses near 0; the clamp takes off its last rounding.
        return (torch.expm1(d) - d).clamp_min(0)
    raise ValueError(f"kl estimator {kind!r} is unknown; choose one of {', '.join(KINDS)}")


class FixedKL:
    """A KL coefficient that stays as it is. ``value`` is the coefficient, per nat.

    Raises:
        ValueError: a negative or non-finite coefficient.
    """

    def __init__(self, coef: float):
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"kl_coef is {coef}; expected a finite number >= 0")
        self.value = float(coef)

    def update(self, kl: float, steps: int) -> None:
        """Nothing to learn from the measured KL."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises ValueError where the state holds no coefficient."""
        if "value" not in state:
            raise ValueError(f"KL coefficient state has keys {sorted(state)}; expected 'value'")
        self.value = float(state["value"])


class AdaptiveKL(FixedKL):
    """A proportional controller in log space (Ziegler et al. 2019, section 2.2).

        e = clip((KL - target) / target, -0.2, 0.2);    coef <- coef * (1 + e * steps / horizon)

    One update changes the coefficient by 20 % at most: steps / horizon counts as 1 when it is more, else a large
    batch could turn the sign of the penalty.

    Args:
        coef: where to start; above 0, for the rule only ever multiplies.
        target: wanted KL of a whole response, nats.
        horizon: responses over which a full error (0.2) has its full effect.

    Raises:
        ValueError: an argument that is not finite and above 0.
    """

    def __init__(self, coef: float, target: float, horizon: float):
        super().__init__(coef)
        for name, number in (("kl_coef", coef), ("target", target), ("horizon", horizon)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"adaptive KL: {name} is {number}; expected a finite number above 0")
        self.target, self.horizon = float(target), float(horizon)

    def update(self, kl: float, steps: int) -> None:
        """Moves the coefficient after ``steps`` responses with mean KL ``kl`` (nats per response, all processes).

        Raises:
            ValueError: ``kl`` is not finite; the coefficient is left as it was.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"adaptive KL: the measured KL is {kl}; look for non-finite log-probabilities")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * min(steps / self.horizon, 1.0)

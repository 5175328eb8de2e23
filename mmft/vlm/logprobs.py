"""Hidden states -> log-probabilities of tokens, and entropies, without the logits of all tokens at once.

(tokens, vocabulary) is the largest array of an update. It is made chunk by chunk; the probabilities are kept for the
backward pass where all of them are few, else none are, and their logits are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmft.vlm.products import Linear, linear

CHUNK_BYTES = 16 << 20  # of fp32 logits made at a time
KEPT_BYTES = 48 << 20  # of probabilities kept for the backward pass


@dataclass(frozen=True)
class Distribution:
    """Which distribution log-probs are of: softmax(logits / temperature) over the tokens that may be sampled.

    Attributes:
        head: hidden state -> logits.
        banned_ids: (K,) tokens of probability 0.
        softcap: limit of the logits, by tanh (Gemma 2), or None.
    """

    head: nn.Module
    banned_ids: Tensor
    temperature: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, H) -> (M, V), fp32, banned tokens at -inf."""
        return self.tempered(self.head(hidden))

    def tempered(self, logits: Tensor) -> Tensor:
        """The head's (M, V) logits as those of this distribution; overwritten."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        # In place: nobody else holds the head's output.
        return logits.index_fill_(-1, self.banned_ids, float("-inf"))


class ScoringHead(Linear):
    """A language-model head within whose call tokens are scored.

    ZeRO-3 brings a module's weights when the module is called: read from outside they may not be there, and called
    once per chunk the processes, which have other numbers of tokens, would wait for one another for ever.
    """

    def forward(self, hidden: Tensor, score: Callable[..., Any] | None = None):
        return super().forward(hidden) if score is None else score(super().forward, hidden)


def score_in_head(model: nn.Module) -> None:
    """Makes the model's head a `ScoringHead`."""
    head = model.get_output_embeddings()
    if type(head) in (nn.Linear, Linear):
        head.__class__ = ScoringHead


def token_logprobs(
    distribution: Distribution, hidden: Tensor, targets: Tensor, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target (M,) from its hidden state (M, H), and the entropy (M,) in nats when asked."""
    score = partial(_score_all, distribution, targets, entropy)
    head = distribution.head
    return head(hidden, score) if isinstance(head, ScoringHead) else score(head, hidden)


def _score_all(
    distribution: Distribution, targets: Tensor, entropy: bool, project: Callable[[Tensor], Tensor], hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs`, chunk by chunk; ``project`` is the head's hidden state -> logits."""
    head = distribution.head
    size = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    fused = (
        type(head) in (nn.Linear, Linear, ScoringHead)
        and head.weight.dtype == hidden.dtype
        and distribution.softcap is None
        and not torch.is_autocast_enabled(hidden.device.type)
        and not entropy
    )
    keep = hidden.shape[0] * head.weight.shape[0] * 4 <= KEPT_BYTES
    logprobs, entropies = [], []
    for h, y in zip(hidden.split(size), targets.split(size), strict=True):
        if fused:
            options = distribution.banned_ids, distribution.temperature, keep
            scored = _TokenLogprobs.apply(h, head.weight, head.bias, y, *options), None
        elif keep or not torch.is_grad_enabled():
            scored = _score(distribution, project, h, y, entropy)
        else:
            scored = checkpoint(_score, distribution, project, h, y, entropy, use_reentrant=False)
        logprobs.append(scored[0])
        entropies.append(scored[1])
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _score(
    distribution: Distribution, project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    everything = distribution.tempered(project(hidden)).log_softmax(-1)
    logprobs = everything.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return logprobs, None
    # 0 log 0 = 0, for the banned tokens; masked before the product, or its gradient would be NaN.
    return logprobs, -(everything.exp() * everything.masked_fill(everything == -torch.inf, 0.0)).sum(-1)


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T + c)[target], whose gradient is (onehot - p) W: the logits are written once and never copied.

    Args:
        keep: keep the probabilities (M, V) for the backward pass, else make them again there.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, banned_ids, temperature, keep):
        logits = _logits(hidden, weight, bias, banned_ids, temperature)
        highest = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, targets[:, None]) - highest
        weights = logits.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kept = [weights, total] if keep and needed else []
        ctx.save_for_backward(hidden, weight, bias, targets, banned_ids, *kept)
        ctx.temperature = temperature
        return (chosen - total.log()).squeeze(-1)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias, targets, banned_ids, *kept = ctx.saved_tensors
        if kept:
            weights, total = kept
            probabilities = weights / total
        else:
            probabilities = _logits(hidden, weight, bias, banned_ids, ctx.temperature).softmax(-1)
        gradient = gradient[:, None] / ctx.temperature
        d = probabilities.mul_(-gradient).scatter_add_(-1, targets[:, None], gradient).to(hidden.dtype)
        d_hidden = linear(d, weight.t()) if ctx.needs_input_grad[0] else None
        d_weight = d.t() @ hidden if ctx.needs_input_grad[1] else None
        d_bias = d.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return d_hidden, d_weight, d_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, banned_ids: Tensor, temperature: float) -> Tensor:
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits.div_(temperature)
    return logits.index_fill_(-1, banned_ids, float("-inf"))

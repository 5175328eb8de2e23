"""The update: epochs x minibatches x microbatches of whole groups. Stage 7 of the way of one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import isfinite

import torch
from torch import Tensor, nn

from mmft.algorithms import losses
from mmft.batch import Rollout
from mmft.training import distributed
from mmft.training.config import A2CConfig, PPOConfig
from mmft.training.finite import require_finite
from mmft.training.spikes import Spikes

_LARGEST = ("ratio_max", "first_ratio_error", "spike_ratio")


def update(
    policy: nn.Module,
    optimizer,
    rollout: Rollout,
    config: PPOConfig,
    accelerator,
    step: int,
    spikes: Spikes | None = None,
    ratios: list[Tensor] | None = None,
) -> dict[str, float]:
    """Learns from one rollout. ``policy`` and ``optimizer`` are the prepared ones.

    The loss of a minibatch is its sum over tokens divided by the tokens of the whole minibatch over all processes,
    so neither the size of a microbatch nor the number of processes changes the gradient.

    Args:
        ratios: gets the new over the old probability of this process's tokens (flat) in the last pass.

    Raises:
        FloatingPointError: a loss or gradient is not finite on some process; no process has applied that update.
    """
    group, mask = config.num_generations, rollout.update_mask
    lengths = mask.sum(-1).view(-1, group).sum(-1)  # (B,) response tokens of each group
    metrics: dict[str, list[float]] = defaultdict(list)

    def names_of(groups: Iterable[int]) -> list[str]:
        return [rollout.prompts.row_ids[int(g)] for g in groups]

    for epoch, number, minibatch in _minibatches(lengths.cpu(), config, step):
        where = f"step {step}, pass {epoch + 1}, minibatch {number + 1}"
        tokens = accelerator.reduce(lengths[minibatch.to(lengths.device)].sum().float(), "sum")
        if tokens == 0:  # rewards dropped every response: nothing to learn from, on any process
            continue
        kept = ratios if epoch + 1 == config.num_ppo_epochs else None
        micros = minibatch.split(config.micro_prompts or len(minibatch))
        bad: list[int] = []  # prompts of this process's microbatches whose gradient is not finite
        for i, micro in enumerate(micros):
            # DDP averages gradients over processes; the losses are shares of a global mean, to be summed.
            scale = accelerator.num_processes / tokens
            with distributed.accumulating(accelerator, policy, last=i + 1 == len(micros)):
                with accelerator.autocast():
                    loss, stats = microbatch_loss(policy, rollout, micro.tolist(), config, scale, kept)
                # Of a ratio that fell to 0 neither the loss nor its gradient says so.
                odd = "the loss" if not loss.isfinite() else "" if isfinite(stats["approx_kl"]) else "a log-ratio"
                require_finite(accelerator, where, odd, names_of(micro))
                distributed.backward(accelerator, policy, loss)
            if not distributed.take_largest_gradient(accelerator, policy).isfinite():
                bad += micro.tolist()
            for name, value in stats.items():
                metrics[name].append(value)
            if epoch == number == i == 0:
                metrics["first_ratio_error"] = [stats["ratio_error"]]
        require_finite(accelerator, where, "the gradient" if bad else "", names_of(bad))
        # Of what each process calls finite the sum may not be.
        norm = distributed.gradient_norm(accelerator, policy, config.max_grad_norm)
        odd = "" if norm.isfinite() else "the sum of the gradients"
        require_finite(accelerator, where, odd, names_of(minibatch))
        for name, value in _apply(policy, optimizer, accelerator, float(norm), spikes).items():
            metrics[name].append(value)
    return _summed_up(metrics, config, accelerator)


def _minibatches(lengths: Tensor, config: PPOConfig, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """Every pass's minibatches: number of the pass, number in the pass, groups.

    Args:
        lengths: (B,) response tokens of each group.
    """
    order = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    for epoch in range(config.num_ppo_epochs):
        # Every M-th group makes a minibatch (rows come shuffled already, see `PPOTrainer.prompts`), so that it is
        # made of the same rows however many processes share it; passes go through them in another order.
        for number, first in enumerate(torch.randperm(config.num_mini_batches, generator=order).tolist()):
            groups = torch.arange(first, len(lengths), config.num_mini_batches)
            # Groups of like length together: less padding in a packed row.
            yield epoch, number, groups[lengths[groups].argsort(descending=True)]


def _apply(policy: nn.Module, optimizer, accelerator, norm: float, spikes: Spikes | None) -> dict[str, float]:
    """The optimizer's step with the gradient that is there, or, where that is a spike to be skipped, none."""
    ratio = spikes.ratio(norm) if spikes else None
    spike = ratio is not None and ratio > spikes.limit
    if spike and spikes.skips:
        distributed.drop_gradient(accelerator, policy, optimizer)
    else:
        distributed.apply_gradient(accelerator, policy, optimizer)
    return {"grad_norm": norm} | ({} if ratio is None else {"spike_ratio": ratio, "spike": float(spike)})


def _summed_up(metrics: dict[str, list[float]], config: PPOConfig, accelerator) -> dict[str, float]:
    """One number per name over microbatches and processes. Losses are shares of a minibatch, so they add up."""
    if not metrics:
        return {}
    steps = config.num_ppo_epochs * config.num_mini_batches
    names = sorted(set(metrics) - {"ratio_error"})
    values = [
        max(metrics[name])
        if name in _LARGEST
        else sum(metrics[name]) / (steps if name.endswith("_loss") else len(metrics[name]))
        for name in names
    ]
    everyone = accelerator.gather(torch.tensor([values], device=accelerator.device))  # (processes, names)
    return {
        name: (column.max() if name in _LARGEST else column.mean()).item()
        for name, column in zip(names, everyone.unbind(-1), strict=True)
    }


def microbatch_loss(
    policy: nn.Module,
    rollout: Rollout,
    groups: list[int],
    config: PPOConfig,
    scale: Tensor | float,
    ratios: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The microbatch's share of the minibatch loss: policy + vf_coef * value - entropy_coef * entropy.

    Args:
        groups: indices of prompts.
        scale: processes / tokens of the whole minibatch.
    """
    responses = rollout.responses.select_groups(groups, config.num_generations)
    device, width = responses.ids.device, responses.ids.shape[1]
    rows = torch.as_tensor(groups, device=device)[:, None] * config.num_generations
    rows = (rows + torch.arange(config.num_generations, device=device)).flatten()

    def own(x: Tensor) -> Tensor:
        return x[rows, :width]

    mask = own(rollout.update_mask)

    new = policy(rollout.prompts.select(groups), responses, config.temperature, entropy=config.entropy_coef != 0)
    old_logprobs, advantages = own(rollout.old.logprobs), own(rollout.advantages)
    denominator = 1.0 / torch.as_tensor(scale, device=mask.device)
    if isinstance(config, A2CConfig):
        policy_loss = losses.a2c_policy_loss(new.logprobs, advantages, mask, denominator)
        _, stats = losses.ppo_policy_loss(new.logprobs.detach(), old_logprobs, advantages, mask, 1e9, denominator)
    else:
        policy_loss, stats = losses.ppo_policy_loss(
            new.logprobs, old_logprobs, advantages, mask, config.cliprange, denominator
        )
    loss = policy_loss
    stats = {k: float(v) for k, v in stats.items()} | {"policy_loss": policy_loss.item()}
    ratio = (new.logprobs.detach() - old_logprobs).exp()[responses.mask]
    stats["ratio_error"] = float((ratio - 1).abs().max()) if len(ratio) else 0.0
    if ratios is not None:
        ratios.append(ratio)
    if new.values is not None:
        value_loss, value_stats = losses.value_loss(
            new.values, own(rollout.old.values), own(rollout.returns), mask, config.cliprange_value, denominator
        )
        loss = loss + config.vf_coef * value_loss
        stats |= {"value_loss": value_loss.item(), "value_clip_fraction": value_stats["clip_fraction"].item()}
    if config.entropy_coef:
        bonus = (new.entropy * mask).sum() / denominator
        loss = loss - config.entropy_coef * bonus
        stats["entropy_loss"] = -bonus.item()
    return loss, stats

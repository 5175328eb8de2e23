"""One step's experience: sample, reference, score, credit. Stages 3 to 6 of the way of one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmft.algorithms import masked, returns, rewards
from mmft.algorithms.kl import kl_estimate
from mmft.batch import PromptBatch, Responses, Rollout
from mmft.training.config import PPOConfig
from mmft.vlm.generate import generate
from mmft.vlm.policy import Policy


def sample(policy: Policy, prompts: PromptBatch, config: PPOConfig, seed: int) -> Rollout:
    """G responses to each prompt, with the log-probs and values of the policy that wrote them."""
    responses, old = generate(
        policy, prompts, config.num_generations, config.max_completion_length, config.temperature, seed
    )
    return Rollout(prompts, responses, decode(policy, responses), old)


def decode(policy: Policy, responses: Responses) -> list[str]:
    """The responses as text, without special tokens and outer spaces."""
    rows = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
    return [text.strip() for text in policy.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def score(rollout: Rollout, reward_funcs, config: PPOConfig) -> None:
    """Asks the reward side; fills in ``scores`` and ``parts``."""
    responses = rollout.responses
    scores = reward_funcs(
        **reward_columns(rollout.prompts, rollout.texts),
        ended=responses.ended.tolist(),
        completion_ids=[ids[mask].tolist() for ids, mask in zip(responses.ids, responses.mask, strict=True)],
    )
    rollout.scores = torch.as_tensor(np.asarray(scores.total), dtype=torch.float32, device=responses.ids.device)
    if not rollout.scores.isfinite().all():
        worst = int((~rollout.scores.isfinite()).nonzero()[0])
        row = rollout.prompts.row_ids[worst // config.num_generations]
        raise ValueError(f"the reward of row {row} is {scores.total[worst]}, too large for float32; scale the rewards")
    rollout.parts = {name: torch.as_tensor(np.asarray(v), dtype=torch.float32) for name, v in scores.parts.items()}
    if config.missing_eos_penalty:
        rollout.scores = rewards.apply_missing_eos_penalty(
            rollout.scores, rollout.responses.ended, config.missing_eos_penalty
        )


def reward_columns(prompts: PromptBatch, texts: list[str]) -> dict[str, list[Any]]:
    """The arguments of TRL's reward functions: prompts, completions and every dataset column, one entry a response.

    Completions are strings for plain prompts and a list with one assistant message for conversations.
    """
    group = len(texts) // len(prompts)
    rows = [row for row in prompts.rows for _ in range(group)]
    columns: dict[str, list[Any]] = {
        key: [row.get(key) for row in rows] for key in dict.fromkeys(k for row in prompts.rows for k in row)
    }
    columns["prompts"] = columns.pop("prompt")
    columns["completions"] = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for text, row in zip(texts, rows, strict=True)
    ]
    return columns


def credit(rollout: Rollout, config: PPOConfig, kl_coef: float, reduce=None) -> Tensor:
    """Token rewards, then advantages and returns. Returns the KL of each token (N, T), zero outside the mask."""
    mask, old = rollout.responses.mask, rollout.old
    if rollout.ref_logprobs is None:
        kl = torch.zeros_like(old.logprobs)
    else:
        kl = kl_estimate(old.logprobs, rollout.ref_logprobs, config.kl_estimator) * mask
    rollout.rewards = rewards.token_rewards(rollout.scores, kl, mask, kl_coef)
    if config.whiten_rewards:
        rollout.rewards = masked.masked_whiten(rollout.rewards, mask, shift_mean=False, reduce=reduce)
    if config.critic == "none":
        # The whole response is one action: its return against the mean return of its siblings.
        total = (rollout.rewards * mask).sum(-1)
        rollout.advantages = returns.leave_one_out(total, config.num_generations)[:, None] * mask
        rollout.returns = rollout.rewards
    else:
        rollout.advantages, rollout.returns = returns.gae(rollout.rewards, old.values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        rollout.advantages = masked.masked_whiten(rollout.advantages, mask, reduce=reduce)
    return kl

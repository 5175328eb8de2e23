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
from mmft.training.engines import generate_with
from mmft.training.vllm_engine import VLLM
from mmft.vlm.generate import decode
from mmft.vlm.media import blank
from mmft.vlm.policy import Policy


def sample(
    policy: Policy, prompts: PromptBatch, config: PPOConfig, seed: int, engine: str | VLLM = "native"
) -> Rollout:
    """G responses to each prompt by the engine, with the policy's own log-probs and values of them."""
    sizes = config.num_generations, config.max_completion_length
    responses, old = generate_with(engine, policy, prompts, *sizes, config.temperature, seed)
    return Rollout(prompts, responses, decode(policy, responses), old)


def pieces_of(policy: Policy, responses: Responses) -> list[list[str]]:
    """The text that each real token adds: per response a list of strings that join to its text.

    Special tokens add "". Bytes of an unfinished character add "" until it is whole. Where a tokenizer decodes single
    tokens as it decodes them in a row, that is used; elsewhere growing prefixes are decoded.
    """
    rows = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
    tokenizer = policy.tokenizer
    words = sorted({token for row in rows for token in row})
    alone = dict(zip(words, tokenizer.batch_decode([[w] for w in words], skip_special_tokens=True), strict=True))
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    found = []
    for row, text in zip(rows, texts, strict=True):
        pieces = [alone[token] for token in row]
        if "".join(pieces) != text:
            prefixes = tokenizer.batch_decode([row[: t + 1] for t in range(len(row))], skip_special_tokens=True)
            pieces, done = [], ""
            for prefix in prefixes:
                prefix = prefix.rstrip("\ufffd")
                pieces.append(prefix[len(done) :] if prefix.startswith(done) else "")
                done += pieces[-1]
            if row and not text.startswith(done):  # a text that is not made of its prefixes is credited at its end
                pieces, done = [""] * len(row), ""
            if row:
                pieces[-1] += text[len(done) :]
        found.append(pieces)
    return found


def score(
    rollout: Rollout, reward_funcs, config: PPOConfig, step: int = 0, pieces: list[list[str]] | None = None
) -> None:
    """Asks the reward side; fills in ``scores``, their parts, and what of them is credited token by token.

    Args:
        step: for weights that follow a schedule.
        pieces: the responses token by token (see `pieces_of`), where a reward is dense.
    """
    responses = rollout.responses
    found = reward_funcs(
        **reward_arguments(rollout.prompts, rollout.texts, responses),
        pieces=pieces,
        step=step,
        group_size=config.num_generations,
        training=True,
    )
    rollout.scores = penalised(found.total, responses.ended, config)
    if not rollout.scores.isfinite().all():
        worst = int((~rollout.scores.isfinite()).nonzero()[0])
        row = rollout.prompts.row_ids[worst // config.num_generations]
        raise ValueError(f"the reward of row {row} is {found.total[worst]}, too large for float32; scale the rewards")
    rollout.plain = penalised(found.plain, responses.ended, config)
    rollout.parts = {name: torch.as_tensor(np.asarray(v), dtype=torch.float32) for name, v in found.parts.items()}
    rollout.weighted = {name: torch.as_tensor(np.asarray(v), dtype=torch.float32) for name, v in found.weighted.items()}
    if not found.keep.all():
        rollout.keep = torch.as_tensor(found.keep, device=responses.ids.device)
    rollout.dense = _on_tokens(found.dense, responses)
    rollout.potentials = _on_tokens(found.potentials, responses)


def penalised(scores: np.ndarray, ended: Tensor, config: PPOConfig) -> Tensor:
    """(N,) float32 scores with ``missing_eos_penalty`` taken off where the response was cut off."""
    found = torch.as_tensor(np.asarray(scores), dtype=torch.float32, device=ended.device)
    if config.missing_eos_penalty:
        found = rewards.apply_missing_eos_penalty(found, ended, config.missing_eos_penalty)
    return found


def _on_tokens(rows: list[np.ndarray] | None, responses: Responses) -> Tensor | None:
    """One array per response -> (N, T) float32 on the places of the real tokens."""
    if rows is None:
        return None
    out = torch.zeros(responses.mask.shape, dtype=torch.float32)
    out[responses.mask.cpu()] = torch.as_tensor(np.concatenate(rows), dtype=torch.float32)
    return out.to(responses.ids.device)


def blank_prompts(policy: Policy, prompts: PromptBatch) -> PromptBatch:
    """The same prompts with every picture and clip replaced by a grey one of its size, every sound by silence."""
    return policy.pictures.prompts([blank(row) for row in prompts.rows], prompts.row_ids, policy.device)


def reward_arguments(prompts: PromptBatch, texts: list[str], responses: Responses) -> dict[str, Any]:
    """`reward_columns`, and what only the sampling knows: ``ended`` and ``completion_ids``."""
    ids = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
    return reward_columns(prompts, texts) | {"ended": responses.ended.tolist(), "completion_ids": ids}


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


def earn(rollout: Rollout, config: PPOConfig, kl_coef: float, reduce=None) -> Tensor:
    """What each token earned. Returns the KL of each token (N, T), zero outside the mask."""
    mask, old, scores, extra = rollout.responses.mask, rollout.old, rollout.scores, rollout.dense
    if rollout.ref_logprobs is None:
        kl = torch.zeros_like(old.logprobs)
    else:
        kl = kl_estimate(old.logprobs, rollout.ref_logprobs, config.kl_estimator) * mask
    if extra is not None:
        scores = scores - extra.sum(-1)  # paid already, token by token
    if rollout.potentials is not None:
        shaping = rewards.potential_shaping(rollout.potentials, mask, config.gamma)
        extra = shaping if extra is None else extra + shaping
    rollout.rewards = rewards.token_rewards(scores, kl, mask, kl_coef, extra)
    if config.whiten_rewards:
        rollout.rewards = masked.masked_whiten(rollout.rewards, rollout.update_mask, shift_mean=False, reduce=reduce)
    return kl


def credit(rollout: Rollout, config: PPOConfig, reduce=None) -> None:
    """Advantages and returns of what was earned."""
    mask, old = rollout.update_mask, rollout.old
    if config.critic == "none":
        # The whole response is one action: its return against the mean return of its siblings.
        total = (rollout.rewards * mask).sum(-1)
        rollout.advantages = returns.leave_one_out(total, config.num_generations, rollout.keep)[:, None] * mask
        rollout.returns = rollout.rewards
    else:
        rollout.advantages, rollout.returns = returns.gae(rollout.rewards, old.values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        rollout.advantages = masked.masked_whiten(rollout.advantages, mask, reduce=reduce)

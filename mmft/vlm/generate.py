"""Sampling on the shared prefix.

Each prompt is prefilled once. Its G responses then share its keys and values: a step of decoding adds one token per
unfinished response to the prompt's row (the packed layout of `prefix.py`, one column at a time), so nothing is ever
expanded or copied G times, and finished responses cost nothing more. Log-probs, values and entropy fall out on the
way. Draws are seeded per row: a row's responses do not depend on the batch or the rank it is sampled in.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mmft.batch import PromptBatch, Responses, TokenOutputs
from mmft.vlm.pictures import backbone, check_placeholders
from mmft.vlm.policy import Policy
from mmft.vlm.prefix import additive

# Rows whose responses have all ended leave the cache when at most this share of its rows is still at work: leaving
# costs one copy of what remains.
_COMPACT_BELOW = 0.7


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: PromptBatch,
    num_generations: int = 1,
    max_new_tokens: int = 24,
    temperature: float = 1.0,
    seed: int | None = None,
) -> tuple[Responses, TokenOutputs]:
    """Writes G responses to each of B prompts; N = B*G, T = ``max_new_tokens`` at most.

    Args:
        num_generations: G.
        temperature: > 0 samples from softmax(logits / temperature); 0 takes the likeliest token.
        seed: of the draws, together with each row's id. None only when greedy.

    Returns:
        The responses, and log-probs, values and entropy as of sampling (at temperature 1 when greedy).
    """
    _require_room(policy, prompts, max_new_tokens)
    if temperature > 0 and seed is None:
        raise ValueError("sampling needs a seed")
    uniforms = (
        draws(prompts.row_ids, num_generations, max_new_tokens, seed).to(policy.device) if temperature > 0 else None
    )
    if not policy.shared_prefix:
        from mmft.vlm.plain import plain_generate

        return plain_generate(policy, prompts, num_generations, max_new_tokens, temperature, seed)
    was_training = policy.training
    policy.eval()
    try:
        return _decode(policy, prompts, num_generations, max_new_tokens, temperature, uniforms)
    finally:
        policy.train(was_training)


def _require_room(policy: Policy, prompts: PromptBatch, max_new_tokens: int) -> None:
    room = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    lengths = prompts.prompt_mask.sum(-1)
    if room is not None and int(lengths.max()) + max_new_tokens > room:
        row = int(lengths.argmax())
        raise ValueError(
            f"row {prompts.row_ids[row]}: its prompt has {int(lengths[row])} tokens (pictures included), and with "
            f"{max_new_tokens} of a response that is more than the model's {room}; shorten it, or use smaller pictures"
        )


def draws(row_ids: list[str], num_generations: int, length: int, seed: int | None) -> Tensor:
    """(N, length) uniform numbers in [0, 1), each row's from its own stream seeded by (seed, row id)."""
    rows = []
    for row_id in row_ids:
        digest = hashlib.blake2b(f"{seed}/{row_id}".encode(), digest_size=16).digest()
        stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        rows.append(stream.random((num_generations, length)))
    return torch.from_numpy(np.concatenate(rows))


def _decode(policy, prompts, group, length, temperature, uniforms) -> tuple[Responses, TokenOutputs]:
    n = len(prompts) * group
    device = policy.device
    ids = torch.zeros(n, length, dtype=torch.long, device=device)
    mask = torch.zeros(n, length, dtype=torch.bool, device=device)
    ended = torch.zeros(n, dtype=torch.bool, device=device)
    logprobs, values, entropy = (torch.zeros(n, length, device=device) for _ in range(3))
    ends = torch.tensor(policy.end_ids, device=device)

    decoder = _SharedDecoder(policy, prompts, group)
    active = torch.arange(n, device=device)  # responses still being written, in order
    hidden = decoder.prefill().repeat_interleave(group, 0)  # (N, H)
    for t in range(length):
        token, logprob, ent = _choose(
            policy.logits(hidden, temperature or 1.0), None if uniforms is None else uniforms[active, t]
        )
        ids[active, t], mask[active, t] = token, True
        logprobs[active, t], entropy[active, t] = logprob, ent
        if policy.value_head is not None:
            values[active, t] = policy.value_head(hidden).to(values.dtype)
        stopped = torch.isin(token, ends)
        ended[active[stopped]] = True
        active, token = active[~stopped], token[~stopped]
        if t + 1 == length or not len(active):
            break
        hidden = decoder.step(active, token, t)
    width = max(int(mask.sum(-1).max()), 1)
    ids, mask = ids[:, :width], mask[:, :width]
    critic = values[:, :width] if policy.value_head is not None else None
    return Responses(ids, mask, ended), TokenOutputs(logprobs[:, :width], critic, entropy[:, :width])


def _choose(logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A token per row of (A, V) logits, by inverting the cumulative distribution at ``uniforms`` (A,), else the
    likeliest; with its log-prob and the distribution's entropy."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    probabilities = (logits - normaliser).exp()
    if uniforms is None:
        token = logits.argmax(-1)
    else:
        # In fp64: over a vocabulary of 150,000 the rounding of an fp32 sum would move probability between words.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        point = (uniforms * cumulative[:, -1])[:, None]
        token = torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    logprob = logits.gather(-1, token[:, None]).squeeze(-1) - normaliser.squeeze(-1)
    return token, logprob, torch.special.entr(probabilities).sum(-1)


class _SharedDecoder:
    """Keys and values of B prompts and of their responses, one cache row per prompt.

    ``owner`` (R, K) says whose each key is: 0 the prompt's, g + 1 response g's, -1 nobody's.
    """

    def __init__(self, policy: Policy, prompts: PromptBatch, group: int):
        self.model = backbone(policy.model)
        self.dtype = policy.model.dtype
        self.prompts = prompts
        self.group = group
        self.features = policy.features(prompts)
        check_placeholders(prompts, policy.pictures.image_token_id)
        self.cache = Cache(layer_class_to_replicate=_GrowingLayer)
        self.owner = torch.where(prompts.prompt_mask, 0, -1)
        self.slot = torch.arange(len(prompts), device=self.owner.device)  # prompt -> its row in the cache

    def prefill(self) -> Tensor:
        """Reads the prompts; (B, H) hidden states of their last tokens."""
        real = self.prompts.prompt_mask
        causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
        hidden = self.model(
            input_ids=torch.where(real, self.prompts.prompt_ids, 0),
            attention_mask=additive(causal & real[:, None, :], self.dtype),
            position_ids=self.prompts.positions,
            mm_encoder_outputs=self.features,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[torch.arange(len(real), device=real.device), real.sum(-1) - 1]

    def step(self, active: Tensor, token: Tensor, t: int) -> Tensor:
        """Feeds token t of the active responses (A,); (A, H) their hidden states."""
        prompt = active // self.group
        self._compact(prompt)
        row = self.slot[prompt]
        rows = self.owner.shape[0]
        count = torch.bincount(row, minlength=rows)
        place = torch.arange(len(active), device=row.device) - (count.cumsum(0) - count)[row]
        width = int(count.max())
        ids = self.owner.new_zeros(rows, width)
        query = self.owner.new_full((rows, width), -1)
        positions = self.prompts.positions.new_zeros(*self.prompts.positions.shape[:-2], rows, width)
        ids[row, place] = token
        query[row, place] = active % self.group + 1
        positions[..., row, place] = self.prompts.next_position[prompt] + t
        self.owner = torch.cat([self.owner, query], -1)
        key = self.owner[:, None, :]
        allowed = (key >= 0) & ((key == 0) | (key == query[:, :, None]))
        hidden = self.model(
            input_ids=ids,
            attention_mask=additive(allowed, self.dtype),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[row, place]

    def _compact(self, prompt: Tensor) -> None:
        """Drops the cache rows of prompts that are answered, when enough are."""
        alive = torch.unique(prompt)
        if len(alive) > _COMPACT_BELOW * self.owner.shape[0]:
            return
        keep = self.slot[alive]
        self.owner = self.owner[keep]
        self.cache.batch_select_indices(keep)
        self.slot = torch.full_like(self.slot, -1)
        self.slot[alive] = torch.arange(len(alive), device=keep.device)


class _GrowingLayer(DynamicLayer):
    """A layer of the cache that grows into spare room, where transformers' own copies all of it for every token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self._room: list[Tensor] = []
        used, total = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self._room or total > self._room[0].shape[2] or self._room[0].shape[0] != self.keys.shape[0]:
            self._room = [self._copy(old, total + total // 2) for old in (self.keys, self.values)]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, used:total] = new
        self.keys, self.values = (room[:, :, :total] for room in self._room)
        return self.keys, self.values

    @staticmethod
    def _copy(old: Tensor, capacity: int) -> Tensor:
        room = old.new_empty(*old.shape[:2], capacity, old.shape[3])
        room[:, :, : old.shape[2]] = old
        return room

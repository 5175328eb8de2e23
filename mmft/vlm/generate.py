"""Sampling on the shared prefix.

Each prompt is prefilled once. Its G responses then share its keys and values, each beside those of its own tokens
(`attention.py`): a step of decoding feeds one token per unfinished response, nothing is ever expanded or copied G
times, and finished responses cost nothing more. Log-probs, values and entropy fall out on the
way. Draws are seeded per row: a row's responses do not depend on the batch or the rank it is sampled in.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mmft.batch import PromptBatch, Responses, TokenOutputs
from mmft.vlm.attention import DecodeAttention, PrefixAttention
from mmft.vlm.decoder import run
from mmft.vlm.pictures import check_placeholders
from mmft.vlm.policy import Policy
from mmft.vlm.prefix import pack_prompts, seen_as_one

# Rows whose responses have all ended leave the cache when at most this share of its rows is still at work: leaving
# costs one copy of what remains.
_COMPACT_BELOW = 0.7
_BLOCK = 64  # tokens summed together while a token is drawn


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
    require_room(policy, prompts, max_new_tokens)
    if temperature > 0 and seed is None:
        raise ValueError("sampling needs a seed")
    if not policy.shared_prefix:
        from mmft.vlm.plain import plain_generate

        return plain_generate(policy, prompts, num_generations, max_new_tokens, temperature, seed)
    uniforms = (
        draws(prompts.row_ids, num_generations, max_new_tokens, seed).to(policy.device) if temperature > 0 else None
    )
    was_training = policy.training
    policy.eval()
    try:
        with _folded(policy.model, len(prompts) * num_generations):
            return _decode(policy, prompts, num_generations, max_new_tokens, temperature, uniforms)
    finally:
        policy.train(was_training)


def decode(policy: Policy, responses: Responses) -> list[str]:
    """The responses as text, without special tokens and outer spaces."""
    rows = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
    return [text.strip() for text in policy.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def require_room(policy: Policy, prompts: PromptBatch, max_new_tokens: int) -> None:
    """Raises ValueError naming the longest row, where prompt and response are more than the model can hold."""
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


def _folded(model: torch.nn.Module, rows: int):
    """`adapters.folded`, where there are adapters: the import of PEFT takes half a second."""
    if not hasattr(model, "peft_config"):
        return nullcontext()
    from mmft.vlm.adapters import folded

    return folded(model, rows)


def _decode(policy, prompts, group, length, temperature, uniforms) -> tuple[Responses, TokenOutputs]:
    n = len(prompts) * group
    device = policy.device
    ids = torch.zeros(n, length, dtype=torch.long, device=device)
    mask = torch.zeros(n, length, dtype=torch.bool, device=device)
    ended = torch.zeros(n, dtype=torch.bool, device=device)
    logprobs, values, entropy = (torch.zeros(n, length, device=device) for _ in range(3))
    ends = torch.tensor(policy.end_ids, device=device)

    decoder = _SharedDecoder(policy, prompts, group, length)
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
    likeliest; with its log-prob and the distribution's entropy. Overwrites the logits."""
    highest, likeliest = logits.max(-1, keepdim=True)
    # Banned tokens at a finite distance: 0 * -inf is no number, 0 * -1e30 is 0.
    below = logits.sub_(highest).clamp_min_(-1e30)
    weights = below.exp()
    total = weights.sum(-1, keepdim=True)
    token = likeliest if uniforms is None else invert(weights, uniforms)
    normaliser = total.log()
    entropy = normaliser.squeeze(-1) - torch.linalg.vecdot(weights, below) / total.squeeze(-1)
    return token.squeeze(-1), (below.gather(-1, token) - normaliser).squeeze(-1), entropy


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(A, 1) tokens: the first at which the running sum of (A, V) weights passes the share ``uniforms`` of all.

    In two stages, block and token, so that the running sums can be in fp64: over a vocabulary of 150,000 the rounding
    of an fp32 sum would move probability between words.
    """
    vocabulary = weights.shape[-1]
    blocks = pad(weights, (0, -vocabulary % _BLOCK)).unflatten(-1, (-1, _BLOCK))  # (A, blocks, _BLOCK)
    upto = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    point = uniforms.to(torch.float64)[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, point, right=True).clamp_max(upto.shape[-1] - 1)  # (A, 1)
    before = torch.where(block > 0, upto.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1).to(torch.float64).cumsum(-1)
    token = block * _BLOCK + torch.searchsorted(inside, point - before, right=True).clamp_max(_BLOCK - 1)
    token = token.clamp_max(vocabulary - 1)
    # Rounding may point past the last token that has any weight.
    return torch.where(weights.gather(-1, token) > 0, token, weights.argmax(-1, keepdim=True))


class _SharedDecoder:
    """Reads B prompts once and writes their responses, a token of each at a time."""

    def __init__(self, policy: Policy, prompts: PromptBatch, group: int, length: int):
        self.model, self.family, self.pictures = policy.model, policy.family, policy.pictures
        self.prompts, self.group, self.length = prompts, group, length
        self.features = policy.features(prompts)
        check_placeholders(prompts, self.pictures.token_ids)
        self.slot = torch.arange(len(prompts), device=policy.device)  # prompt -> its row in the cache

    def prefill(self) -> Tensor:
        """Reads the prompts; (B, H) hidden states of their last tokens."""
        ids, positions, last = pack_prompts(self.prompts)
        block = seen_as_one(self.prompts, self.family, list(self.pictures.token_ids.values()))
        reading = PrefixAttention(self.prompts.prompt_mask, block=block, keep=True, read=last)
        hidden = run(self.model, self.family, ids, positions, reading, self.features)
        self.cache = DecodeAttention(self.prompts.prompt_mask, reading.kept, self.group, self.length)
        return hidden[last]

    def step(self, active: Tensor, token: Tensor, t: int) -> Tensor:
        """Feeds token t of the active responses (A,); (A, H) their hidden states."""
        prompt = active // self.group
        alive = torch.unique(prompt)
        if len(alive) <= _COMPACT_BELOW * len(self.cache.lengths):
            self.cache.select(self.slot[alive])
            self.slot[alive] = torch.arange(len(alive), device=alive.device)
        self.cache.begin(t, self.slot[prompt] * self.group + active % self.group)
        shape = (*self.prompts.positions.shape[:-2], 1, len(active))
        positions = (self.prompts.next_position[prompt] + t).expand(shape)
        return run(self.model, self.family, token[None], positions, self.cache)

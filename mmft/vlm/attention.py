"""Attention of many responses to one shared prompt: the only file that knows how keys and queries meet.

The decoder runs on one flat row of real tokens, prompts first and then responses, without any padding. Here, inside
each layer's attention, tokens are laid out by prompt and by response: a prompt token attends within its prompt, a
response token to its prompt and to the earlier tokens of its own response. So nobody pays for a sibling's keys, and
no (L, L) mask of the whole row ever stands in memory.

transformers calls `shared_prefix_attention` in every layer, by its registry of attention functions; without a
``layout`` among the keyword arguments it is plain scaled dot-product attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "shared_prefix"


@torch.compiler.disable  # the layout's bookkeeping is Python; what surrounds it can be compiled
def shared_prefix_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PrefixAttention | DecodeAttention | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """(1, heads, M, D) query, key, value of M flat tokens -> (1, M, heads, D). The signature is transformers'."""
    if layout is None and softcap is None:
        options = kwargs | {"sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, query.dtype)
        out = attention(query, key, value, attention_mask, scaling, softcap, dropout)
        return out.transpose(1, 2).contiguous(), None
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attention with sinks or a position bias does not work on the shared prefix")
    flat = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.attend(module.layer_idx, *flat, scaling, sliding_window, softcap, dropout)[None], None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class Rows:
    """Rows of unequal length, flat (M, ...) or padded (R, W, ...), from a mask (R, W) padded on the right."""

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        self.lengths = mask.sum(-1)
        self.count = int(self.lengths.sum())
        self.ragged = self.count < mask.numel()
        if self.ragged:
            start = self.lengths.cumsum(0) - self.lengths
            column = torch.arange(mask.shape[1], device=mask.device)
            # Padding repeats a real token: never looked at, but finite.
            self.source = (start[:, None] + column).clamp_max(self.count - 1).flatten()
            self.place = mask.flatten().nonzero().squeeze(-1)

    def pad(self, flat: Tensor) -> Tensor:
        """(M, ...) -> (R, W, ...)"""
        if self.ragged:
            flat = flat.index_select(0, self.source)
        return flat.unflatten(0, self.shape)

    def flatten(self, padded: Tensor) -> Tensor:
        """(R, W, ...) -> (M, ...)"""
        flat = padded.flatten(0, 1)
        return flat.index_select(0, self.place) if self.ragged else flat


class PrefixAttention:
    """B prompts and, in a forward pass, their N = B*G responses.

    Args:
        prompt_mask: (B, P) bool.
        response_mask: (N, T) bool, or None to read the prompts alone.
        block: (B, P) int64, or None for a causal prompt. Prompt tokens of one block (>= 0) see each other, later ones
            too: in block 0 all of the prompt, whatever the window; in others the tokens of one picture, within it.
        keep: keep the prompts' keys and values, for decoding.
        read: (K,) places of the flat tokens whose last hidden states anybody reads; None = all.
    """

    def __init__(
        self,
        prompt_mask: Tensor,
        response_mask: Tensor | None = None,
        block: Tensor | None = None,
        keep: bool = False,
        read: Tensor | None = None,
    ):
        self.prompts = Rows(prompt_mask)
        self.responses = Rows(response_mask) if response_mask is not None else None
        self.block = block
        self.read = read
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self._masks: dict[tuple, Tensor | None] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """(M, heads, D) query, (M, key heads, D) key and value -> (M, heads, D)."""
        n = self.prompts.count
        q, k, v = (self.prompts.pad(x[:n]).transpose(1, 2) for x in (query, key, value))  # (B, heads, P, D)
        if self.kept is not None:
            self.kept[layer] = k.contiguous(), v.contiguous()
        mask = self._mask("prompt", window, q.dtype)
        written = attention(q, k, v, mask, scaling, softcap, dropout)
        written = self.prompts.flatten(written.transpose(1, 2))
        if self.responses is None:
            return written
        return torch.cat(
            [written, self._respond(query[n:], key[n:], value[n:], k, v, scaling, window, softcap, dropout)]
        )

    def _respond(self, query, key, value, prompt_key, prompt_value, scaling, window, softcap, dropout) -> Tensor:
        """What response tokens read, (their number, heads, D). The one place where a prompt's keys and values are
        copied G times, for one layer at a time (and, with gradient, for its backward pass).

        SDPA's "heads" are here the G * key heads of one prompt, and its queries the T tokens of all the query heads
        that share a key head: so neither keys nor masks are repeated for grouped queries.
        """
        b, heads, p, d = prompt_key.shape
        n, t = self.responses.shape
        group, repeats = n // b, query.shape[1] // heads
        q = self.responses.pad(query).view(b, group, t, heads, repeats, d)
        q = q.permute(0, 1, 3, 4, 2, 5).reshape(b, group * heads, repeats * t, d)
        k, v = (
            torch.cat(
                [
                    shared[:, None].expand(b, group, heads, p, shared.shape[-1]),
                    self.responses.pad(own).view(b, group, t, heads, -1).transpose(2, 3),
                ],
                dim=3,
            ).flatten(1, 2)
            for shared, own in ((prompt_key, key), (prompt_value, value))
        )
        mask = self._mask("response", window, q.dtype)
        if repeats > 1 and mask is not None:
            mask = mask.repeat(1, 1, repeats, 1)
        out = attention(q, k, v, mask, scaling, softcap, dropout)
        out = out.view(b, group, heads, repeats, t, -1).permute(0, 1, 4, 2, 3, 5)
        return self.responses.flatten(out.reshape(n, t, heads * repeats, -1))

    def _mask(self, part: str, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask: (B or 1, 1, P, P), None when causal; or (B or 1, 1, T, P + T)."""
        if (part, window, dtype) not in self._masks:
            longest = self.prompts.shape[1] + (self.responses.shape[1] if self.responses is not None else 0)
            if window is not None and window >= longest:
                window_mask = self._mask(part, None, dtype)
            else:
                allowed = self._prompt_allowed(window) if part == "prompt" else self._response_allowed(window)
                window_mask = None if allowed is None else additive(allowed[:, None], dtype)
            self._masks[part, window, dtype] = window_mask
        return self._masks[part, window, dtype]

    def _prompt_allowed(self, window: int | None) -> Tensor | None:
        if self.block is None and window is None:
            return None  # right padding: a real token's earlier tokens are all real
        column = torch.arange(self.prompts.shape[1], device=self.prompts.lengths.device)
        behind = column[:, None] - column  # (P, P)
        allowed = (behind >= 0)[None]
        if self.block is not None:
            real = column < self.prompts.lengths[:, None]
            same = (self.block[:, :, None] == self.block[:, None, :]) & (self.block >= 0)[:, None, :] & real[:, None, :]
            allowed = allowed | same
        if window is None:
            return allowed
        allowed = allowed & (behind < window)
        return allowed if self.block is None else allowed | (same & (self.block == 0)[:, None, :])

    def _response_allowed(self, window: int | None) -> Tensor:
        (_, p), (_, t), device = self.prompts.shape, self.responses.shape, self.prompts.lengths.device
        column, token = torch.arange(p, device=device), torch.arange(t, device=device)
        length = self.prompts.lengths if self.prompts.ragged or window is not None else self.prompts.lengths[:1]
        shared = (column < length[:, None])[:, None, :].expand(len(length), t, p)
        behind = token[:, None] - token
        own = behind >= 0
        if window is not None:
            shared = shared & ((length[:, None] + token)[:, :, None] - column < window)
            own = own & (behind < window)
        return torch.cat([shared, own[None].expand(len(length), t, t)], -1)


class DecodeAttention:
    """One new token per active response: its keys join those of its own response, beside its prompt's.

    The prompts' keys and values are those that `PrefixAttention` kept; they are never copied or expanded. Room for
    the responses' own grows by doubling.

    Args:
        prompt_mask: (B, P) bool.
        kept: layer -> keys and values of the prompts, (B, key heads, P, D) each.
        group: G.
        length: the most tokens a response may have.
    """

    FIRST_ROOM = 32  # tokens per response

    def __init__(self, prompt_mask: Tensor, kept: dict[int, tuple[Tensor, Tensor]], group: int, length: int):
        self.lengths = prompt_mask.sum(-1)
        self.width = prompt_mask.shape[1]
        self.ragged = bool((self.lengths < self.width).any())
        self.shared, self.group, self.length = kept, group, length
        self.own: dict[int, list[Tensor]] = {}
        self._masks: dict[tuple, Tensor | None] = {}

    def begin(self, token: int, slots: Tensor) -> None:
        """The next forward pass feeds token number ``token`` of the responses in ``slots`` (A,), of B*G."""
        self.token, self.slots = token, slots
        self.all = len(slots) == len(self.lengths) * self.group
        self._masks.clear()

    def select(self, prompts: Tensor) -> None:
        """Keeps only the given prompts (K,), and their responses."""
        self.lengths = self.lengths[prompts]
        for cache in (self.shared, self.own):
            for layer in cache:
                cache[layer] = [x.index_select(0, prompts) for x in cache[layer]]

    def attend(self, layer, query, key, value, scaling, window, softcap, dropout) -> Tensor:
        """(A, heads, D) query, (A, key heads, D) key and value -> (A, heads, D). ``dropout`` is not for decoding."""
        shared_key, shared_value = self.shared[layer]
        b, heads, p, d = shared_key.shape
        repeats, used = query.shape[1] // heads, self.token + 1
        own_key, own_value = self._write(layer, key, value)
        q = self._grid(query * scaling).view(b, self.group, heads, repeats, d).transpose(1, 2)  # (B, K, G, R, D)
        q = q.reshape(b, heads, self.group * repeats, d)
        scores = torch.cat(
            [
                q @ shared_key.transpose(-1, -2),
                (q.view(b, heads, self.group, repeats, d) @ own_key[..., :used, :].transpose(-1, -2)).flatten(2, 3),
            ],
            -1,
        )
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = self._mask(window, scores.dtype)
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        of_own = weights[..., p:].unflatten(2, (self.group, repeats)) @ own_value[..., :used, :]
        out = weights[..., :p] @ shared_value + of_own.flatten(2, 3)
        out = out.view(b, heads, self.group, repeats, -1).transpose(1, 2).reshape(b * self.group, heads * repeats, -1)
        return out if self.all else out[self.slots]

    def _grid(self, x: Tensor) -> Tensor:
        """(A, ...) -> (B*G, ...), zeros for responses that have ended."""
        if self.all:
            return x
        grid = x.new_zeros(len(self.lengths) * self.group, *x.shape[1:])
        grid[self.slots] = x
        return grid

    def _write(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Adds the new tokens' keys and values; (B, key heads, G, room, D) each."""
        cache = self.own.get(layer)
        if cache is None or self.token >= cache[0].shape[3]:
            room = min(self.length, max(self.FIRST_ROOM, 2 * self.token))
            grown = [x.new_empty(len(self.lengths), x.shape[1], self.group, room, x.shape[2]) for x in (key, value)]
            for new, old in zip(grown, cache or [], strict=False):
                new[:, :, :, : old.shape[3]] = old
            cache = self.own[layer] = grown
        prompt, sibling = self.slots // self.group, self.slots % self.group
        for room_for, new in zip(cache, (key, value), strict=True):
            if self.all:
                room_for[:, :, :, self.token] = new.unflatten(0, (-1, self.group)).transpose(1, 2)
            else:
                room_for[prompt, :, sibling, self.token] = new
        return cache

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, P + t + 1) additive, or None where everything may be seen."""
        if window is not None and window > self.width + self.token:
            window = None
        if not self.ragged and window is None:
            return None
        if (window, dtype) not in self._masks:
            column = torch.arange(self.width, device=self.lengths.device)
            token = torch.arange(self.token + 1, device=self.lengths.device)
            shared = column < self.lengths[:, None]
            own = torch.ones(len(self.lengths), self.token + 1, dtype=torch.bool, device=shared.device)
            if window is not None:
                shared = shared & (self.lengths[:, None] + self.token - column < window)
                own = own & (self.token - token < window)
            self._masks[window, dtype] = additive(torch.cat([shared, own], -1), dtype)[:, None, None]
        return self._masks[window, dtype]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Softmax attention, (R, heads, Q, D) query and (R, key heads, K, D) key and value; causal without a mask.

    With a soft cap (Gemma 2) the scores have to stand in memory: no fused kernel of torch knows it.
    """
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap))
    if mask is None:
        queries, keys = scores.shape[-2:]  # one query alone comes after all the keys
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        mask = additive(allowed, scores.dtype)
    weights = torch.dropout((scores + mask).softmax(-1, dtype=torch.float32), dropout, dropout > 0)
    return weights.to(value.dtype) @ value


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool -> 0 where a query may look at a key, the dtype's lowest number elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)

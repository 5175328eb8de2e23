"""One prompt, many responses: the packed layout and its forward pass, with gradients.

A row of the packed layout holds one prompt and then its G responses, one after another without padding:

    tokens     p p p p | a a a | b b | c c c c | . .
    segment    0 0 0 0 | 1 1 1 | 2 2 | 3 3 3 3 | -1 -1
    position   0 1 2 3 | 4 5 6 | 4 5 | 4 5 6 7 |

A token attends to the prompt and to the earlier tokens of its own response (a block mask), and positions restart
after the prompt for every response, so each response reads exactly as if it stood alone behind the prompt: the same
numbers as G separate rows, for one prompt instead of G. Gradients flow into the shared prompt once, summed by
autograd. Decoding uses the same layout, one new token per unfinished response and step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmft.batch import PromptBatch, Responses


@dataclass
class Packed:
    """B packed rows of L tokens. See the picture above.

    Attributes:
        ids: (B, L) int64.
        positions: (B, L) or (3, B, L) int64.
        segment: (B, L) int64: 0 prompt, g + 1 response g, -1 padding.
        predictor: (M,) int64, for each of the M real response tokens the flat index into (B * L) of the token whose
            hidden state predicts it: the one before it, or the prompt's last.
        targets: (M,) int64, the token itself. In the order of ``Responses.mask.nonzero()``.
    """

    ids: Tensor
    positions: Tensor
    segment: Tensor
    predictor: Tensor
    targets: Tensor


def pack(prompts: PromptBatch, responses: Responses) -> Packed:
    """Lays B prompts and their N = B*G responses out in B rows."""
    n_prompts, n_responses = len(prompts), responses.ids.shape[0]
    group = n_responses // n_prompts
    device = prompts.prompt_ids.device
    prompt_length = prompts.prompt_mask.sum(-1)  # (B,)
    length = responses.mask.sum(-1).view(n_prompts, group)  # (B, G)
    start = prompt_length[:, None] + length.cumsum(-1) - length  # (B, G) where each response begins
    width = int((prompt_length + length.sum(-1)).max())

    ids = prompts.prompt_ids.new_zeros(n_prompts, width)
    segment = torch.full_like(ids, -1)
    p_width = prompts.prompt_ids.shape[1]
    ids[:, :p_width] = torch.where(prompts.prompt_mask, prompts.prompt_ids, 0)
    segment[:, :p_width] = torch.where(prompts.prompt_mask, 0, -1)
    positions = prompts.positions.new_zeros(*prompts.positions.shape[:-1], width)
    positions[..., :p_width] = prompts.positions

    n, t = responses.mask.nonzero(as_tuple=True)  # (M,) each: response and place in it
    b, g = n // group, n % group
    column = start[b, g] + t
    ids[b, column] = responses.ids[n, t]
    segment[b, column] = g + 1
    positions[..., b, column] = prompts.next_position[b] + t
    before = torch.where(t == 0, prompt_length[b] - 1, column - 1)
    return Packed(ids, positions, segment, b * width + before, responses.ids[n, t].to(device))


def block_mask(packed: Packed, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) additive attention mask: 0 where a query may look at a key, the dtype's lowest elsewhere."""
    query, key = packed.segment[:, :, None], packed.segment[:, None, :]
    width = packed.segment.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    return additive(causal & ((key == query) | (key == 0)) & (key >= 0), dtype)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool (B, Q, K) -> additive (B, 1, Q, K). The lowest finite number, not -inf: a padding query with nothing to
    look at then gives an unused number instead of NaN."""
    if torch.is_autocast_enabled(allowed.device.type):
        dtype = torch.get_autocast_dtype(allowed.device.type)  # fp32's lowest number would become -inf there
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

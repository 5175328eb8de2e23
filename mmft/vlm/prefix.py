"""One prompt, many responses: the packed layout and its forward pass, with gradients.

All real tokens of a batch stand in one row, the prompts first, then the responses, without padding:

    tokens     p p p p | q q q | a a a | b b | c c c c | d
    position   0 1 2 3 | 0 1 2 | 4 5 6 | 4 5 | 3 4 5 6 | 3

Here a and b answer the prompt p, c and d the prompt q; the last token of a response predicts nothing and is left out.
A token attends to its prompt and to the earlier tokens of its own response (`attention.py`), and positions restart
after the prompt for every response, so each response reads exactly as if it stood alone behind its prompt: the same
numbers as N separate rows, for B prompts instead of N. Gradients flow into the shared prompt once, summed by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmft.batch import PromptBatch, Responses
from mmft.vlm.attention import PrefixAttention
from mmft.vlm.families import Family


@dataclass
class Packed:
    """M tokens in one row. See the picture above.

    Attributes:
        ids: (1, M) int64.
        positions: (1, M) or (3, 1, M) int64.
        attention: who attends to whom.
        predictor: (R,) int64, for each of the R real response tokens the index into M of the token whose hidden state
            predicts it: the one before it, or the prompt's last.
        targets: (R,) int64, the token itself. In the order of ``Responses.mask.nonzero()``.
    """

    ids: Tensor
    positions: Tensor
    attention: PrefixAttention
    predictor: Tensor
    targets: Tensor


def pack(prompts: PromptBatch, responses: Responses, family: Family, picture_ids: list[int]) -> Packed:
    """Lays B prompts and their N = B*G responses out in one row.

    Args:
        picture_ids: ids of the placeholder tokens, where the family's attention depends on them.
    """
    group = responses.ids.shape[0] // len(prompts)
    ids, positions, last = pack_prompts(prompts)
    # The last token of a response predicts nothing, so it is not read.
    mask = responses.mask[:, :-1] & responses.mask[:, 1:]
    n, t = mask.nonzero(as_tuple=True)  # (R',) each: response and place in it
    own = (prompts.next_position[n // group] + t).expand(*positions.shape[:-1], -1)
    place = ids.shape[1] + torch.arange(len(n), device=n.device)
    before = last.repeat_interleave(group)[:, None].repeat(1, responses.ids.shape[1])  # (N, T) whose state predicts
    before[:, 1:][mask] = place
    block = seen_as_one(prompts, family, picture_ids)
    return Packed(
        torch.cat([ids, responses.ids[n, t][None]], -1),
        torch.cat([positions, own], -1),
        PrefixAttention(prompts.prompt_mask, mask if len(n) else None, block, read=torch.cat([last, place])),
        before[responses.mask],
        responses.ids[responses.mask],
    )


def pack_prompts(prompts: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts alone: ids (1, M), positions (1, M) or (3, 1, M), and the place (B,) of each prompt's last token."""
    mask = prompts.prompt_mask
    last = mask.sum(-1).cumsum(0) - 1
    return prompts.prompt_ids[mask][None], prompts.positions[..., mask][..., None, :], last


def seen_as_one(prompts: PromptBatch, family: Family, picture_ids: list[int]) -> Tensor | None:
    """(B, P) int64 numbers of the blocks within which prompt tokens see each other both ways, -1 outside of any;
    None for a prompt that is read causally."""
    if family.prompt_attention == "causal":
        return None
    if family.prompt_attention == "whole":
        return torch.zeros_like(prompts.prompt_ids)
    picture = torch.isin(prompts.prompt_ids, torch.tensor(picture_ids, device=prompts.prompt_ids.device))
    first = picture & ~torch.nn.functional.pad(picture, (1, 0))[:, :-1]
    return torch.where(picture, first.long().cumsum(-1), -1)

"""The legend of the house: what one batch is made of.

Letters used in every shape of the project: B prompts of a step, G responses to each, N = B*G responses
(the G responses of one prompt stand next to each other), P prompt tokens, T response tokens, V words of the
vocabulary, H hidden size. Every mask ends in ``_mask``; True = takes part. Log-probabilities and KL are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class VisualRecord:
    """Everything the model needs of the pictures of one row, before or after the vision tower.

    Attributes:
        key: identity of the pictures; rows with equal keys share one encoding.
        tensors: the processor's visual outputs for this row alone (``pixel_values``, ``image_grid_thw``, ...);
            empty for a row without a picture.
        features: the tower's output for this row once encoded, else None: ``{"pooler_output": [(tokens, H), ...],
            "deepstack_features": [[(tokens, H), ...] per layer]}``.
    """

    key: str | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, list[Any]] | None = None


@dataclass
class PromptBatch:
    """B prompts, padded on the right (the packed layout keeps each prompt's tokens together).

    Attributes:
        prompt_ids: (B, P) int64.
        prompt_mask: (B, P) bool.
        positions: (B, P) int64, or (3, B, P) for families with multimodal rotary positions.
        next_position: (B,) int64, the position of the first response token.
        visuals: one record per row.
        rows: one dict of dataset columns per row; for reward functions and messages.
        row_ids: one stable identity per row; seeds the sampling of that row.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    positions: Tensor
    next_position: Tensor
    visuals: list[VisualRecord]
    rows: list[dict[str, Any]]
    row_ids: list[str]

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def select(self, indices: list[int]) -> PromptBatch:
        """The batch of the given rows, with the padding that only the others needed cut off."""
        index = torch.as_tensor(indices, device=self.prompt_ids.device)
        width = int(self.prompt_mask[index].sum(-1).max())
        return PromptBatch(
            prompt_ids=self.prompt_ids[index, :width],
            prompt_mask=self.prompt_mask[index, :width],
            positions=self.positions[..., index, :width],
            next_position=self.next_position[index],
            visuals=[self.visuals[i] for i in indices],
            rows=[self.rows[i] for i in indices],
            row_ids=[self.row_ids[i] for i in indices],
        )


@dataclass
class Responses:
    """What the policy wrote.

    Attributes:
        ids: (N, T) int64, padded on the right.
        mask: (N, T) bool, True on real tokens, the end-of-sequence token included.
        ended: (N,) bool, True where the response stopped by itself and was not cut at T.
    """

    ids: Tensor
    mask: Tensor
    ended: Tensor

    def select_groups(self, indices: list[int], group_size: int) -> Responses:
        """The responses of the given prompts, cut to their longest."""
        index = torch.as_tensor(indices, device=self.ids.device)
        index = (index[:, None] * group_size + torch.arange(group_size, device=self.ids.device)).flatten()
        width = max(int(self.mask[index].sum(-1).max()), 1)
        return Responses(self.ids[index, :width], self.mask[index, :width], self.ended[index])


@dataclass
class TokenOutputs:
    """What the policy says of response tokens; all (N, T), zero outside the response mask.

    ``logprobs[n, t]`` is the log-probability of token t given all before it, at the sampling temperature and with
    the never-sampled tokens left out; ``values[n, t]`` the critic's estimate in the state before token t;
    ``entropy[n, t]`` that of the distribution token t was drawn from (None where nobody asked for it).
    """

    logprobs: Tensor
    values: Tensor | None = None
    entropy: Tensor | None = None


@dataclass
class Rollout:
    """One step's experience: N = B*G responses with everything the update needs.

    Attributes:
        prompts: the B prompts.
        responses: the N responses; ``texts`` are the same, decoded without special tokens.
        old: log-probs, values and entropy captured while sampling.
        ref_logprobs: (N, T), or None when no KL is wanted.
        scores: (N,) the reward side's weighted total.
        plain: (N,) the same without normalisation over batch or group: comparable between calls.
        parts: reward name -> (N,) that part alone, NaN where it does not apply.
        weighted: reward name -> (N,) what the part adds to the score.
        keep: (N,) bool, False on responses that a reward dropped and no update may use; None = all are kept.
        dense: (N, T) the share of the score that is credited token by token, or None; its sum over tokens is taken
            off what the last token gets.
        potentials: (N, T) of the shaping term, or None.
        rewards: (N, T) token rewards (KL penalty, shaping, score on the last real token).
        advantages, returns: (N, T).
    """

    prompts: PromptBatch
    responses: Responses
    texts: list[str]
    old: TokenOutputs
    ref_logprobs: Tensor | None = None
    scores: Tensor | None = None
    plain: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    weighted: dict[str, Tensor] = field(default_factory=dict)
    keep: Tensor | None = None
    dense: Tensor | None = None
    potentials: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def update_mask(self) -> Tensor:
        """(N, T) bool, the tokens that statistics and losses are taken over."""
        mask = self.responses.mask
        return mask if self.keep is None else mask & self.keep[:, None]

"""Text features and picture features -> one reward, by four ways of fusing them; an ensemble of such heads.

The states of the response have seen the picture already, through the backbone's attention; the fusion gives the head
the picture itself. Beside each state stands the token's log-probability under the backbone: a state tells what may
come next, the log-probability whether that came, and it is this that gives a wrong colour away. All of it is computed
in fp32. A row without pictures reads a learned "no picture" vector instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

FUSIONS = ("concat", "sum", "gated", "cross_attention")
_ATTENTION_HEADS = 4


class FusionHead(nn.Module):
    """One head: (text states, picture features) -> reward.

    With t the last and the mean text feature (state and log-probability), projected to `width`, and p the mean
    picture feature, projected too:

    - ``concat``: W [t; p]
    - ``sum``: a * t + (1 - a) * p, a = sigmoid of a learned number, 1/2 at the start
    - ``gated``: z * tanh(t) + (1 - z) * tanh(p), z = sigmoid(W [t; p]) per feature (Arevalo et al. 2017, arXiv
      1702.01992, section 3.1)
    - ``cross_attention``: every response state asks the picture's features (multi-head attention, Vaswani et al. 2017;
      text over picture as in Lu et al. 2019, arXiv 1908.02265), adds what it got, and then t is taken

    and then a layer of `width` GELUs, and a linear map to the reward: without the layer, a sum would rank two texts
    the same way for every picture.

    Args:
        text_size, picture_size: features of a response state and of a picture token.
        width: features inside the head; a multiple of 4 for ``cross_attention``.
        fusion: one of `FUSIONS`.
        dropout: share of fused features dropped in training, and in Monte Carlo draws.
    """

    def __init__(self, text_size: int, picture_size: int, width: int, fusion: str, dropout: float = 0.1):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: unknown {fusion!r}; there are {', '.join(FUSIONS)}")
        if fusion == "cross_attention" and width % _ATTENTION_HEADS:
            raise ValueError(f"width: {width} is no multiple of {_ATTENTION_HEADS}, as cross_attention needs")
        self.fusion, self.width, self.dropout = fusion, width, dropout
        self.text_norm = nn.LayerNorm(text_size)
        self.picture_norm = nn.LayerNorm(picture_size)
        self.no_picture = nn.Parameter(torch.randn(picture_size) * 0.02)
        text_size += 1  # the log-probability
        if fusion == "cross_attention":
            self.query = nn.Linear(text_size, width)
            self.key_value = nn.Linear(picture_size, 2 * width)
            self.out = nn.Linear(width, width)
            self.residual = nn.Linear(text_size, width)
            self.text = nn.Linear(2 * width, width)
        else:
            self.text = nn.Linear(2 * text_size, width)
            self.picture = nn.Linear(picture_size, width)
        if fusion == "sum":
            self.balance = nn.Parameter(torch.zeros(()))
        if fusion in ("concat", "gated"):
            self.join = nn.Linear(2 * width, width)
        self.hidden = nn.Linear(width, width)
        self.reward = nn.Linear(width, 1)
        nn.init.normal_(self.reward.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.reward.bias)

    def forward(
        self,
        text: Tensor,
        logprobs: Tensor,
        text_mask: Tensor,
        picture: Tensor,
        picture_mask: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Rewards (N,) or, for S draws, (S, N).

        Args:
            text: (N, T, text_size) states of the response tokens, real ones first; every row has at least one.
            logprobs: (N, T) their log-probabilities, in nats.
            text_mask: (N, T), True = real.
            picture: (N, M, picture_size) features of the row's picture tokens.
            picture_mask: (N, M), True = real. M may be 0.
            keep: (S, 2, width) factors on the fused and on the hidden features: one drawn network per S, the same for
                every row. None: dropout in training mode, all features otherwise.
        """
        text = torch.cat([self.text_norm(text.float()), logprobs.float()[..., None]], dim=-1)
        nothing = self.no_picture.expand(len(text), 1, -1)
        # The "no picture" vector stands before every picture: attention may choose it, and no row has zero keys.
        picture = self.picture_norm(torch.cat([nothing, picture.float()], dim=1))
        blind = ~picture_mask.any(-1, keepdim=True)
        if self.fusion == "cross_attention":
            seen = torch.cat([torch.ones_like(blind), picture_mask], dim=1)
            fused = self.text(_last_and_mean(self._attend(text, picture, seen), text_mask))
        else:
            seen = torch.cat([blind, picture_mask], dim=1)
            fused = self._fuse(self.text(_last_and_mean(text, text_mask)), self.picture(_mean(picture, seen)))
        fused = self._drop(fused, None if keep is None else keep[:, 0])
        hidden = self._drop(gelu(self.hidden(gelu(fused))), None if keep is None else keep[:, 1])
        return self.reward(hidden).squeeze(-1)

    def _fuse(self, text: Tensor, picture: Tensor) -> Tensor:
        if self.fusion == "sum":
            share = self.balance.sigmoid()
            return share * text + (1 - share) * picture
        joined = self.join(torch.cat([text, picture], dim=-1))
        if self.fusion == "concat":
            return joined
        gate = joined.sigmoid()
        return gate * text.tanh() + (1 - gate) * picture.tanh()

    def _attend(self, text: Tensor, picture: Tensor, seen: Tensor) -> Tensor:
        """(N, T, text_size) -> (N, T, width): each state plus what it asked of the picture."""
        n, each = len(text), self.width // _ATTENTION_HEADS
        query = self.query(text).view(n, -1, _ATTENTION_HEADS, each).transpose(1, 2)
        key, value = self.key_value(picture).view(n, -1, 2, _ATTENTION_HEADS, each).permute(2, 0, 3, 1, 4)
        got = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
        return self.residual(text) + self.out(got.transpose(1, 2).reshape(n, -1, self.width))

    def _drop(self, features: Tensor, keep: Tensor | None) -> Tensor:
        if keep is not None:
            return features * keep[:, None]
        return dropout(features, self.dropout, self.training)


class PreferenceHead(nn.ModuleList):
    """K heads that differ by their start and, in training, by what they see: an ensemble (Lakshminarayanan et al. 2017,
    arXiv 1612.01474; of reward models: Coste et al. 2023, arXiv 2310.02743)."""

    def __init__(
        self,
        text_size: int,
        picture_size: int,
        width: int = 128,
        fusion: str = "cross_attention",
        heads: int = 1,
        dropout: float = 0.1,
    ):
        if heads < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a share of at least 0 and less than 1, got {dropout}")
        super().__init__(FusionHead(text_size, picture_size, width, fusion, dropout) for _ in range(heads))

    def forward(
        self,
        text: Tensor,
        logprobs: Tensor,
        text_mask: Tensor,
        picture: Tensor,
        picture_mask: Tensor,
        draws: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """(K, N) rewards; with `draws` > 0, (K * draws, N) under dropout (Gal and Ghahramani 2016, arXiv 1506.02142).

        A draw is one network for all rows, drawn from `seed` alone: a row's rewards depend neither on its batch-mates
        nor on how often the head was used before.
        """
        with torch.autocast(text.device.type, enabled=False):
            inputs = (text, logprobs, text_mask, picture, picture_mask)
            if not draws:
                return torch.stack([head(*inputs) for head in self])
            keeps = self._keeps(draws, seed)
            return torch.cat([head(*inputs, keep.to(text.device)) for head, keep in zip(self, keeps, strict=True)])

    def _keeps(self, draws: int, seed: int) -> Tensor:
        """(K, draws, 2, width) factors: 0 for a dropped feature, 1 / (1 - dropout) for a kept one."""
        first = self[0]
        assert isinstance(first, FusionHead)
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same
        drawn = torch.rand(len(self), draws, 2, first.width, generator=generator)
        return (drawn >= first.dropout).float() / (1 - first.dropout)


def _last_and_mean(text: Tensor, mask: Tensor) -> Tensor:
    """(N, T, D) -> (N, 2D): the last real state and the mean of the real ones."""
    last = text[torch.arange(len(text), device=text.device), mask.sum(-1) - 1]
    return torch.cat([last, _mean(text, mask)], dim=-1)


def _mean(features: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(features.dtype)
    return torch.einsum("ntd,nt->nd", features, weight) / weight.sum(-1, keepdim=True)

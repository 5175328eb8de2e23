"""Shapes of the models that `cluster_plan.py` plans for, and closed counts of their parameters.

Dimensions are those of the checkpoints' public `config.json`; the counts are held against transformers' own modules by
`tests/benchmarks/test_cluster_plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

from benchmarks._work import Linear


@dataclass(frozen=True)
class Tower:
    """A vision tower with its connector.

    Attributes:
        gated: three matrices in the feed-forward block (Qwen2.5-VL) in place of two (SigLIP).
        patch: numbers of one patch (channels x height x width x frames).
        positions: learned ones; 0 = rotary.
        merge: side of the square of patches that becomes one token.
        two: the connector has two layers with biases, else one without.
        full: layers whose attention sees the whole picture; the others see ``window`` patches.
    """

    layers: int
    hidden: int
    intermediate: int
    gated: bool
    patch: int
    positions: int
    merge: int
    two: bool
    full: int
    window: int = 0

    @cached_property
    def linears(self) -> list[tuple[int, int]]:
        """(inner, outer) of one layer's matrices."""
        h, i = self.hidden, self.intermediate
        return [(h, 3 * h), (h, h)] + ([(h, i), (h, i)] if self.gated else [(h, i)]) + [(i, h)]

    @cached_property
    def matrices(self) -> int:
        """Parameters in the matrices of all layers."""
        return self.layers * sum(i * o for i, o in self.linears)

    def connector(self, hidden: int) -> list[tuple[int, int]]:
        """(inner, outer) of what joins it to a decoder of that width."""
        wide = self.hidden * self.merge**2
        return [(wide, wide), (wide, hidden)] if self.two else [(wide, hidden)]

    def parameters(self, hidden: int) -> int:
        """Of tower and connector, biases and norms included."""
        h = self.hidden
        layer = sum(i * o + o for i, o in self.linears) + (2 if self.gated else 4) * h  # norms: RMS, or with biases
        joined = sum(i * o + o * self.two for i, o in self.connector(hidden))
        ends = h if self.gated else 3 * h + self.positions * h  # the connector's norm; biases of patches, last norm
        return self.layers * layer + self.patch * h + joined + ends


@dataclass(frozen=True)
class Model:
    """A decoder of Llama's kind behind a vision tower.

    Attributes:
        head: width of one attention head.
        tied: the output head is the embedding.
        biased: query, key and value have biases (Qwen).
        patches, picture_tokens: of one picture of ``side`` x ``side`` pixels.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    biased: bool
    tower: Tower
    side: int
    patches: int
    picture_tokens: int

    @property
    def queries(self) -> int:
        return self.heads * self.head

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(inner, outer) of one layer's q, k, v, o, gate, up and down."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.intermediate
        return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]

    @cached_property
    def matrices(self) -> int:
        """Parameters in the matrices of all decoder layers: what LoRA adapts."""
        return self.layers * sum(i * o for i, o in self.shapes)

    @cached_property
    def vision(self) -> int:
        return self.tower.parameters(self.hidden)

    @cached_property
    def parameters(self) -> int:
        biases = self.layers * (self.queries + 2 * self.keys) if self.biased else 0
        norms = (2 * self.layers + 1) * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.matrices + biases + norms + embeddings + self.vision

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on the decoder."""
        return self.layers * rank * sum(i + o for i, o in self.shapes)

    @cached_property
    def cached(self) -> int:
        """Numbers that decoding keeps of one token: keys and values of all layers."""
        return 2 * self.layers * self.keys

    def linears(self, rank: int) -> list[Linear]:
        """As `_work.py` counts them."""
        return _linears(self, rank)


@cache
def _linears(model: Model, rank: int) -> list[Linear]:
    return [
        Linear(
            inner,
            outer,
            rank,
            first=layer == 0 and number < 3,  # q, k, v are fed by embeddings
            last=layer == model.layers - 1 and number not in (1, 2),  # keys and values are needed of every token
        )
        for layer in range(model.layers)
        for number, (inner, outer) in enumerate(model.shapes)
    ]


_SIGLIP_BASE = Tower(12, 768, 3072, False, 3 * 16 * 16, 32 * 32, 4, False, 12)
_SIGLIP_LARGE = Tower(27, 1152, 4304, False, 3 * 14 * 14, 27 * 27, 3, False, 27)
_QWEN = Tower(32, 1280, 3420, True, 3 * 2 * 14 * 14, 0, 2, True, 4, window=64)
_QWEN_WIDE = replace(_QWEN, intermediate=3456)

# Pictures: SmolVLM's unsplit ones; 448 px for Qwen2.5-VL, which takes any size.
MODELS = {
    model.name: model
    for model in (
        Model("SmolVLM-256M", 30, 576, 1536, 9, 3, 64, 49280, False, False, _SIGLIP_BASE, 512, 1024, 64),
        Model("SmolVLM-500M", 32, 960, 2560, 15, 5, 64, 49280, False, False, _SIGLIP_BASE, 512, 1024, 64),
        Model("SmolVLM-2.2B", 24, 2048, 8192, 32, 32, 64, 49155, False, False, _SIGLIP_LARGE, 384, 729, 81),
        Model("Qwen2.5-VL-3B", 36, 2048, 11008, 16, 2, 128, 151936, True, True, _QWEN, 448, 1024, 256),
        Model("Qwen2.5-VL-7B", 28, 3584, 18944, 28, 4, 128, 152064, False, True, _QWEN, 448, 1024, 256),
        Model("Qwen2.5-VL-32B", 64, 5120, 27648, 40, 8, 128, 152064, False, True, _QWEN_WIDE, 448, 1024, 256),
        Model("Qwen2.5-VL-72B", 80, 8192, 29568, 64, 8, 128, 152064, False, True, _QWEN_WIDE, 448, 1024, 256),
    )
}

# What the benchmarks measure here (`_models.py`): not planned for, compared with.
MEASURED = {
    "bundled": Model(
        "bundled",
        3,
        128,
        336,
        4,
        2,
        32,
        1460,
        True,
        False,
        Tower(4, 128, 320, False, 3 * 12 * 12, 64, 1, True, 4),
        96,
        64,
        64,
    ),
    "smolvlm256m": replace(MODELS["SmolVLM-256M"], name="smolvlm256m", tied=True),
}

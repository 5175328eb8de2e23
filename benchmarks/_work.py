"""What one PPO iteration must do at least: matrix products, attention and bytes, phase by phase, from the layers.

Counted is what no implementation with these weights can leave out:

- each distinct picture once, each prompt once for its G responses, no padding, no recomputation;
- of a response, T - 1 tokens are read (the last one predicts nothing), and the prompt's last token predicts the first
  token of all G responses;
- in the last layer, all but keys and values is needed only where a token is predicted;
- attention over the pairs that the causal mask lets through;
- backward: gradients of activations through frozen weights, gradients of the adapters; no gradient of frozen weights,
  none below the first layer's adapters (embeddings and pictures are frozen);
- adapters beside their weights or folded into them once a phase, whichever takes fewer operations.

Bytes are those that caches cannot save in principle: weights once per pass (per token in decoding), keys and values,
optimizer state. Activations are not among them, so the bound of bytes is a lower one. Element-wise work (norms,
softmax, rotary positions) counts as nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from mmft.vlm.decoder import backbone, text_decoder
from mmft.vlm.families import family_of


@dataclass
class Work:
    """Attributes:
    products: (rows, inner, outer) of a matrix product -> how often.
    attention: floating-point operations of queries x keys and weights x values.
    bytes: that have to move.
    working_set: bytes that a pass goes through; if a cache holds them, the cache's bandwidth is the limit.
    """

    products: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    attention: float = 0.0
    bytes: float = 0.0
    working_set: float = 0.0

    @property
    def flops(self) -> float:
        return self.attention + sum(2.0 * m * k * n * times for (m, k, n), times in self.products.items())


@dataclass(frozen=True)
class Batch:
    """B prompts of P tokens with G responses of T tokens each; their pictures' patches and tokens, all together."""

    prompts: int
    prompt_tokens: int
    group: int
    length: int
    micro: int
    patches: int
    picture_tokens: int
    itemsize: int = 4


@dataclass(frozen=True)
class Linear:
    """One linear map of the decoder. ``last``: only needed where a token is predicted. ``first``: fed by embeddings,
    which take no gradient. ``rank`` of its adapter, 0 without."""

    inner: int
    outer: int
    rank: int
    first: bool
    last: bool

    def folds(self, rows: int) -> bool:
        """Whether W + BA is cheaper to make than to apply B and A beside W to so many rows."""
        return rows * (self.inner + self.outer) > self.inner * self.outer


def must_do(policy, batch: Batch) -> dict[str, Work]:
    """Phases "vision", "prefill", "decode", "reference", "update" of an iteration with one pass over its experience."""
    model, b = policy.model, batch
    linears = list(_linears(model))
    text, size = model.config.get_text_config(), b.itemsize
    vocabulary, hidden = policy.head.weight.shape
    weights = sum(x.inner * x.outer for x in linears) * size
    adapters = sum(x.rank * (x.inner + x.outer) for x in linears) * size
    head = hidden * vocabulary * size
    layers, per_pair, kv = _attention(text)
    kv *= size * layers  # bytes of one token's keys and values

    read = b.prompt_tokens + b.group * (b.length - 1)  # tokens of a prompt and its responses
    predicting = 1 + b.group * (b.length - 1)
    answered = b.group * sum(b.prompt_tokens + t for t in range(1, b.length))  # pairs of the responses' queries
    prompt_pairs = b.prompt_tokens * (b.prompt_tokens + 1) // 2
    lower = b.prompts * (layers - 1) * (prompt_pairs + answered) * per_pair
    attention = lower + b.prompts * (b.prompt_tokens + answered) * per_pair

    prefill = Work(bytes=weights + adapters + b.prompts * b.prompt_tokens * kv, working_set=weights + adapters)
    rows, steps = b.prompts * b.group, b.length - 1
    sampled = b.prompts * b.prompt_tokens + rows * steps  # tokens that a fold of the adapters serves
    _forward(prefill, linears, b.prompts * b.prompt_tokens, b.prompts, 1, adapters_see=sampled)
    prefill.attention = b.prompts * ((layers - 1) * prompt_pairs + b.prompt_tokens) * per_pair

    decode = Work(working_set=weights + adapters + head)
    _forward(decode, linears, rows, rows, steps, adapters_see=sampled, fold_paid=True)
    decode.products[(b.prompts, hidden, vocabulary)] += 1
    decode.products[(rows, hidden, vocabulary)] += steps
    decode.attention = b.prompts * answered * layers * per_pair
    cache = sum(b.prompts * (b.prompt_tokens + b.group * t) for t in range(1, b.length))
    decode.bytes = steps * (weights + adapters) + b.length * head + cache * kv

    micros, sizes = b.prompts // b.micro, (b.micro * read, b.micro * predicting)
    reference = Work(bytes=weights + head, working_set=weights + head, attention=attention)
    _forward(reference, linears, *sizes, micros)
    reference.products[(sizes[1], hidden, vocabulary)] += micros

    update = Work(working_set=weights + head + adapters, attention=3 * attention)
    _forward(update, linears, *sizes, micros, adapters_see=b.prompts * read)
    _backward(update, linears, *sizes, micros, b.prompts * read)
    update.products[(sizes[1], hidden, vocabulary)] += micros
    update.products[(sizes[1], vocabulary, hidden)] += micros
    # Adapters: read twice, their gradients written; AdamW reads four arrays and writes three.
    update.bytes = 2 * (weights + head) + 10 * adapters
    return {"vision": _vision(model, b), "prefill": prefill, "decode": decode, "reference": reference, "update": update}


def _linears(model: nn.Module) -> Iterator[Linear]:
    """The linear maps of the decoder's layers, with their adapters."""
    modules = {name: m for name, m in text_decoder(model, family_of(model)).named_modules() if isinstance(m, nn.Linear)}
    modules = {name: m for name, m in modules.items() if re.search(r"\blayers\.\d+\.", name)}
    number = {name: int(re.search(r"\blayers\.(\d+)\.", name)[1]) for name in modules}
    for name, module in modules.items():
        if ".lora_" in name:
            continue
        adapter = modules.get(name.removesuffix("base_layer") + "lora_A.default")
        yield Linear(
            inner=module.in_features,
            outer=module.out_features,
            rank=adapter.out_features if adapter is not None else 0,
            first=number[name] == 0 and bool(re.search(r"\b[qkv]_proj\b", name)),
            last=number[name] == max(number.values()) and not re.search(r"\b[kv]_proj\b", name),
        )


def _attention(config) -> tuple[int, int, int]:
    """Layers, operations per pair of query and key, and numbers kept per token and layer (keys and values)."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, 4 * heads * width, 2 * config.num_key_value_heads * width


def _forward(
    work: Work,
    linears: list[Linear],
    tokens: int,
    predicting: int,
    times: int,
    adapters_see: int = 0,
    fold_paid: bool = False,
) -> None:
    """``adapters_see``: rows of the whole phase that a fold would serve; 0 = adapters off."""
    for x in linears:
        rows = predicting if x.last else tokens
        work.products[(rows, x.inner, x.outer)] += times
        if not adapters_see or not x.rank:
            continue
        if not x.folds(adapters_see):
            work.products[(rows, x.inner, x.rank)] += times
            work.products[(rows, x.rank, x.outer)] += times
        elif not fold_paid:
            work.products[(x.outer, x.rank, x.inner)] += 1


def _backward(work: Work, linears: list[Linear], tokens: int, predicting: int, times: int, adapters_see: int) -> None:
    for x in linears:
        rows = predicting if x.last else tokens
        if not x.first:
            work.products[(rows, x.outer, x.inner)] += times
        if not x.rank:
            continue
        work.products[(rows, x.outer, x.rank)] += times  # gradient of what stands between A and B
        work.products[(x.rank, rows, x.inner)] += times  # of A
        work.products[(x.outer, rows, x.rank)] += times  # of B
        if x.folds(adapters_see):
            work.products[(rows, x.inner, x.rank)] += times  # x A, which the forward pass had no need of
        elif not x.first:
            work.products[(rows, x.rank, x.inner)] += times  # gradient of x


def _vision(model: nn.Module, batch: Batch) -> Work:
    """The tower reads patches, the connector picture tokens."""
    decoder, config = text_decoder(model, family_of(model)), model.config.vision_config
    inside = set(map(id, decoder.modules()))
    work = Work()
    for name, module in backbone(model).named_modules():
        if id(module) in inside or not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            continue
        outer, inner = module.weight.flatten(1).shape
        connects = re.search("connector|projector|merger", name)
        work.products[(batch.picture_tokens if connects else batch.patches, inner, outer)] += 1
        work.bytes += module.weight.numel() * batch.itemsize
    work.working_set = work.bytes
    layers = getattr(config, "num_hidden_layers", None) or config.depth
    own = batch.patches // batch.prompts  # one picture per prompt
    window = own
    if hasattr(config, "fullatt_block_indexes"):  # Qwen2.5-VL: windows of so many pixels, but for a few layers
        window = min(own, (config.window_size // config.patch_size) ** 2)
    full = len(getattr(config, "fullatt_block_indexes", range(layers)))
    work.attention = 4.0 * config.hidden_size * batch.patches * (full * own + (layers - full) * window)
    return work

"""One training step without its numbers: what it allocates and frees, from the configuration of a model alone.

The engine's own code runs on a ghost of the model. Its floating-point tensors lie on torch's `meta` device, which
knows shapes and no contents; token ids, masks and positions are real, so that whatever depends on them goes the way it
goes in training. Nothing is loaded, and every allocation is seen at its true size.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from mmft.batch import PromptBatch, Responses, Rollout, TokenOutputs, VisualRecord
from mmft.training.config import PPOConfig
from mmft.training.critic import fit_critic
from mmft.training.update import update
from mmft.vlm import attention as engine_attention
from mmft.vlm.generate import generate
from mmft.vlm.load import DTYPES, build_policy, cannot_load, resolve, tune
from mmft.vlm.policy import Policy
from mmft.vlm.quantised import IN_FULL, LARGE_BLOCK

META, CPU = torch.device("meta"), torch.device("cpu")
# Decoding is alike from token to token but for the cache, which `memory.py` adds: so few are enough.
_DECODED = 3
HEAP_BLOCK = 32 << 20  # glibc maps larger blocks by themselves, and gives them back; see also `LARGE_BLOCK`


@dataclass
class Segment:
    """A stretch of the step.

    Attributes:
        phase: of the plan.
        peak: kind ("activations", "logits", "gradients") -> bytes held when the sum was highest.
        small: how many of those bytes lay in blocks of the heap, gradients not counted.
    """

    phase: str
    peak: dict[str, int]
    small: int


class Ghosts(TorchDispatchMode):
    """Floating-point results go to `meta`, all others are real; storages are counted from birth to death.

    Args:
        vocabulary: V; whatever ends in this dimension is counted as logits.
        heap_block: bytes; smaller blocks lie in the heap.
    """

    def __init__(self, vocabulary: int, heap_block: int = HEAP_BLOCK):
        super().__init__()
        self.vocabulary, self.heap_block = vocabulary, heap_block
        self.live: Counter[str] = Counter()
        self.segments: list[Segment] = []
        self._known: dict[int, tuple[str, int]] = {}  # storage -> kind, bytes
        self._dying: dict[int, weakref.ref] = {}
        self._now = self._small = 0
        self._begin("load")

    def _begin(self, phase: str) -> None:
        self.segments.append(Segment(phase, dict(self.live), self._small))
        self._highest = self._now

    @contextmanager
    def phase(self, name: str):
        """What happens inside belongs to the phase."""
        self._begin(name)
        yield
        self._begin("between")

    def ignore(self, tensors) -> None:
        """Does not count what was there before."""
        for tensor in tensors:
            self._known.setdefault(tensor.untyped_storage()._cdata, ("weights", 0))

    def tag(self, tensor: Tensor, kind: str) -> None:
        """From now on this tensor is of that kind."""
        key = tensor.untyped_storage()._cdata
        old, size = self._known.get(key, (kind, 0))
        self.live[old] -= size
        self.live[kind] += size
        if kind == "gradients" != old and size < self.heap_block:
            self._small -= size
        self._known[key] = kind, size

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        kind = "logits" if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else "activations"
        self._known[key] = kind, size
        self._dying[key] = weakref.ref(storage, partial(self._freed, key))
        self.live[kind] += size
        self._now += size
        self._small += size * (size < self.heap_block)
        if self._now > self._highest:
            self._highest = self._now
            self.segments[-1].peak, self.segments[-1].small = dict(self.live), self._small

    def _freed(self, key: int, _) -> None:
        kind, size = self._known.pop(key)
        del self._dying[key]
        self.live[kind] -= size
        self._now -= size
        if kind != "gradients" and size < self.heap_block:
            self._small -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = self._run(op, op._schema, args, kwargs or {})
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor):
                self._allocated(leaf)
        return out

    def _run(self, op, schema, args, kwargs) -> Any:
        tensors = _tensors_of(args) + _tensors_of(kwargs.values())
        ghostly = any(t.device == META for t in tensors)
        if schema.name == "aten::_local_scalar_dense" and ghostly:
            return 1.0
        if schema.name in ("aten::eq", "aten::ne") and ghostly:
            # Numbers that nobody knows are unlike all others, and like themselves (torch.isfinite asks that).
            same = args[0] is args[1] or isinstance(args[1], Tensor) and _storage(args[0]) == _storage(args[1])
            return torch.full(op(*_ghosts(args), **kwargs).shape, same == (schema.name == "aten::eq"))
        if schema.name == "aten::_to_copy" and not ghostly and args[0].numel() == 1:
            return op(*args, **kwargs)  # one real number, a verdict perhaps: stays real
        if any(argument.name == "device" for argument in schema.arguments):  # makes a tensor
            probe = op(*_ghosts(args), **(_ghosts(kwargs) | {"device": META}))
            if probe.dtype.is_floating_point:
                return probe
            if ghostly:
                return torch.zeros(probe.shape, dtype=probe.dtype)
            return op(*args, **(kwargs | {"device": CPU}))
        if not ghostly:
            return op(*args, **kwargs)
        if schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
            args = (args[0], _as_places(args[1]), *args[2:])
        if any(t.device != META for t in tensors):
            args, kwargs = _ghosts(args), _ghosts(kwargs)
        out = op(*args, **kwargs)
        if type(out) is Tensor and out.dtype.is_floating_point:
            return out
        if schema.is_mutable and tensors[0].device == CPU:
            return tensors[0]  # numbers written into a real tensor are not known
        return tree_map_only(
            Tensor, lambda t: t if t.dtype.is_floating_point else torch.zeros(t.shape, dtype=t.dtype), out
        )


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """On `meta`, torch writes attention out in single products; this takes the kernel that a CPU would, which keeps
    the output and a log-sum-exp. A GPU's fused kernels keep the same."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    with _disable_current_modes():
        # The same shapes for real, one row repeated: next to no memory.
        real = [
            None if t is None else torch.zeros(t.shape[-2:], dtype=t.dtype).expand(t.shape)
            for t in (query, key, value, attn_mask)
        ]
        fused = torch._fused_sdp_choice(*real, **options, enable_gqa=enable_gqa) == SDPBackend.FLASH_ATTENTION.value
    if query.device != META or not fused:
        return scaled_dot_product_attention(query, key, value, attn_mask, **options, enable_gqa=enable_gqa)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = attn_mask if attn_mask is None else attn_mask.to(META)
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _tensors_of(values) -> list[Tensor]:
    found = [value for value in values if isinstance(value, Tensor)]
    for value in values:
        if isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _ghosts(tree):
    return tree_map_only(Tensor, lambda t: t if t.device == META else t.to(META), tree)


def _as_places(indices) -> list[Tensor | None]:
    """A mask as an index says in its contents how much it picks; its places say that in their shape."""
    places: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and index.device == CPU
        places.extend(index.nonzero(as_tuple=True) if mask else [index])
    return places


class QuantisedLinear(nn.Linear):
    """A linear layer of the size of bitsandbytes' ones, which makes its weight in full whenever it is used."""

    def __init__(self, layer: nn.Linear, kind: str):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, META, layer.weight.dtype)
        self.full = layer.weight.dtype
        n = layer.weight.numel()
        # nf4: half a byte, a byte per 64 weights (their scale, itself quantised) and 4 per 256 of those. int8: a byte,
        # and 4 per row.
        size = n // 2 + n // 64 + n // 4096 if kind == "nf4" else n + 4 * layer.out_features
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device=META), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _Dequantised.apply(x, self.in_features, self.out_features, self.full)
        return (y if self.bias is None else y + self.bias).clone()  # as PEFT does with bitsandbytes' layers


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n_in, n_out, dtype):
        ctx.shape = n_out, n_in
        return linear(x.to(dtype), x.new_empty(n_out, n_in, dtype=dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(*ctx.shape), None, None, None


def ghost_policy(recipe, device: str = "cpu") -> Policy:
    """The policy that a recipe describes, without its weights.

    Raises:
        ValueError: configuration or processor of the model cannot be had.
    """
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

    folder, options = resolve(recipe.model.name), recipe.model
    try:
        trust = {"trust_remote_code": options.trust_remote_code}
        config, processor = (auto.from_pretrained(folder, **trust) for auto in (AutoConfig, AutoProcessor))
        with META:
            model = AutoModelForMultimodalLM.from_config(config, dtype=working_dtype(recipe, config, device), **trust)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ValueError(f"{cannot_load(options.name, folder, error)} (no plan without configuration)") from error
    if options.quantize:
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and not any(re.match(pattern, name) for pattern in IN_FULL):
                model.set_submodule(name, QuantisedLinear(layer, options.quantize))
        model.requires_grad_(False)
        if options.lora.dora:  # which makes the whole weight of a layer in every pass: here it counts as plain LoRA
            options = options.model_copy(update={"lora": options.lora.model_copy(update={"dora": False})})
    adapters = tune(model, options)
    reads = recipe.algorithm.kl_coef > 0
    policy = build_policy(model, processor, adapters, options.critic, needs_reference=reads, cache_bytes=0)
    if recipe.train.gradient_checkpointing:
        policy.checkpoint_activations()
    policy.model.to(META)
    if policy.value_head is not None:
        policy.value_head.to(META)
    policy.end_ids = [-1]  # no response ends by itself: the longest are planned for
    return policy


def working_dtype(recipe, config, device: str) -> torch.dtype:
    """As `mmft.vlm.load.load_model` chooses it."""
    if recipe.model.dtype != "auto":
        return DTYPES[recipe.model.dtype]
    return checkpoint_dtype(config) if device == "cuda" else torch.float32


def checkpoint_dtype(config) -> torch.dtype:
    """That of the file, as the configuration says it; float32 where it does not."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def probe_prompt(policy: Policy, rows: list[dict[str, Any]]) -> PromptBatch:
    """The longest of some rows' prompts, pictures included, as a batch of one."""
    batches = [policy.pictures.prompts([row], [str(i)], CPU) for i, row in enumerate(rows)]
    return max(batches, key=lambda batch: batch.prompt_ids.shape[1])


def _copies(prompt: PromptBatch, count: int) -> PromptBatch:
    """``count`` prompts like this one, each with pictures of its own."""
    batch = prompt.select([0] * count)
    record = prompt.visuals[0]
    batch.visuals = [
        VisualRecord(
            f"{record.key}/{i}" if record.key else None,
            {k: v.clone() if v.dtype.is_floating_point else v for k, v in record.tensors.items()},
        )
        for i in range(count)
    ]
    batch.row_ids = [f"row@{i}" for i in range(count)]
    return batch


@dataclass
class Trace:
    """What `trace_step` saw.

    Attributes:
        segments: in order; the update's is one minibatch of at most two microbatches, and the optimizer's step.
        decoded: tokens that were decoded per response.
        features: bytes of one row's picture features.
    """

    segments: list[Segment] = field(default_factory=list)
    decoded: int = _DECODED
    features: int = 0


def trace_step(policy: Policy, config: PPOConfig, prompt: PromptBatch, prompts: int) -> Trace:
    """Goes through a step of the training loop as `PPOTrainer.step` does, and through an evaluation.

    Args:
        prompt: a batch of one.
        prompts: of a step, on one rank.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    policy.largest_gradient = torch.zeros(())  # as where it is kept track of; see `distributed.py`
    quantised = any(isinstance(module, QuantisedLinear) for module in policy.modules())
    ghosts = Ghosts(policy.head.weight.shape[0], LARGE_BLOCK if quantised else HEAP_BLOCK)
    ghosts.ignore([*policy.parameters(), *policy.buffers()])
    for reference in policy._reference:
        ghosts.ignore([*reference.parameters(), *reference.buffers()])
    for parameter in trainable:
        parameter.register_post_accumulate_grad_hook(lambda p: ghosts.tag(p.grad, "gradients"))
    group, length = config.num_generations, config.max_completion_length
    decoded = min(_DECODED, length)
    known = torch.is_autocast_enabled  # knows no device "meta"

    def autocast(device_type, *args, **kwargs):
        return torch.amp.autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda *d: d != ("meta",) and known(*d)),
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention),
        mock.patch.object(engine_attention, "scaled_dot_product_attention", _fused_attention),
        ghosts,
    ):
        optimizer = torch.optim.SGD(trainable, lr=1e-4)  # without moments, which are counted in `memory.py`
        with ghosts.phase("encode"), torch.no_grad():
            batch = _copies(prompt, prompts)
            policy.features(batch)
            features = sum(t.numel() * t.element_size() for t in tree_leaves(batch.visuals[0].features or {}))
        with ghosts.phase("rollout"):
            generate(policy, batch, group, decoded, config.temperature, config.seed)
        rollout = _rollout(batch, config, policy)
        if config.kl_coef > 0:
            with ghosts.phase("reference"):
                policy(batch, rollout.responses, config.temperature, reference=True)
        if config.critic == "head" and config.critic_start == "fit":
            with ghosts.phase("critic fit"):
                fit_critic(policy, rollout, config, [i % 2 for i in range(prompts)])
        minibatch = max(prompts // config.num_mini_batches, 1)
        micro = min(config.micro_prompts or minibatch, minibatch)
        some = list(range(min(2 * micro, minibatch)))
        part = _rollout(batch.select(some), config, policy)
        del rollout
        one_pass = dataclasses.replace(config, num_ppo_epochs=1, num_mini_batches=1, prompts_per_step=len(some))
        with ghosts.phase("update"):
            policy.train()
            update(policy, optimizer, part, one_pass, accelerator, 1)
        del part, batch
        rows = min(config.eval_batch, config.eval_rows)
        with ghosts.phase("evaluation"), torch.no_grad():
            generate(policy, _copies(prompt, rows), 1, decoded, 0.0)
    return Trace([s for s in ghosts.segments if s.phase not in ("load", "between")], decoded, features)


def _rollout(prompts: PromptBatch, config: PPOConfig, policy: Policy) -> Rollout:
    """Responses of full length to the prompts, with ghosts of everything that the update reads."""
    n, t = len(prompts) * config.num_generations, config.max_completion_length
    mask = torch.ones(n, t, dtype=torch.bool)
    ids = torch.zeros(n, t, dtype=torch.long)
    numbers = [torch.zeros(n, t) for _ in range(6)]
    old = TokenOutputs(numbers[0], numbers[1] if config.critic == "head" else None, numbers[2])
    return Rollout(
        prompts,
        Responses(ids, mask, torch.ones(n, dtype=torch.bool)),
        [""] * n,
        old,
        rewards=numbers[3],
        advantages=numbers[4],
        returns=numbers[5],
    )

"""`mmft doctor memory`: how much memory each phase of a run will take, before anything is loaded.

The step is traced on a ghost of the model (`memory_trace.py`); what the trace cannot see is added here: the weights,
the interpreter with its libraries and rows, the cache of the tokens that were not decoded, the features of pictures
that are kept, what the C library's heap wastes, and what other ranks take over. Every formula is in docs/memory.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mmft.training.config import PPOConfig, from_recipe
from mmft.training.memory_trace import checkpoint_dtype, ghost_policy, probe_prompt, trace_step
from mmft.vlm.policy import Policy

GIB, MIB = 1 << 30, 1 << 20
# What the process holds for tensors in blocks below 32 MiB, over what they need. glibc keeps such blocks in one heap,
# where freed temporaries leave holes between the activations that stay. Measured; see docs/memory.md.
_HEAP = 2.0
_KEPT = 0.9  # of that, what it still holds in other phases: only freed memory at its very end goes back
_MAPPED = 128 << 10  # blocks above this were mapped one by one: no holes, and a system call for each
# Of a CUDA context with its libraries. A round figure, not measured by the benchmark.
CUDA_CONTEXT = GIB // 2
_ZERO3_LIVE = 10**9  # parameters that DeepSpeed keeps gathered at most: its stage3_max_live_parameters


@dataclass(frozen=True)
class Phase:
    """Bytes on one rank while a phase is at its highest.

    Attributes:
        base: interpreter, libraries and rows; on a GPU the CUDA context.
        weights: of policy and reference.
        optimizer: adapters (or all that is trained) with gradients and moments.
        activations: what the phase computes with.
        cache: keys and values of decoding, and kept picture features.
        logits: whatever is as wide as the vocabulary.
        slack: freed memory that the allocator keeps.
    """

    name: str
    base: int
    weights: int
    optimizer: int
    activations: int = 0
    cache: int = 0
    logits: int = 0
    slack: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "name")


@dataclass(frozen=True)
class Plan:
    """Phases in order, and what to do about the highest."""

    phases: list[Phase]
    device: str
    available: int
    ranks: int
    zero: int
    prompt_tokens: int
    advice: list[tuple[str, int]]  # override of the recipe, bytes that it saves

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.available

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in bytes."""
        phases = [asdict(phase) | {"total": phase.total} for phase in self.phases]
        return asdict(self) | {"phases": phases, "peak": self.peak.total, "fits": self.fits}

    def table(self) -> str:
        """Phases x kinds in MiB, and the verdict."""
        from rich.console import Console
        from rich.table import Table

        columns = [f.name for f in fields(Phase) if f.name != "name"]
        table = Table(title=f"MiB on each of {self.ranks} rank(s), {self.prompt_tokens} prompt tokens")
        table.add_column("phase")
        for name in [*columns, "total"]:
            table.add_column(name, justify="right")
        for phase in self.phases:
            numbers = [getattr(phase, name) for name in [*columns, "total"]]
            table.add_row(
                phase.name, *(f"{n / MIB:,.0f}" for n in numbers), style="bold" if phase is self.peak else None
            )
        console = Console(width=110)
        with console.capture() as captured:
            console.print(table)
        verdict = "fits" if self.fits else "does NOT fit"
        lines = [
            captured.get().rstrip(),
            f"peak: {self.peak.total / GIB:.2f} GiB in {self.peak.name}; {verdict} into the "
            f"{self.available / GIB:.1f} GiB of this {'machine' if self.device == 'cpu' else 'GPU'}",
        ]
        lines += [f"  {change} saves about {saved / MIB:,.0f} MiB" for change, saved in self.advice]
        return "\n".join(lines)


def plan_memory(
    recipe, ranks: int = 1, zero: int = 0, device_gib: float | None = None, rows: int = 4, base: int | None = None
) -> Plan:
    """Plans a run of a recipe.

    Args:
        ranks: processes that share each step.
        zero: DeepSpeed's stage, 0 to 3; 0 with several ranks is DDP.
        device_gib: memory of the GPU; None plans for this machine's CPU.
        rows: training rows whose prompts are looked at; the longest counts.
        base: bytes of the process without a model; None measures them in a process of its own.

    Raises:
        ValueError: model or rows cannot be had, or the ranks cannot share the step.
    """
    from mmft.training.run import rows_of

    config, device = from_recipe(recipe), "cpu" if device_gib is None else "cuda"
    if config.prompts_per_step % (ranks * config.num_mini_batches):
        raise ValueError(
            f"rollout.prompts_per_step: {config.prompts_per_step} cannot be shared evenly by {ranks} ranks x "
            f"{config.num_mini_batches} minibatches"
        )
    policy = ghost_policy(recipe, device)
    train = rows_of(recipe, recipe.data.train, recipe.data.train_rows)
    prompt = probe_prompt(policy, [train[i] for i in range(min(rows, len(train)))])
    trace = trace_step(policy, config, prompt, config.prompts_per_step // ranks)
    if device == "cuda":
        base, available = CUDA_CONTEXT, int(device_gib * GIB)
    else:
        base, available = base or measured_base(recipe), ram() // ranks
    phases = _phases(recipe, config, policy, trace, len(train), base, ranks, zero, device)
    peak = max(phases, key=lambda phase: phase.total)
    advice = _advice(recipe, config, policy, peak, ranks, device)
    return Plan(phases, device, available, ranks, zero, prompt.prompt_ids.shape[1], advice)


def _phases(recipe, config, policy, trace, rows, base, ranks, zero, device) -> list[Phase]:
    weights, loading = _weights(recipe, policy, device)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in trainable)
    # Adapters, connectors trained beside the original; of a model itself they are its weights.
    added = trained if hasattr(policy.model, "peft_config") else 0
    if zero == 3:
        element = policy.model.dtype.itemsize
        weights = weights // ranks + min(weights, _ZERO3_LIVE * element)
    kept = trace.features * (min(rows, config.max_steps * config.prompts_per_step) // ranks)
    kept = min(kept, config.cache_bytes) if policy.tower_frozen else 0
    phases = [Phase("load", base, loading, added)]
    factor = heap_factor() if device == "cpu" else 1.0
    largest = max(segment.small for segment in trace.segments)
    kept_heap = int(largest * factor * _KEPT) if factor > 1 else 0
    for segment in trace.segments:
        held = segment.peak
        state = _share(held.get("gradients", 0), moments(config.optimizer, trainable), trained, ranks, zero)
        activations, logits = held.get("activations", 0), held.get("logits", 0)
        cache = kept
        if segment.phase in ("rollout", "evaluation"):
            evaluating = segment.phase == "evaluation"
            group = 1 if evaluating else config.num_generations
            prompts = min(config.eval_batch, config.eval_rows) if evaluating else config.prompts_per_step // ranks
            cache += prompts * group * (config.max_completion_length - trace.decoded) * _cache_bytes(policy)
        slack = max(kept_heap, int(segment.small * factor)) - segment.small if factor > 1 else 0
        phases.append(Phase(segment.phase, base, weights, added + state, activations, cache, logits, slack))
    return phases


def _weights(recipe, policy: Policy, device: str) -> tuple[int, int]:
    """Bytes of weights that are there in training, and the most while they are loaded.

    On a CPU, safetensors maps the file into memory. Weights of the file's own dtype stay such mapped pages, which are
    read when first used; converted ones are copies, and the mapping goes when all are made. A quantised model is read
    tensor by tensor instead.
    """
    own = {id(p): p for p in policy.model.parameters()}
    added = [p for p in own.values() if p.requires_grad] if hasattr(policy.model, "peft_config") else []
    weights = sum(p.nbytes for p in own.values()) - sum(p.nbytes for p in added)
    copied = {id(p): p for other in policy._reference for p in other.parameters() if id(p) not in own}
    reference = sum(p.nbytes for p in copied.values())
    dtype = checkpoint_dtype(policy.model.config)
    if recipe.model.quantize:
        largest = max(p.numel() for p in own.values() if p.dtype != torch.uint8) * dtype.itemsize
        return weights, weights + largest
    if device != "cpu":
        return weights + reference, weights + reference
    if dtype == policy.model.dtype:
        return weights + reference, 2 * reference  # a copy for reference reads what it copies
    count = weights // policy.model.dtype.itemsize
    return weights + reference, weights + reference + count * dtype.itemsize


def moments(optimizer: str, trainable: list[torch.nn.Parameter]) -> int:
    """Bytes of an optimizer's moments. In 8 bits they have a scale for each 256, and small weights keep 32 bits."""
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 2 * sum(p.nbytes for p in trainable)
    return sum(2 * (p.numel() + p.numel() // 64 if p.numel() >= 4096 else p.nbytes) for p in trainable)


def _share(gradients: int, moments: int, trained: int, ranks: int, zero: int) -> int:
    """Gradients and moments of one rank."""
    if ranks == 1:
        return gradients + moments
    if zero == 0:
        return gradients + moments + trained  # DDP's buckets are a copy of the gradients
    return moments // ranks + (gradients if zero == 1 else gradients // ranks)


def _cache_bytes(policy: Policy) -> int:
    """Of one token: keys and values of all layers."""
    text = policy.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * policy.model.dtype.itemsize


def _advice(recipe, config: PPOConfig, policy: Policy, peak: Phase, ranks: int, device: str) -> list[tuple[str, int]]:
    """What lowers the peak, the most first."""
    found: list[tuple[str, int]] = []
    heap = heap_factor() if device == "cpu" else 1.0
    share = config.prompts_per_step // ranks
    micro = min(config.micro_prompts or share, share // config.num_mini_batches)
    if peak.name == "update":
        if micro > 1:
            less = max(micro // 2, 1)
            found.append((f"train.micro_prompts={less}", int(peak.activations * (1 - less / micro) * heap)))
        if not config.gradient_checkpointing:
            layers = policy.model.config.get_text_config().num_hidden_layers
            found.append(("train.gradient_checkpointing=true", int(peak.activations * (1 - 2 / layers) * heap)))
    if peak.name == "evaluation" and config.eval_rows > 1:
        found.append((f"eval.rows={max(min(config.eval_rows, config.eval_batch) // 2, 1)}", peak.activations // 2))
    if peak.name in ("encode", "rollout", "reference", "critic fit") and share > 1:
        found.append((f"rollout.prompts_per_step={config.prompts_per_step // 2}", int(peak.activations / 2 * heap)))
    if recipe.model.tune == "full":
        found.append(("model.tune=lora", peak.weights // 2 + peak.optimizer))
    if policy.model.dtype == torch.float32 and not recipe.model.quantize:
        found.append(("model.dtype=bfloat16", (peak.weights + peak.activations) // 2))
    if not recipe.model.quantize and recipe.model.tune in ("lora", "hybrid"):
        found.append(("model.quantize=nf4", int(peak.weights * 0.6) + peak.slack))
    if config.cache_bytes and peak.cache > 64 * MIB:
        found.append(("model.picture_cache.memory_mib=0", peak.cache))
    if heap > 1 and peak.slack > peak.total // 10:
        found.append(("MALLOC_MMAP_THRESHOLD_=65536 in the environment (slower)", peak.slack))
    return sorted((f for f in found if f[1] > MIB), key=lambda f: -f[1])


def heap_factor() -> float:
    """1 where the environment has the C library map every large block by itself."""
    return 1.0 if int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 1 << 30)) <= _MAPPED else _HEAP


# ---------------------------------------------------------------- the process without a model


def measured_base(recipe) -> int:
    """Resident bytes of a process with everything that a run of the recipe needs but its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        recipe.dump(file)
        code = "import sys; from mmft.training.memory import _base; _base(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"a run of this recipe would not start: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.splitlines()[-1])


def _base(file: str) -> None:
    from accelerate import Accelerator

    from mmft.recipe import load_recipe
    from mmft.training.run import caption_metrics, rewards_of, rows_of
    from reward_models import DocumentFrequencies

    recipe = load_recipe(file)
    if recipe.model.quantize or recipe.train.optimizer == "adamw_8bit":
        import bitsandbytes  # noqa: F401
    train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
    frequencies = DocumentFrequencies.from_references(train.references())
    kept = [rewards_of(recipe, frequencies), caption_metrics(frequencies, held_out), ghost_policy(recipe)]
    kept.append(Accelerator(cpu=True))
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(64, 64)).sum().backward()  # the products' library sets itself up
    torch.optim.AdamW(layer.parameters()).step()
    print(resident())


def resident() -> int:
    """Bytes of this process in memory, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise ValueError("no VmRSS in /proc/self/status: plans for a CPU are made on Linux; give --device-gib")


def ram() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal"):
            return int(line.split()[1]) << 10
    raise ValueError("no MemTotal in /proc/meminfo: plans for a CPU are made on Linux; give --device-gib")

"""Bytes of one PPO step on one GPU, phase by phase, in closed form: the planner's formulas (docs/memory.md) without its
trace, so that models can be planned for that no machine here could trace."""

from __future__ import annotations

from benchmarks._cluster import GIB, Job, trained, weight_bytes
from benchmarks._cluster_models import Model
from mmft.vlm.logprobs import CHUNK_BYTES, KEPT_BYTES

LIVE = 10**9  # parameters that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)
CONTEXT = GIB // 2  # CUDA's, as the planner counts it


def layer_activations(model: Model, job: Job, prompts: float, length: float) -> float:
    """Numbers that one decoder layer keeps for the backward pass of ``prompts`` groups."""
    h, i, q, k = model.hidden, model.intermediate, model.queries, model.keys
    p, responses = job.prompt(model), prompts * job.group
    tokens = prompts * p + responses * (length - 1)
    own = tokens * (4 * h + 2 + 6 * q + 3 * k + 4 * i) + 2 * responses * (p + length) * k
    if job.tune == "lora" and not job.folds:  # what PEFT keeps beside it, in fp32: x A^T, and each input as fp32
        own += tokens * (7 * job.lora + 2 * h + q + i) * 4 / job.itemsize
    return own


def memory(model: Model, job: Job) -> dict[str, dict[str, float]]:
    """Phase -> kind -> bytes on one trainer at its highest, with responses of full length."""
    n, size, most = job.trainers, job.itemsize, job.lengths.most
    rows, p = job.share * job.group, job.prompt(model)
    count, extra, gradient, state = trained(model, job)
    whole = weight_bytes(model, job)
    copy = whole if job.tune == "full" and job.kl else 0.0  # the reference; no engine shards it
    sharded = job.zero == 3
    resident = whole / n * (not job.offload) + min(whole, LIVE * size) if sharded else whole
    beside = count * extra / (n if sharded else 1)
    optimizer = 0.0 if job.offload else count * state / (n if job.zero else 1)
    gradients = count * gradient / (n if job.zero >= 2 else 1)
    if job.offload and job.zero >= 2:
        gradients = 0.0
    if n > 1 and job.zero == 0:
        gradients *= 2  # DDP's buckets
    features = job.share * job.pictures * model.picture_tokens * model.hidden * size
    kept = {"context": CONTEXT, "optimizer": beside + optimizer, "features": features}

    tokens = job.share * p + rows * (most - 1)
    forward = (3 * model.hidden + 3 * model.intermediate) * size  # of a token, in the widest place of a layer
    logits = (1 if size == 4 else 2) * min(rows * most * model.vocabulary * 4, CHUNK_BYTES)
    rollout = kept | {
        "weights": whole + copy,
        "cache": (job.share * p + rows * most) * model.cached * size,
        "activations": job.share * p * forward,
        "logits": rows * model.vocabulary * (size + 3 * 4),
    }
    if job.servers:  # the policy only reads what the engine wrote, as the reference does
        rollout |= {"cache": 0.0, "activations": tokens * forward, "logits": logits}
    reference = kept | {"weights": whole + copy, "activations": tokens * forward, "logits": logits}
    layer = layer_activations(model, job, job.micro, most) * size
    micro = job.micro * (p + job.group * (most - 1)) * size
    inputs, passing = micro * model.hidden, 3 * micro * model.intermediate  # kept of a layer; gradients on their way
    small = job.micro * job.group * most * model.vocabulary * 4
    update = kept | {
        "weights": resident + copy,
        "gradients": gradients,
        "activations": (model.layers * inputs + layer if job.checkpointing else model.layers * layer) + passing,
        "logits": small if small <= KEPT_BYTES else 2 * CHUNK_BYTES,
    }
    if job.tune == "full":
        update["activations"] += _tower_activations(model, job)
    fit = kept | {"weights": whole + copy, "activations": 6 * model.hidden**2 * 8}  # the value head's, in float64
    phases = {"rollout": rollout, "critic fit": fit, "update": update}
    return phases | ({"reference": reference} if job.kl else {})


def _tower_activations(model: Model, job: Job) -> float:
    """Bytes that a trained tower keeps for a microbatch's pictures: inputs of products and of attention."""
    tower = model.tower
    kept = sum(inner for inner, _ in tower.linears) + 5 * tower.hidden + tower.intermediate
    return job.micro * job.pictures * model.patches * tower.layers * kept * job.itemsize


def peak(model: Model, job: Job) -> float:
    """Bytes of the highest phase."""
    return max(sum(kinds.values()) for kinds in memory(model, job).values())

"""The start-up self-test on the user's own model and first row. Most silent bugs of VLM-RL die here.

Sampling and training must be the same distribution (sampled log-probs = training log-probs), the shared prefix must
give what transformers' own forward pass gives, and the picture must matter (another one changes the log-probs).
Placeholders = features is checked on every batch, in `generate`.
"""

from __future__ import annotations

import warnings

import torch

from mmft.batch import PromptBatch, VisualRecord
from mmft.vlm.generate import generate
from mmft.vlm.policy import Policy

# Largest difference of one token's log-prob. In half precision two orders of summation differ by this much.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@torch.no_grad()
def selftest(policy: Policy, prompts: PromptBatch, temperature: float = 1.0) -> dict[str, float]:
    """Runs the checks on a small batch, under whatever autocast is on.

    A model for which the shared prefix is not what its plain forward pass is takes the plain path from here on, with
    a warning that says by how much they differ.

    Args:
        prompts: with the pixels of their pictures (see `Pictures.prompts`); without them the shared prefix is not
            compared and no other picture is tried.

    Returns:
        ``{"logprob_error", "prefix_error", "blank_change"}``, largest absolute differences in nats, NaN where there
        was nothing to compare.

    Raises:
        ValueError: a check failed, with what it means.
    """
    was_training, allowed = policy.training, TOLERANCE.get(_working_dtype(policy), 0.25)
    policy.eval()  # dropout would be a difference of its own
    try:
        result = _differences(policy, prompts, temperature)
        worst = max(result["logprob_error"], result["prefix_error"], key=lambda x: float("-inf") if x != x else x)
        finite = result["logprob_error"] == result["logprob_error"]
        if policy.shared_prefix and not (finite and worst <= allowed):
            warnings.warn(
                f"self-test: on the shared prefix the log-probs of this {policy.model.config.model_type!r} model "
                f"differ from those of its plain forward pass by {worst:.2g} nats (allowed {allowed:g}). Training "
                "goes on without the shared prefix: right, and slower",
                stacklevel=2,
            )
            policy.take_plain_path()
            result = _differences(policy, prompts, temperature)
        if not result["logprob_error"] <= allowed:
            raise ValueError(
                f"self-test: log-probs captured while sampling differ from those of training by "
                f"{result['logprob_error']:.2g} nats (allowed {allowed:g}): this model cannot be trained as it is"
            )
        if result["blank_change"] == 0.0:
            raise ValueError("self-test: another picture changes nothing; the model does not see its pictures")
        return result
    finally:
        policy.train(was_training)


def _differences(policy: Policy, prompts: PromptBatch, temperature: float) -> dict[str, float]:
    nothing = float("nan")
    pixels = all(record.tensors or record.key is None for record in prompts.visuals)
    if not policy.shared_prefix and not pixels:
        raise ValueError("self-test: the plain path needs the pixels of the pictures; ask `Pictures.prompts` for them")
    responses, sampled = generate(policy, prompts, 2, 8, temperature, seed=0)
    trained = policy(prompts, responses, temperature).logprobs
    differences = {"logprob_error": float((trained - sampled.logprobs).abs().max()), "prefix_error": nothing}
    if policy.shared_prefix and pixels:
        policy.shared_prefix = False
        try:
            plain = policy(prompts, responses, temperature).logprobs
        finally:
            policy.shared_prefix = True
        differences["prefix_error"] = float((trained - plain).abs().max())
    other = _disturbed(policy, prompts) if pixels else None
    if other is None:
        return differences | {"blank_change": nothing}
    change = (policy(other, responses, temperature).logprobs - trained).abs().max()
    return differences | {"blank_change": float(change)}


def _working_dtype(policy: Policy) -> torch.dtype:
    """The precision activations are computed in: autocast's where it is on, half for quantised weights."""
    if torch.is_autocast_enabled(policy.device.type):
        return torch.get_autocast_dtype(policy.device.type)
    return torch.bfloat16 if getattr(policy.model, "is_quantized", False) else policy.model.dtype


def _disturbed(policy: Policy, prompts: PromptBatch) -> PromptBatch | None:
    """The batch with the values of pictures, clips and sounds turned upside down and made uneven, so that a plain
    picture changes too; None when it holds none."""
    visuals, found = [], False
    for record in prompts.visuals:
        raw = {k: v for k, v in record.tensors.items() if v.is_floating_point() and not k.endswith("mask")}
        other = {k: torch.linspace(-1, 1, v.shape[-1], dtype=v.dtype) - v for k, v in raw.items()}
        visuals.append(VisualRecord(f"disturbed {record.key}", record.tensors | other) if raw else record)
        found |= bool(raw)
    if not found:
        return None
    batch = prompts.select(list(range(len(prompts))))
    batch.visuals = visuals
    return batch

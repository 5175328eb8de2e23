"""The start-up self-test on the user's own model and first row. Most silent bugs of VLM-RL die here.

Sampling and training must be the same distribution (sampled log-probs = training log-probs), and the picture must
matter (another one changes them). Placeholders = features is checked on every batch, in `generate`.
"""

from __future__ import annotations

import torch

from mmft.batch import PromptBatch, VisualRecord
from mmft.vlm.generate import generate
from mmft.vlm.policy import Policy

# Largest difference of one token's log-prob. In half precision two orders of summation differ by this much.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@torch.no_grad()
def selftest(policy: Policy, prompts: PromptBatch, temperature: float = 1.0) -> dict[str, float]:
    """Runs the checks on a small batch, under whatever autocast is on.

    Returns:
        ``{"logprob_error", "blank_change"}``, largest absolute differences in nats; ``blank_change`` is NaN where
        the batch holds no pictures to blank.

    Raises:
        ValueError: a check failed, with what it means.
    """
    was_training = policy.training
    policy.eval()  # dropout would be a difference of its own
    try:
        responses, sampled = generate(policy, prompts, 2, 8, temperature, seed=0)
        trained = policy(prompts, responses, temperature).logprobs
        error = float((trained - sampled.logprobs).abs().max())
        allowed = TOLERANCE.get(_working_dtype(policy), 0.25)
        if not error <= allowed:
            raise ValueError(
                f"self-test: log-probs captured while sampling differ from those of training by {error:.2g} nats "
                f"(allowed {allowed:g}): this model does not work on the shared prefix; use shared_prefix=False"
            )
        other = _disturbed(policy, prompts)
        change = float("nan")
        if other is not None:
            change = float((policy(other, responses, temperature).logprobs - trained).abs().max())
            if change == 0.0:
                raise ValueError("self-test: another picture changes nothing; the model does not see its pictures")
        return {"logprob_error": error, "blank_change": change}
    finally:
        policy.train(was_training)


def _working_dtype(policy: Policy) -> torch.dtype:
    """The precision activations are computed in: autocast's where it is on, half for quantised weights."""
    if torch.is_autocast_enabled(policy.device.type):
        return torch.get_autocast_dtype(policy.device.type)
    return torch.bfloat16 if getattr(policy.model, "is_quantized", False) else policy.model.dtype


def _disturbed(policy: Policy, prompts: PromptBatch) -> PromptBatch | None:
    """The batch with the picture's values turned upside down and made uneven, so that a plain picture changes too;
    None when it holds no raw pixels."""
    visuals = []
    for record in prompts.visuals:
        if "pixel_values" not in record.tensors:
            return None
        pixels = record.tensors["pixel_values"]
        uneven = torch.linspace(-1, 1, pixels.shape[-1], dtype=pixels.dtype)
        visuals.append(VisualRecord(f"disturbed {record.key}", record.tensors | {"pixel_values": uneven - pixels}))
    other = prompts.select(list(range(len(prompts))))
    other.visuals = visuals
    return other

"""The start-up self-test on the user's own model and first row. Most silent bugs of VLM-RL die here.

Sampling and training must be the same distribution (sampled log-probs = training log-probs), and the picture must
matter (blanking it changes them). Placeholders = features is checked on every batch, in `generate`.
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
    """Runs the checks on a small batch.

    Returns:
        ``{"logprob_error", "blank_change"}``, largest absolute differences in nats.

    Raises:
        ValueError: a check failed, with what it means.
    """
    responses, sampled = generate(policy, prompts, 2, 8, temperature, seed=0)
    trained = policy(prompts, responses, temperature).logprobs
    error = float((trained - sampled.logprobs).abs().max())
    # The working precision is that of the activations: a quantised model computes in its compute dtype.
    allowed = TOLERANCE.get(policy.model.dtype, 0.25) if not getattr(policy.model, "is_quantized", False) else 0.25
    if not error <= allowed:
        raise ValueError(
            f"self-test: log-probs captured while sampling differ from those of training by {error:.2g} nats "
            f"(allowed {allowed:g}): this model does not work on the shared prefix; use shared_prefix=False"
        )
    blank = _blanked(policy, prompts)
    change = float("nan")
    if blank is not None:
        change = float((policy(blank, responses, temperature).logprobs - trained).abs().max())
        if change == 0.0:
            raise ValueError("self-test: blanking the picture changes nothing; the model does not see its pictures")
    return {"logprob_error": error, "blank_change": change}


def _blanked(policy: Policy, prompts: PromptBatch) -> PromptBatch | None:
    """The batch with every pixel at the value of a black picture's; None when it holds no raw pixels."""
    visuals = []
    for record in prompts.visuals:
        if "pixel_values" not in record.tensors:
            return None
        pixels = record.tensors["pixel_values"]
        tensors = record.tensors | {"pixel_values": torch.full_like(pixels, float(pixels.min()))}
        visuals.append(VisualRecord(f"blank {record.key}", tensors))
    blank = prompts.select(list(range(len(prompts))))
    blank.visuals = visuals
    return blank

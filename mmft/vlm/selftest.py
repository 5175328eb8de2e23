"""The start-up self-test on the user's own model and first row. Most silent bugs of VLM-RL die here.

Sampling and training must be the same distribution (sampled log-probs = training log-probs), that distribution must be
what the model's own forward pass gives, and the picture must matter (another one changes the log-probs).
Placeholders = features is checked on every batch, in `generate`.
"""

from __future__ import annotations

import warnings

import torch

from mmft.batch import PromptBatch, VisualRecord
from mmft.vlm.generate import generate
from mmft.vlm.plain import own_logprobs
from mmft.vlm.policy import Policy

# Largest difference of one token's log-prob. In half precision two orders of summation differ by this much.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@torch.no_grad()
def selftest(policy: Policy, prompts: PromptBatch, temperature: float = 1.0) -> dict[str, float]:
    """Runs the checks on a small batch, under whatever autocast is on.

    A model for which the shared prefix is not its own forward pass takes the plain path from here on, with a warning
    that says by how much they differ.

    Args:
        prompts: with the pixels of their pictures (see `Pictures.prompts`).

    Returns:
        ``{"logprob_error", "own_error", "blank_change"}``: largest absolute differences in nats between training and
        sampling, between training and the model's own forward pass, and under another picture (NaN without any).

    Raises:
        ValueError: a check failed, with what it means.
    """
    was_training, allowed = policy.training, TOLERANCE.get(_working_dtype(policy), 0.25)
    policy.eval()  # dropout would be a difference of its own
    try:
        result, said = None, ""
        try:
            result = _differences(policy, prompts, temperature)
        except (RuntimeError, TypeError, IndexError, AttributeError, KeyError) as error:
            if not policy.shared_prefix:
                raise
            said = f"{type(error).__name__}: {error}"
        if policy.shared_prefix and (result is None or not _within(result, allowed)):
            said = said or f"its log-probs differ from those of its own forward pass by {_worst(result):.2g} nats"
            warnings.warn(
                f"self-test: this {policy.model.config.model_type!r} model does not work on the shared prefix ({said}; "
                f"allowed {allowed:g} nats). Training goes on without it, slower",
                stacklevel=2,
            )
            policy.take_plain_path()
            result = _differences(policy, prompts, temperature)
        if not _within(result, allowed):
            raise ValueError(
                f"self-test: the log-probs that this {policy.model.config.model_type!r} model is trained on differ "
                f"from those it is sampled with by {_worst(result):.2g} nats (allowed {allowed:g}); it cannot be "
                "trained as it is"
            )
        if result["blank_change"] == 0.0:
            raise ValueError("self-test: another picture changes nothing; the model does not see its pictures")
        return result
    finally:
        policy.train(was_training)


def _worst(result: dict[str, float]) -> float:
    return max(result["logprob_error"], result["own_error"])


def _within(result: dict[str, float], allowed: float) -> bool:
    """A number that is no number is beyond any limit."""
    return result["logprob_error"] <= allowed and result["own_error"] <= allowed


def _differences(policy: Policy, prompts: PromptBatch, temperature: float) -> dict[str, float]:
    responses, sampled = generate(policy, prompts, 2, 8, temperature, seed=0)
    trained = policy(prompts, responses, temperature).logprobs
    own = own_logprobs(policy, prompts, responses, temperature)
    differences = {
        "logprob_error": float((trained - sampled.logprobs).abs().max()),
        "own_error": float((trained - own).abs().max()),
    }
    other = _disturbed(prompts)
    if other is None:
        return differences | {"blank_change": float("nan")}
    change = (policy(other, responses, temperature).logprobs - trained).abs().max()
    return differences | {"blank_change": float(change)}


def _working_dtype(policy: Policy) -> torch.dtype:
    """The precision activations are computed in: autocast's where it is on, half for quantised weights."""
    if torch.is_autocast_enabled(policy.device.type):
        return torch.get_autocast_dtype(policy.device.type)
    return torch.bfloat16 if getattr(policy.model, "is_quantized", False) else policy.model.dtype


def _disturbed(prompts: PromptBatch) -> PromptBatch | None:
    """The batch with the values of pictures, clips and sounds turned upside down and made uneven, so that a plain
    picture changes too; None when it holds none."""
    visuals, found = [], False
    for record in prompts.visuals:
        raw = {k: v for k, v in record.tensors.items() if v.is_floating_point() and not k.endswith("mask")}
        other = {k: torch.linspace(-1, 1, v.shape[-1], dtype=v.dtype) - v for k, v in raw.items()}
        visuals.append(VisualRecord(None, record.tensors | other) if raw else record)
        found |= bool(raw)
    if not found:
        return None
    batch = prompts.select(list(range(len(prompts))))
    batch.visuals = visuals
    return batch

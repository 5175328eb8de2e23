"""Who writes the responses: our own decoder, `model.generate`, or vLLM.

Whoever samples, what the update starts from (log-probs, values, entropy) is the training model's own forward pass,
so that the first ratio is 1.
"""

from __future__ import annotations

from pathlib import Path

from mmft.batch import PromptBatch, Responses, TokenOutputs
from mmft.training.config import PPOConfig
from mmft.training.vllm_engine import VLLM
from mmft.training.vllm_here import VLLMHere
from mmft.training.vllm_server import VLLMServer
from mmft.vlm.generate import generate, require_room
from mmft.vlm.plain import plain_generate
from mmft.vlm.policy import Policy


def generate_with(
    engine: str | VLLM,
    policy: Policy,
    prompts: PromptBatch,
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[Responses, TokenOutputs]:
    """G responses to each of B prompts, with the policy's log-probs, values and entropy of them.

    Args:
        engine: "native" (`mmft.vlm.generate`), "hf" (`model.generate`), or vLLM.
        num_generations, max_new_tokens: G, and T at most.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of the draws, together with the rows' ids. vLLM draws differently from the others.
    """
    if engine == "native":
        return generate(policy, prompts, num_generations, max_new_tokens, temperature, seed)
    require_room(policy, prompts, max_new_tokens)
    if engine == "hf":
        # `model.generate` reads pixels; a batch of remembered pictures has none, and it would not say so.
        prompts = policy.pictures.prompts(prompts.rows, prompts.row_ids, policy.device, pixels=True)
        return plain_generate(policy, prompts, num_generations, max_new_tokens, temperature, seed)
    if isinstance(engine, str):
        raise ValueError(f"rollout.engine={engine!r}: expected native, hf or vllm")
    return engine.generate(policy, prompts, num_generations, max_new_tokens, temperature, seed)


def vllm_engine(
    folder: str | Path,
    url: str | None = "http://127.0.0.1:8000",
    timeout: float = 240.0,
    tolerance: float = 0.1,
    memory: float = 0.3,
) -> VLLM:
    """The server at ``url``, or vLLM in this process where that is None; see the two classes."""
    if url is None:
        return VLLMHere(folder, tolerance, memory)
    return VLLMServer(url, folder, timeout, tolerance)


def engine_of(config: PPOConfig) -> str | VLLM:
    """What ``config.engine`` names; a server is looked for at once."""
    if config.engine != "vllm":
        return config.engine
    return vllm_engine(Path(config.output_dir) / "vllm", **(config.vllm or {}))

"""vLLM in the trainer's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmft.batch import PromptBatch
from mmft.training.vllm_engine import VLLM, pictures_of, placeholders
from mmft.vlm.policy import Policy

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, as vLLM makes room for


class VLLMHere(VLLM):
    """vLLM in this process ("colocated"): a second copy of the base model beside the policy, on its device.

    Args:
        memory: share of the GPU's memory that vLLM takes for its weights and cache.

    Raises:
        ValueError: vLLM is not installed, or there are several processes.
    """

    def __init__(self, folder: str | Path, tolerance: float = 0.1, memory: float = 0.3):
        super().__init__(folder, tolerance)
        try:
            import vllm  # noqa: F401
        except ImportError:
            raise ValueError("rollout.vllm.url is null, so vLLM is wanted in this process: pip install vllm") from None
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("rollout.vllm.url: several processes need a server; vLLM inside is for one")
        self.memory = memory
        self.llm: Any = None
        self.request: Any = None  # the adapter, as vLLM asks for it
        self.loads = 0

    where = "rollout.engine: vllm (in this process)"

    def ask(self, policy, prompts, ids, options, seeds):
        from vllm import SamplingParams

        if self.llm is None:
            self.llm = self._start(policy)
        inputs = self._inputs(policy, prompts, ids)
        params = [SamplingParams(**options, seed=seed) for seed in seeds]
        found = self.llm.generate(inputs, params, use_tqdm=False, lora_request=self.request)
        for row_id, own, output in zip(prompts.row_ids, ids, found, strict=True):
            if output.prompt_token_ids != own:
                raise ValueError(
                    f"row {row_id}: vLLM lays its pictures out in other tokens ({len(output.prompt_token_ids)} in the "
                    f"prompt, {len(own)} here); use rollout.engine: native"
                )
        return [
            [
                (list(o.token_ids), [said[t].logprob for t, said in zip(o.token_ids, o.logprobs, strict=True)])
                for o in output.outputs
            ]
            for output in found
        ]

    def load(self, name, folder):
        from vllm.lora.request import LoRARequest

        self.loads += 1
        self.request = LoRARequest(name, self.loads, str(folder))

    def _start(self, policy: Policy) -> Any:
        from vllm import LLM

        (adapter,) = (policy.model.peft_config[name] for name in policy.model.active_adapters)
        return LLM(
            model=policy.model.config._name_or_path,
            dtype=str(policy.model.dtype).removeprefix("torch."),
            max_model_len=-1,  # what fits
            gpu_memory_utilization=self.memory,
            enable_lora=True,
            max_lora_rank=next(r for r in _RANKS if r >= adapter.r),
            logprobs_mode="processed_logprobs",
        )

    def _inputs(self, policy: Policy, prompts: PromptBatch, ids: list[list[int]]) -> list[dict[str, Any]]:
        """Prompts with one token per picture, as vLLM wants them: it lays out the rest itself."""
        policy.features(prompts)
        found = []
        for row_id, row_ids, row, record in zip(prompts.row_ids, ids, prompts.rows, prompts.visuals, strict=True):
            entry: dict[str, Any] = {"prompt_token_ids": list(row_ids)}
            if pictures := pictures_of(row):
                lengths = [feature.shape[:-1].numel() for feature in record.features["image"]]
                for place in reversed(placeholders(row_ids, policy.pictures.token_ids["image"], lengths, row_id)):
                    del entry["prompt_token_ids"][place["offset"] + 1 : place["offset"] + place["length"]]
                entry["multi_modal_data"] = {"image": pictures}
            found.append(entry)
        return found

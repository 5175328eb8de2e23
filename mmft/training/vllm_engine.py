"""What every way to vLLM shares: the adapter's way there, the request, and the check of what comes back.

vLLM holds the base model. The policy's adapter reaches it as a folder that it loads, under a name made from the
weights: an answer under that name is of those weights, and no cache of older ones is used for it. The log-probs that
vLLM reports are held against the policy's own: a difference means that it sampled from other weights, or saw other
pictures.

Left out: TRL's weight transfer, which merges the adapter and sends the whole model over NCCL, so a policy without
adapters cannot use vLLM.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmft.batch import PromptBatch, Responses, TokenOutputs
from mmft.vlm.plain import row_seed
from mmft.vlm.policy import Policy

# The responses to one prompt: token ids, and the log-prob of each, NaN where none was said.
Answers = list[tuple[list[int], list[float]]]


class VLLM:
    """A sampler; `VLLMServer` and `VLLMHere` say where it is.

    Args:
        folder: where adapters are laid for vLLM to read.
        tolerance: nats per token that a prompt's responses may differ from the policy's log-probs on average.

    Attributes:
        adapter: the name that the policy's weights have there.
        gap: mean and largest difference of log-probs in the last call.
    """

    where: str  # who it is, in errors

    def __init__(self, folder: str | Path, tolerance: float = 0.1):
        self.folder, self.tolerance = Path(folder).absolute(), tolerance
        self.adapter: str | None = None
        self.gap: dict[str, float] = {}

    def generate(
        self,
        policy: Policy,
        prompts: PromptBatch,
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> tuple[Responses, TokenOutputs]:
        """As `mmft.training.engines.generate_with`.

        Raises:
            ValueError: a policy or a prompt that vLLM cannot take; log-probs that are not the policy's.
            RuntimeError: a server is gone, refuses, or answers what no sampler would.
            TimeoutError: no answer in time.
        """
        self.sync(policy)
        ids = [row[mask].tolist() for row, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
        for name, token in policy.pictures.token_ids.items():
            if name != "image" and (row := next((r for r, own in enumerate(ids) if token in own), None)) is not None:
                raise ValueError(
                    f"row {prompts.row_ids[row]}: rollout.engine: vllm is given pictures alone, and the row has a "
                    f"{name}; use rollout.engine: native"
                )
        several = num_generations if temperature > 0 else 1  # vLLM takes a greedy answer once
        options = {
            "n": several,
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "logprobs": 0,  # the sampled token's alone
            "stop_token_ids": policy.end_ids,
            "ignore_eos": True,  # the policy's own end tokens, and no others, end a response
            "logit_bias": dict.fromkeys(policy.banned_ids.tolist(), -100.0),
            "detokenize": False,
        }
        # Each prompt with its own seed: a row's draws do not depend on its batch.
        seeds = [row_seed([row_id], seed) for row_id in prompts.row_ids]
        answers = [answer * (num_generations // several) for answer in self.ask(policy, prompts, ids, options, seeds)]
        responses, theirs = self._read(policy, prompts, answers, num_generations, max_new_tokens)
        was_training = policy.training
        policy.eval()
        with torch.no_grad():
            outputs = policy(prompts, responses, temperature or 1.0, entropy=True)
        policy.train(was_training)
        self._check(prompts, responses, outputs.logprobs, theirs)
        return responses, outputs

    def ask(
        self, policy: Policy, prompts: PromptBatch, ids: list[list[int]], options: dict[str, Any], seeds: list[int]
    ) -> list[Answers]:
        """Each prompt's ``n`` responses."""
        raise NotImplementedError

    def load(self, name: str, folder: Path) -> None:
        """Takes the adapter in ``folder``, to be used under ``name`` from now on."""
        raise NotImplementedError

    def sync(self, policy: Policy) -> None:
        """Gives vLLM the policy's adapter, if it does not have it. Every process calls it; the main one acts."""
        if not hasattr(policy.model, "peft_config"):
            raise ValueError(
                "rollout.engine: vllm takes the policy's adapters, and this policy has none; set model.tune: lora, or "
                "rollout.engine: native"
            )
        if not policy.tower_frozen:
            raise ValueError(
                "rollout.engine: vllm is given adapters of the language model alone; set model.lora.target: language"
            )
        said: list[str | None] = [None, None]  # the adapter's name, or what went wrong
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                said[0] = self._lay(policy)
            except (RuntimeError, TimeoutError, OSError) as error:
                if not dist.is_initialized():
                    raise
                said[1] = str(error)
        if dist.is_initialized():
            dist.broadcast_object_list(said)
            if said[1] is not None:
                raise RuntimeError(said[1])
        self.adapter = said[0]

    def _lay(self, policy: Policy) -> str:
        fresh = self.folder / f".writing-{os.getpid()}"
        active = policy.model.active_adapters
        policy.model.save_pretrained(fresh, selected_adapters=active)
        saved = fresh if active == ["default"] else fresh / active[0]
        with (saved / "adapter_model.safetensors").open("rb") as file:
            name = f"mmft-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        if name != self.adapter:
            place = self.folder / name
            shutil.rmtree(place, ignore_errors=True)
            os.replace(saved, place)
            self.load(name, place)
            if self.adapter is not None:
                shutil.rmtree(self.folder / self.adapter, ignore_errors=True)
        shutil.rmtree(fresh, ignore_errors=True)
        return name

    # ---------------------------------------------------------------- answers

    def _read(
        self, policy: Policy, prompts: PromptBatch, answers: list[Answers], group: int, length: int
    ) -> tuple[Responses, Tensor]:
        """The responses, and vLLM's log-probs of them (N, T)."""
        n = len(prompts) * group
        ids = torch.zeros(n, length, dtype=torch.long)
        mask = torch.zeros(n, length, dtype=torch.bool)
        theirs = torch.zeros(n, length)
        vocabulary, ends = len(policy.banned), set(policy.end_ids)
        for i, (row_id, written) in enumerate(zip(prompts.row_ids, answers, strict=True)):
            if len(written) != group:
                raise RuntimeError(f"{self.where}: {len(written)} responses to row {row_id}, asked for {group}")
            for g, (tokens, logprobs) in enumerate(written):
                known = all(0 <= token < vocabulary for token in tokens)
                if not 0 < len(tokens) <= length or not known or ends & {*tokens[:-1]}:
                    raise RuntimeError(
                        f"{self.where}: response {g} to row {row_id} is not 1 to {length} tokens below {vocabulary} "
                        f"up to the first end token {sorted(ends)}: {tokens}"
                    )
                place = i * group + g, slice(len(tokens))
                ids[place], mask[place], theirs[place] = torch.tensor(tokens), True, torch.tensor(logprobs)
        width = int(mask.sum(-1).max())
        ids, mask, theirs = (x[:, :width].contiguous().to(policy.device) for x in (ids, mask, theirs))
        ended = (torch.isin(ids, torch.tensor(policy.end_ids, device=ids.device)) & mask).any(-1)
        return Responses(ids, mask, ended), theirs

    def _check(self, prompts: PromptBatch, responses: Responses, ours: Tensor, theirs: Tensor) -> None:
        """Raises ValueError where a prompt's responses are, on average per token, less like ours than allowed."""
        gap = torch.where(responses.mask, (ours - theirs).abs().nan_to_num(torch.inf), 0.0)
        tokens = responses.mask.view(len(prompts), -1).sum(-1)
        mean = gap.view(len(prompts), -1).sum(-1) / tokens
        self.gap = {"mean": float(gap.sum() / tokens.sum()), "max": float(gap.max())}
        row = int(mean.argmax())
        if not mean[row] <= self.tolerance:
            group = len(gap) // len(prompts)
            g, t = divmod(int(gap.view(len(prompts), -1)[row].argmax()), gap.shape[1])
            n = row * group + g
            raise ValueError(
                f"{self.where} sampled from another distribution than the policy's. Row {prompts.row_ids[row]}: its "
                f"log-probs differ by {float(mean[row]):.3g} nats a token (rollout.vllm.tolerance {self.tolerance:g}), "
                f"most at token {t} of response {g} (id {int(responses.ids[n, t])}): {float(theirs[n, t]):.3f} there, "
                f"{float(ours[n, t]):.3f} here. All rows: mean {self.gap['mean']:.3g}, largest {self.gap['max']:.3g}. "
                "Either it serves another model than model.name, or has stale weights, another picture processor, "
                "or was started without --logprobs-mode processed_logprobs"
            )


def placeholders(ids: list[int], token: int, lengths: list[int], row_id: str) -> list[dict[str, int]]:
    """Where each picture stands among a prompt's tokens: offset and length of its run of placeholders.

    Args:
        lengths: tokens of each picture in the server's eyes; parts runs of neighbouring pictures. It may be more than
            the run, where the server counts marks around the picture in.

    Raises:
        ValueError: a picture is no single run (tiles or rows with marks between them); vLLM's protocol has no word
            for that.
    """
    found, at = [], 0
    for length in lengths:
        while at < len(ids) and ids[at] != token:
            at += 1
        start = at
        while at < len(ids) and ids[at] == token and at - start < length:
            at += 1
        found.append({"offset": start, "length": at - start})
    if any(not place["length"] for place in found) or token in ids[at:]:
        raise ValueError(
            f"row {row_id}: its {len(lengths)} pictures are not {len(lengths)} unbroken runs of picture tokens, which "
            "is all that a vLLM server can be told; use rollout.engine: native"
        )
    return found


def pictures_of(row: dict[str, Any]) -> list[Any]:
    images = row["images"] if row.get("images") is not None else row.get("image")
    images = images if isinstance(images, list | tuple) else [] if images is None else [images]
    return [image.convert("RGB") for image in images]

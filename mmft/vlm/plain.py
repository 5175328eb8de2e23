"""The plain path: one row per response, pictures and all, as any model of transformers takes it.

For families that the packed layout has not been shown exact for, and the yardstick that it is tested against:
positions, masks and the placing of picture features are left to the model's own code.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmft.batch import PromptBatch, Responses, TokenOutputs
from mmft.vlm.decoder import backbone, text_decoder
from mmft.vlm.families import Family
from mmft.vlm.generate import draws, invert
from mmft.vlm.logprobs import Distribution
from mmft.vlm.pictures import media_types


def plain_predictors(policy, model: nn.Module, prompts: PromptBatch, responses: Responses) -> tuple[Tensor, Tensor]:
    """The hidden states (M, H) that predict the M real response tokens, and those tokens (M,)."""
    inputs, predictors = _written_out(policy, prompts, responses)
    return _last_hidden(model, policy.family, **inputs)[predictors], responses.ids[responses.mask]


def own_logprobs(policy, prompts: PromptBatch, responses: Responses, temperature: float) -> Tensor:
    """(N, T) log-probs as the model's own forward pass has them, head and all: the yardstick of the self-test."""
    inputs, (n, column) = _written_out(policy, prompts, responses)
    forward = (policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model).forward
    if "logits_to_keep" in inspect.signature(forward).parameters:  # a long prompt's logits would be large
        first = int(column.min())
        inputs["logits_to_keep"] = inputs["input_ids"].shape[1] - first
        column = column - first
    logits = policy.model(**inputs).logits[n, column]
    logprobs = Distribution(nn.Identity(), policy.banned_ids, temperature).logits(logits).log_softmax(-1)
    chosen = logprobs.gather(-1, responses.ids[responses.mask][:, None]).squeeze(-1)
    return torch.zeros(responses.mask.shape, device=chosen.device).masked_scatter(responses.mask, chosen)


def _written_out(policy, prompts: PromptBatch, responses: Responses) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The model's inputs for N rows, padded on the right, and the places (row, column) that predict response tokens."""
    group = responses.ids.shape[0] // len(prompts)
    prompt_length = prompts.prompt_mask.sum(-1).repeat_interleave(group)
    width = int((prompt_length + responses.mask.sum(-1)).max())
    ids = prompts.prompt_ids.new_zeros(len(responses.ids), width)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    p_width = prompts.prompt_ids.shape[1]
    ids[:, :p_width] = (prompts.prompt_ids * prompts.prompt_mask).repeat_interleave(group, 0)
    mask[:, :p_width] = prompts.prompt_mask.repeat_interleave(group, 0)
    n, t = responses.mask.nonzero(as_tuple=True)
    column = prompt_length[n] + t
    ids[n, column] = responses.ids[n, t]
    mask[n, column] = True
    written = torch.zeros_like(mask)
    written[n, column] = True
    visual = _inputs(policy, prompts, ids, written, group)
    return {"input_ids": ids, "attention_mask": mask.long(), **visual, "use_cache": False}, (n, column - 1)


def plain_generate(
    policy, prompts: PromptBatch, group: int, length: int, temperature: float, seed: int | None
) -> tuple[Responses, TokenOutputs]:
    """`model.generate` on N rows, prompts padded on the left, then a forward pass for log-probs and values."""
    chosen = LogitsProcessorList()
    if temperature > 0:
        uniforms = draws(prompts.row_ids, group, length, seed).to(policy.device)
        chosen.append(_Drawn(uniforms, temperature))
    return _searched(policy, prompts, group, length, temperature or 1.0, chosen)


def beam_search(policy, prompts: PromptBatch, beams: int, length: int) -> tuple[Responses, TokenOutputs]:
    """One response to each of B prompts, the best of ``beams`` by its log-prob per token, by `model.generate`.

    Args:
        prompts: with the pixels of their pictures (see `Pictures.prompts`).
        length: of a response, in tokens at most.
    """
    return _searched(policy, prompts, 1, length, 1.0, LogitsProcessorList(), num_beams=beams)


def _searched(
    policy, prompts: PromptBatch, group: int, length: int, temperature: float, chosen: LogitsProcessorList, **how: Any
) -> tuple[Responses, TokenOutputs]:
    """What `model.generate` finds for N rows, and a forward pass's log-probs, values and entropy of it."""
    n_pad = prompts.prompt_ids.shape[1] - prompts.prompt_mask.sum(-1)
    left = (torch.arange(prompts.prompt_ids.shape[1], device=policy.device)[None] - n_pad[:, None]).clamp_min(0)
    mask = torch.arange(prompts.prompt_ids.shape[1], device=policy.device)[None] >= n_pad[:, None]
    ids = (prompts.prompt_ids.gather(1, left) * mask).repeat_interleave(group, 0)
    mask = mask.repeat_interleave(group, 0)
    pad_id = policy.tokenizer.pad_token_id if policy.tokenizer.pad_token_id is not None else policy.end_ids[0]
    ids = torch.where(mask, ids, pad_id)
    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=length,
        suppress_tokens=policy.banned_ids.tolist() or None,
        pad_token_id=pad_id,
        eos_token_id=policy.end_ids,
        **how,
    )
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            written = policy.model.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                **_inputs(policy, prompts, ids, torch.zeros_like(mask), group),
                # A configuration of its own: the checkpoint's may hold a repetition penalty or a top-k, and then the
                # distribution sampled from would not be the one that log-probs are of.
                generation_config=options,
                logits_processor=chosen,
            )[:, ids.shape[1] :]
            is_end = torch.isin(written, torch.tensor(policy.end_ids, device=written.device))
            response_mask = is_end.long().cumsum(-1) - is_end.long() == 0
            responses = Responses(written * response_mask, response_mask, is_end.any(-1))
            return responses, policy(prompts, responses, temperature, entropy=True)
    finally:
        policy.train(was_training)


class _Drawn(LogitsProcessor):
    """Leaves of each row the one token that its own draw points at, for greedy search to take.

    `generate` itself would draw for all rows of the batch from one stream, and a row's response would depend on what
    it is sampled with.
    """

    def __init__(self, uniforms: Tensor, temperature: float):
        self.uniforms, self.temperature, self.t = uniforms, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        weights = (scores.float() / self.temperature).softmax(-1)
        token = invert(weights, self.uniforms[:, self.t])
        self.t += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def _last_hidden(model: nn.Module, family: Family, **inputs: Any) -> Tensor:
    """(N, L, H) what the head reads, caught where it leaves the decoder: BLIP's models do not return it."""
    seen: dict[str, Tensor] = {}
    decoder = text_decoder(model, family) if family.decoder else backbone(model)
    handle = decoder.register_forward_hook(lambda *called: seen.update(hidden=called[-1].last_hidden_state))
    try:
        backbone(model)(**inputs)
    finally:
        handle.remove()
    return seen["hidden"]


def row_seed(row_ids: list[str], seed: int | None) -> int:
    """One seed for an engine that draws for a whole batch from one stream, different for other rows."""
    digest = hashlib.blake2b("\n".join([str(seed), *row_ids]).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _inputs(policy, prompts: PromptBatch, ids: Tensor, written: Tensor, group: int) -> dict[str, Any]:
    """What the model takes beside the tokens: every row's pictures once per response, and kinds of tokens.

    Args:
        ids: (N, L) the tokens.
        written: (N, L) bool, True on tokens of responses.
    """
    records = [r.tensors for r in prompts.visuals for _ in range(group)]
    inputs: dict[str, Any] = {
        key: _joined([r[key] for r in records if key in r]).to(policy.device)
        for key in dict.fromkeys(key for r in records for key in r)
    }
    family = policy.family
    if family.positions == "mrope" and inputs:
        inputs["mm_token_type_ids"] = media_types(ids, policy.pictures.token_ids)
    if family.prompt_attention == "pictures":
        inputs["token_type_ids"] = media_types(ids, policy.pictures.token_ids)
    elif family.prompt_attention == "whole":
        inputs["token_type_ids"] = written.int()
    return inputs


def _joined(tensors: list[Tensor]) -> Tensor:
    """Tensors along their first dimension, the others zero-padded to the largest: what the processors themselves do
    with pictures of several sizes (tiles, pixels) in one batch, and every model knows to leave out."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return torch.cat(
        [
            pad(t, [x for have, want in zip(t.shape[:0:-1], shape[::-1], strict=True) for x in (0, want - have)])
            for t in tensors
        ]
    )

"""What transformers itself makes of a row: processor, model and `generate` as a user calls them, one row at a time.

Nothing here pads, packs, shares or caches, and nothing of `mmft.vlm` runs but the rendering of prompts: this is the
yardstick of the contract.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmft.batch import Responses


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Noise of ``size`` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sound(seed: int, seconds: float) -> dict[str, Any]:
    samples = np.random.default_rng(seed).uniform(-1, 1, int(16_000 * seconds)).astype(np.float32)
    return {"array": samples, "sampling_rate": 16_000}


def _words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


# Ragged on purpose: prompts of different lengths, pictures of different sizes and counts, one row without a picture.
PICTURES = [
    {"prompt": "what is it", "image": picture(0, (32, 32))},
    {"prompt": "a longer question about the thing in the picture", "image": picture(1, (60, 52))},
    {"prompt": "no picture here"},
    {
        "prompt": [{"role": "user", "content": [{"type": "image"}, _words("and"), {"type": "image"}, _words("?")]}],
        "images": [picture(2, (32, 48)), picture(3, (48, 24))],
    },
]
SOUNDS = [
    {"prompt": "what is it", "audio": sound(0, 1.0)},
    {"prompt": "a longer question about the thing that is heard", "audio": sound(1, 1.6)},
    {"prompt": "no sound here"},
    {"prompt": "short", "audio": sound(2, 0.4)},
]
# Families that take one picture a prompt, no more and no less.
ONE_PICTURE = {"blip-2", "instructblip"}


def rows_of(family: str) -> list[dict[str, Any]]:
    if family == "qwen2_audio":
        return SOUNDS
    if family in ONE_PICTURE:
        return [row for row in PICTURES if "image" in row] + [{"prompt": "two", "image": picture(2, (32, 48))}]
    return PICTURES


def of_row(row: dict[str, Any]) -> list[Any]:
    """The row's pictures, or its sound."""
    return row.get("images") or [row[key] for key in ("image", "audio") if key in row]


def processed(policy, row: dict[str, Any]) -> dict[str, Tensor]:
    """The processor's output for a batch of this row alone."""
    media = of_row(row)
    text = policy.pictures.render(row["prompt"], len(media))
    bos = policy.tokenizer.bos_token
    options = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
    if not media:
        inputs = policy.tokenizer([text], **options)
    elif "audio" in row:
        arrays = [heard["array"] for heard in media]
        inputs = policy.processor(text=[text], audio=arrays, sampling_rate=16_000, **options)
    else:
        inputs = policy.processor(text=[text], images=[media], **options)
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if policy.family.prompt_attention == "whole":  # of PaliGemma without a picture, which its processor refuses
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
    return inputs


def continued(inputs: dict[str, Tensor], response: Tensor, prefix_is_whole: bool) -> dict[str, Tensor]:
    """The inputs with a response (T,) behind the prompt."""
    more = {
        "input_ids": response,
        "attention_mask": torch.ones_like(response),
        "mm_token_type_ids": torch.zeros_like(response),
        # PaliGemma calls by 1 what is not prefix, Gemma 3 what is picture.
        "token_type_ids": torch.full_like(response, int(prefix_is_whole)),
    }
    return {k: torch.cat([v, more[k][None].to(v.dtype)], 1) if k in more else v for k, v in inputs.items()}


@torch.no_grad()
def distributions(policy, row: dict[str, Any], response: Tensor, temperature: float = 1.0) -> Tensor:
    """(T + 1, V) log-probs of the next token, before the response (T,), and after each token of it."""
    whole = policy.family.prompt_attention == "whole"
    logits = policy.model(**continued(processed(policy, row), response, whole)).logits[0, -len(response) - 1 :].float()
    return (logits / temperature).masked_fill(policy.banned, -torch.inf).log_softmax(-1)


def logprobs(policy, rows: list[dict[str, Any]], responses: Responses, temperature: float = 1.0) -> Tensor:
    """(N, T) log-probs of the responses, G of them to each row."""
    group = len(responses.ids) // len(rows)
    result = torch.zeros(responses.ids.shape)
    for n, mask in enumerate(responses.mask):
        response = responses.ids[n, mask]
        at = distributions(policy, rows[n // group], response, temperature)
        result[n, mask] = at[:-1].gather(-1, response[:, None]).squeeze(-1)
    return result


@torch.no_grad()
def greedy(policy, row: dict[str, Any], length: int) -> list[int]:
    """What `model.generate` writes, the end-of-sequence token included."""
    inputs = processed(policy, row)
    prompt = inputs["input_ids"][0]
    written = policy.model.generate(
        **inputs, do_sample=False, max_new_tokens=length, suppress_tokens=policy.banned_ids.tolist()
    )[0]
    # BLIP hands embeddings to its language model, and that returns what is new.
    return written[len(prompt) :].tolist() if torch.equal(written[: len(prompt)], prompt) else written.tolist()

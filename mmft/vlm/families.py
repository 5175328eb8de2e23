"""What differs between families of vision-language models, as data.

Everything else in `mmft/vlm` is written once. A family that is not listed takes the plain path: slower, and right.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Linear layers of a Llama-like decoder. Never the vision tower, never the output head.
_DECODER = r".*\.(?:language_model|text_model)\.(?:.*\.)?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# Names under which configurations and processors keep ids of tokens that stand for pictures, clips or sounds.
_PLACEHOLDER_KEYS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
    "vision_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
# Tokens that Idefics3 and SmolVLM lay around pictures; they have no place in a written answer either.
_PLACEHOLDER_TOKENS = ("<fake_token_around_image>", "<global-img>", "<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True)
class Family:
    """Facts about one family.

    Attributes:
        shared_prefix: the packed layout (explicit block mask and positions) is exact for it; a contract test per
            family decides.
        positions: "sequential", or "mrope" for (temporal, height, width) rotary positions.
        lora_target: regular expression of the layers that ``lora.target: language`` adapts.
    """

    shared_prefix: bool
    positions: str = "sequential"
    lora_target: str = _DECODER


FAMILIES: dict[str, Family] = {
    "llava": Family(shared_prefix=True),
    "smolvlm": Family(shared_prefix=True),
    "idefics3": Family(shared_prefix=True),
    "qwen2_5_vl": Family(shared_prefix=True, positions="mrope"),
    "qwen3_vl": Family(shared_prefix=True, positions="mrope"),
}

PLAIN = Family(shared_prefix=False)


def family_of(model: nn.Module) -> Family:
    """The facts for a model, by its configuration's ``model_type``; the plain path for an unknown one."""
    return FAMILIES.get(model.config.model_type, PLAIN)


def never_sampled(model: nn.Module, tokenizer) -> list[int]:
    """Ids of tokens that a response must never hold: placeholders of pictures, and padding.

    A sampled placeholder would ask the model for a picture that is not there.
    """
    ids = {getattr(model.config, key, None) for key in _PLACEHOLDER_KEYS}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary.get(token) for token in _PLACEHOLDER_TOKENS}
    ids |= {index for token, index in vocabulary.items() if token.startswith("<row_") and token.endswith(">")}
    ids.add(tokenizer.pad_token_id)
    ids -= set(end_tokens(model, tokenizer)) | {None}
    size = model.get_output_embeddings().weight.shape[0]
    # The head is often wider than the tokenizer (rounded up for speed): those rows are nobody's tokens.
    ids |= set(range(len(tokenizer), size))
    return sorted(i for i in ids if i < size)


def end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """Ids that end a response: the generation configuration's, else the tokenizer's."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise ValueError("neither the generation configuration nor the tokenizer names an end-of-sequence token")
    return [ends] if isinstance(ends, int) else sorted(ends)

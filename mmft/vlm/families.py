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


@dataclass(frozen=True)
class Medium:
    """One kind of input beside text.

    Attributes:
        name: "image", "video" or "audio"; also the processor's word for it.
        encoder: the backbone's method that turns it into features.
        inputs: the processor's outputs that belong to it; a family's processor gives some of them.
        token_keys: where a configuration keeps the id of its placeholder.
    """

    name: str
    encoder: str
    inputs: tuple[str, ...]
    token_keys: tuple[str, ...]


IMAGE = Medium(
    "image",
    "get_image_features",
    ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images"),
    ("image_token_id", "image_token_index"),
)
VIDEO = Medium(
    "video",
    "get_video_features",
    ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
    ("video_token_id", "video_token_index"),
)
AUDIO = Medium(
    "audio",
    "get_audio_features",
    ("input_features", "feature_attention_mask"),
    ("audio_token_id", "audio_token_index"),
)


@dataclass(frozen=True)
class Family:
    """Facts about one family.

    Attributes:
        shared_prefix: the shared prefix is exact for it; a contract test per family decides.
        media: what it takes beside text.
        decoder: path of the text decoder's layers below the model's backbone.
        positions: "sequential", or "mrope" for (temporal, height, width) rotary positions.
        first_position: position of the first token, where positions are sequential.
        prompt_attention: "causal"; "pictures", where the tokens of one picture see each other; "whole", where all of
            the prompt does.
        features_read_prompt: features depend on the prompt's words, so no two prompts share them.
        marks: tokens that stand around pictures and have no place in a written answer.
        lora_target: regular expression of the layers that ``lora.target: language`` adapts.
    """

    shared_prefix: bool = True
    media: tuple[Medium, ...] = (IMAGE,)
    decoder: str = "language_model"
    positions: str = "sequential"
    first_position: int = 0
    prompt_attention: str = "causal"
    features_read_prompt: bool = False
    marks: tuple[str, ...] = ()
    lora_target: str = _DECODER


_LINES = ("[IMG_BREAK]", "[IMG_END]")
_TILES = ("<fake_token_around_image>", "<global-img>")
_QWEN = Family(media=(IMAGE, VIDEO), positions="mrope", marks=("<|vision_start|>", "<|vision_end|>"))

FAMILIES: dict[str, Family] = {
    "llava": Family(marks=_LINES),  # Pixtral is one
    "llava_next": Family(),
    "llava_onevision": Family(media=(IMAGE, VIDEO)),
    "internvl": Family(marks=("<img>", "</img>", "<video>")),
    "mistral3": Family(marks=_LINES),
    "gemma3": Family(prompt_attention="pictures"),
    "paligemma": Family(prompt_attention="whole", first_position=1),
    "idefics2": Family(decoder="text_model", marks=("<fake_token_around_image>",)),
    "smolvlm": Family(decoder="text_model", marks=_TILES),
    "idefics3": Family(decoder="text_model", marks=_TILES),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
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
    ids |= {vocabulary.get(token) for token in family_of(model).marks}
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

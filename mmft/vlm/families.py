"""What differs between families of vision-language models, as data.

Everything else in `mmft/vlm` is written once. A family that is not listed is probed (`probe.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mmft.vlm.audio import qwen2_audio_features

# Linear layers of a Llama-like decoder. Never the vision tower, never the output head.
_DECODER = r".*\.(?:language_model|text_model)\.(?:.*\.)?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# What stands between tower and decoder, by its path below the backbone: a model has those of its family.
CONNECTORS = (
    "multi_modal_projector",
    "connector",
    "visual.merger",
    "visual.deepstack_merger_list",
    "language_projection",
)

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
        encoder: what turns it into features: a method of the backbone, or a function that gets the backbone first.
        inputs: the processor's outputs that belong to it; a family's processor gives some of them.
        token_keys: where a configuration keeps the id of its placeholder.
    """

    name: str
    encoder: str | Callable[..., Any]
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
        template: the chat template, for a family whose processors have none.
        most: the most pictures that a prompt may hold; None = any number.
        notes: why the plain path is taken: what `probe` could not find. Empty for listed families.
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
    template: str | None = None
    most: int | None = None
    notes: tuple[str, ...] = ()


_LINES = ("[IMG_BREAK]", "[IMG_END]")
_TILES = ("<fake_token_around_image>", "<global-img>")
_QWEN = Family(media=(IMAGE, VIDEO), positions="mrope", marks=("<|vision_start|>", "<|vision_end|>"))

# All pictures, the beginning of the text, the text, the end of a line: as PaliGemma was trained. Its processor adds the
# second and the last itself, but only where there are pictures.
_PALIGEMMA = (
    "{% set ns = namespace(pictures='', text='') %}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set ns.pictures = ns.pictures + '<image>' %}"
    "{% else %}{% set ns.text = ns.text + part['text'] %}{% endif %}{% endfor %}{% endfor %}"
    "{{ ns.pictures + ns.text if ns.pictures else '<bos>' + ns.text + '\n' }}"
)
# BLIP's processors lay the placeholders themselves, before the text.
_BLIP_TEXT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
_BLIP = r"(?:.*\.)?language_model\.(?:.*\.)"
_PROMPTED = replace(IMAGE, inputs=("pixel_values", "qformer_input_ids", "qformer_attention_mask"))

FAMILIES: dict[str, Family] = {
    "llava": Family(marks=_LINES),  # Pixtral is one
    "llava_next": Family(),
    "llava_onevision": Family(media=(IMAGE, VIDEO)),
    "internvl": Family(marks=("<img>", "</img>", "<video>")),
    "mistral3": Family(marks=_LINES),
    "gemma3": Family(prompt_attention="pictures", marks=("<start_of_image>", "<end_of_image>")),
    "paligemma": Family(prompt_attention="whole", first_position=1, template=_PALIGEMMA),
    "blip-2": Family(  # with OPT; the T5 ones are encoder-decoders
        decoder="language_model.model.decoder",
        lora_target=rf"{_BLIP}(?:q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
        template=_BLIP_TEXT,
        most=1,
    ),
    "instructblip": Family(  # with Vicuna, a Llama
        media=(_PROMPTED,),
        decoder="language_model.model",
        features_read_prompt=True,
        lora_target=rf"{_BLIP}(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        template=_BLIP_TEXT,
        most=1,
    ),
    "idefics2": Family(decoder="text_model", marks=("<fake_token_around_image>",)),
    "smolvlm": Family(decoder="text_model", marks=_TILES),
    "idefics3": Family(decoder="text_model", marks=_TILES),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen2_audio": Family(
        media=(replace(AUDIO, encoder=qwen2_audio_features),), marks=("<|audio_bos|>", "<|audio_eos|>")
    ),
}


def family_of(model: nn.Module, processor=None) -> Family:
    """The facts for a model, by its configuration's ``model_type``; what the probe finds for one that is not listed."""
    listed = FAMILIES.get(model.config.model_type)
    if listed is None:
        from mmft.vlm.probe import probe

        return probe(model, processor)
    return listed


def never_sampled(model: nn.Module, tokenizer, family: Family | None = None) -> list[int]:
    """Ids of tokens that a response must never hold: placeholders of pictures, and padding.

    A sampled placeholder would ask the model for a picture that is not there.
    """
    ids = {getattr(model.config, key, None) for key in _PLACEHOLDER_KEYS}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary.get(token) for token in (family or family_of(model)).marks}
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

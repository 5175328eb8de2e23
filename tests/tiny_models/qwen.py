"""Qwen-VL: multimodal rotary positions, pictures of any size."""

from __future__ import annotations

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tiny_models.parts import HIDDEN, chatml, chatml_tokenizer, decoder

_QWEN_CHAT = chatml("<|vision_start|><|image_pad|><|vision_end|>")
_QWEN_PICTURE = {
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
}


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return chatml_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


_QWEN_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": HIDDEN,
}


_QWEN2_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def qwen2_vl():
    tokenizer = _qwen_tokenizer()
    tower = {
        "embed_dim": 32,
        "hidden_size": HIDDEN,
        "depth": 2,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    config = Qwen2VLConfig(
        vision_config=tower,
        text_config={**decoder(tokenizer), "rope_parameters": _QWEN2_ROPE},
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_QWEN_PICTURE),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**_QWEN_PICTURE),
        chat_template=_QWEN_CHAT,
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl():
    tokenizer = _qwen_tokenizer()
    # Windows of 2 x 2 merged patches, so that a picture of 32 x 32 pixels has four of them.
    tower = {**_QWEN_TOWER, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        vision_config=tower,
        text_config={**decoder(tokenizer), "rope_parameters": _QWEN2_ROPE},
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_QWEN_PICTURE),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**_QWEN_PICTURE),
        chat_template=_QWEN_CHAT,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl():
    tokenizer = _qwen_tokenizer()
    tower = {**_QWEN_TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    # Three layers: deepstack features reach the first two and leave the third alone.
    text = {**decoder(tokenizer, layers=3), "head_dim": HIDDEN // 4, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=tower, text_config=text, **_qwen_ids(tokenizer))
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_QWEN_PICTURE),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**_QWEN_PICTURE),
        chat_template=_QWEN_CHAT,
    )
    return Qwen3VLForConditionalGeneration(config), processor


BUILDERS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}

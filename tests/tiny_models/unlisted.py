"""Families that `mmft.vlm.families` does not list: what the probe is for."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessor,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from tiny_models.parts import HIDDEN, PATCH, TILE, chatml, chatml_tokenizer, decoder, tower

_SIDE = {"height": TILE, "width": TILE}


def vipllava():
    """Llama behind features of several layers of the tower."""
    tokenizer = chatml_tokenizer(["<image>"])
    config = VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower()},
        text_config={"model_type": "llama", **decoder(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-1, -2],
        image_seq_length=(TILE // PATCH) ** 2,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size=_SIDE),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chatml("<image>"),
    )
    return VipLlavaForConditionalGeneration(config), processor


def cohere2_vision():
    """Windows in most layers, no positions in the others, attention and feed-forward side by side."""
    marks = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    tokenizer = chatml_tokenizer([*marks.values()], **marks)
    config = Cohere2VisionConfig(
        vision_config={"model_type": "siglip_vision_model", **tower()},
        text_config={
            "model_type": "cohere2",
            **decoder(tokenizer, layers=3),
            "tie_word_embeddings": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        downsample_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        alignment_intermediate_size=2 * HIDDEN,
    )
    processor = Cohere2VisionProcessor(
        # The processor's patch is the side of a tile in tokens.
        image_processor=Cohere2VisionImageProcessor(size=_SIDE, patch_size=TILE // PATCH // 2, max_patches=4),
        tokenizer=tokenizer,
        chat_template=chatml("<|IMG_PATCH|>"),
    )
    return Cohere2VisionForConditionalGeneration(config), processor


def glm4v():
    """Multimodal rotary positions, norms on both sides of a layer, one matrix for gate and up."""
    marks = ["<|begin_of_image|>", "<|end_of_image|>", "<|image|>"]
    clips = ["<|begin_of_video|>", "<|end_of_video|>", "<|video|>"]
    tokenizer = chatml_tokenizer([*marks, *clips])
    names = ["image_start_token_id", "image_end_token_id", "image_token_id"]
    names += ["video_start_token_id", "video_end_token_id", "video_token_id"]
    ids = dict(zip(names, map(tokenizer.convert_tokens_to_ids, [*marks, *clips]), strict=True))
    size = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 16 * 16 * 2, "longest_edge": 32 * 32 * 2}}
    config = Glm4vConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "image_size": TILE,
            "patch_size": 4,
            "out_hidden_size": HIDDEN,
        },
        text_config={
            **decoder(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
        },
        **ids,
    )
    processor = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(**size),
        tokenizer=tokenizer,
        video_processor=Glm4vVideoProcessor(**size),
        chat_template=chatml("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return Glm4vForConditionalGeneration(config), processor


BUILDERS = {"vipllava": vipllava, "cohere2_vision": cohere2_vision, "glm4v": glm4v}

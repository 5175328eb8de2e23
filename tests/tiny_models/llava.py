"""LLaVA, and its children that cut a picture in tiles (any-res), so that its tokens follow its shape."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tiny_models.parts import PARTS, PATCH, TILE, byte_tokenizer, chatml, chatml_tokenizer, decoder, tower

_LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    + PARTS.replace("@IMAGE@", "<image>\n")
    + "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

_NEXT_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} "
    + PARTS.replace("@IMAGE@", "<image>\n")
    + "</s>{% else %}[INST] "
    + PARTS.replace("@IMAGE@", "<image>\n")
    + " [/INST]{% endif %}{% endfor %}"
)
# Grids of tiles (height, width) that a picture may be laid on; it is also seen whole in one tile.
_GRIDS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def llava():
    tokenizer = byte_tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad="<pad>", eos="</s>", bos="<s>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower()),
        text_config=LlamaConfig(**decoder(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(TILE // PATCH) ** 2,
    )
    side = {"height": TILE, "width": TILE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_CHAT,
    )
    return LlavaForConditionalGeneration(config), processor


def llava_next():
    tokenizer = byte_tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad="<pad>", eos="</s>", bos="<s>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tower()),
        text_config=MistralConfig(**decoder(tokenizer), sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(TILE // PATCH) ** 2,
        image_grid_pinpoints=_GRIDS,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=_GRIDS,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_NEXT_CHAT,
    )
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    """Tiles for a lone picture, one tile each for several; grids of more than two tiles are shrunk (anyres_max_2)."""
    tokenizer = chatml_tokenizer(["<image>", "<video>"])
    grids = [[TILE, TILE], *_GRIDS]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower(), vision_use_head=False),
        text_config=Qwen2Config(**decoder(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
        vision_aspect_ratio="anyres_max_2",
    )
    side = {"height": TILE, "width": TILE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=chatml("<image>\n"),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


BUILDERS = {"llava": llava, "llava_next": llava_next, "llava_onevision": llava_onevision}

"""InternVL (dynamic tiles) and Mistral 3 and Pixtral (pictures of any size, a mark at the end of every line)."""

from __future__ import annotations

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tiny_models.parts import HIDDEN, PARTS, PATCH, TILE, byte_tokenizer, chatml, chatml_tokenizer, decoder, tower

_MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% if message['role'] == 'assistant' %}"
    + PARTS.replace("@IMAGE@", "[IMG]")
    + "</s>{% else %}[INST]"
    + PARTS.replace("@IMAGE@", "[IMG]")
    + "[/INST]{% endif %}{% endfor %}"
)


def internvl():
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = chatml_tokenizer(list(marks.values()), **marks)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower()),
        text_config=Qwen2Config(**decoder(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(TILE // PATCH) ** 2 // 4,
        tie_word_embeddings=False,
    )
    side = {"height": TILE, "width": TILE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=side, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=side),
        image_seq_length=(TILE // PATCH) ** 2 // 4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    return InternVLForConditionalGeneration(config), processor


def _pixtral_tower() -> PixtralVisionConfig:
    return PixtralVisionConfig(**tower() | {"image_size": 2 * TILE})


def _pixtral_tokenizer() -> PreTrainedTokenizerFast:
    marks = ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    return byte_tokenizer(["<pad>", "<s>", "</s>", *marks], pad="<pad>", eos="</s>", bos="<s>")


def _pixtral_processor(tokenizer: PreTrainedTokenizerFast, merge: int) -> PixtralProcessor:
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(
            patch_size={"height": PATCH, "width": PATCH}, size={"longest_edge": 2 * TILE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=merge,
        chat_template=_MISTRAL_CHAT,
    )


def mistral3():
    tokenizer = _pixtral_tokenizer()
    config = Mistral3Config(
        vision_config=_pixtral_tower(),
        text_config=MistralConfig(**decoder(tokenizer), head_dim=HIDDEN // 4, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config), _pixtral_processor(tokenizer, merge=2)


def pixtral():
    """Pixtral is LLaVA's model around another tower, with a projector that merges nothing."""
    tokenizer = _pixtral_tokenizer()
    config = LlavaConfig(
        vision_config=_pixtral_tower(),
        text_config=MistralConfig(**decoder(tokenizer), head_dim=HIDDEN // 4, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), _pixtral_processor(tokenizer, merge=1)


BUILDERS = {"internvl": internvl, "mistral3": mistral3, "pixtral": pixtral}

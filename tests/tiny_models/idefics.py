"""SmolVLM and Idefics: pictures cut in tiles."""

from __future__ import annotations

from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tiny_models.parts import HIDDEN, PARTS, PATCH, TILE, byte_tokenizer, decoder, tower

_SMOL_CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    + PARTS.replace("@IMAGE@", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_IDEFICS2_CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: "
    + PARTS.replace("@IMAGE@", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _tiled_tokenizer() -> PreTrainedTokenizerFast:
    around = ["<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"]
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    return byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *around, *tiles],
        pad="<|im_end|>",
        eos="<end_of_utterance>",
        bos="<|im_start|>",
    )


def _tiled_config(kind: type, tokenizer: PreTrainedTokenizerFast):
    return kind(
        vision_config=tower(),
        text_config={"model_type": "llama", **decoder(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


# A picture is cut in tiles of 32 pixels after its longer side became 64: one row or column, or two by two, and one
# small copy of the whole.
_TILING = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
_TOKENS_PER_TILE = (TILE // PATCH) ** 2 // 4


def smolvlm():
    tokenizer = _tiled_tokenizer()
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**_TILING),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(
            **_TILING, video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": TILE}}
        ),
        image_seq_len=_TOKENS_PER_TILE,
        chat_template=_SMOL_CHAT,
    )
    return SmolVLMForConditionalGeneration(_tiled_config(SmolVLMConfig, tokenizer)), processor


def idefics3():
    tokenizer = _tiled_tokenizer()
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**_TILING),
        tokenizer=tokenizer,
        image_seq_len=_TOKENS_PER_TILE,
        chat_template=_SMOL_CHAT,
    )
    return Idefics3ForConditionalGeneration(_tiled_config(Idefics3Config, tokenizer)), processor


def idefics2():
    """Five views of a picture, four latents each; a decoder with a sliding window that the prompts outgrow."""
    tokenizer = byte_tokenizer(
        ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        pad="<unk>",
        eos="</s>",
        bos="<s>",
    )
    config = Idefics2Config(
        vision_config=tower() | {"image_size": 2 * TILE},
        perceiver_config={
            "hidden_size": HIDDEN,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        text_config={"model_type": "mistral", **decoder(tokenizer), "sliding_window": 48},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessor(
            size={"shortest_edge": TILE // 2, "longest_edge": 2 * TILE}, do_image_splitting=True
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=_IDEFICS2_CHAT,
    )
    return Idefics2ForConditionalGeneration(config), processor


BUILDERS = {"smolvlm": smolvlm, "idefics3": idefics3, "idefics2": idefics2}

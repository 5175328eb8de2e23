"""Tiny random checkpoints of real families, built here: no download, about a second each.

Each is saved with `save_pretrained`, model and processor, and loads the way a hub id does. They keep what makes each
family hard: LLaVA's dropped class token and early feature layer, SmolVLM's and Idefics3's tiles (so that the number
of picture tokens follows the shape of the picture), Qwen's multimodal rotary positions, windows (2.5) and deepstack
features (3). The weights are drawn wide enough that the softmax has peaks and that the picture matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

HIDDEN = 64
TILE = 32  # pixels along a side of one picture (LLaVA) or one tile (SmolVLM, Idefics3)
PATCH = 8

# Like the real templates, and content may be a plain string as well as a list of parts.
_PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@IMAGE@{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
_LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    + _PARTS.replace("@IMAGE@", "<image>\n")
    + "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
_SMOL_CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    + _PARTS.replace("@IMAGE@", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    + _PARTS.replace("@IMAGE@", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(special: list[str], *, pad: str, eos: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and the family's special tokens behind them."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, padding_side="left"
    )


def _decoder(tokenizer: PreTrainedTokenizerFast, layers: int = 2) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "tie_word_embeddings": False,
    }


def _tower() -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
    }


def _llava():
    tokenizer = _tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad="<pad>", eos="</s>", bos="<s>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_tower()),
        text_config=LlamaConfig(**_decoder(tokenizer)),
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


def _tiled_tokenizer() -> PreTrainedTokenizerFast:
    around = ["<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"]
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    return _tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *around, *tiles],
        pad="<|im_end|>",
        eos="<end_of_utterance>",
        bos="<|im_start|>",
    )


def _tiled_config(kind: type, tokenizer: PreTrainedTokenizerFast):
    return kind(
        vision_config=_tower(),
        text_config={"model_type": "llama", **_decoder(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


# A picture is cut in tiles of 32 pixels after its longer side became 64: one row or column, or two by two, and one
# small copy of the whole.
_TILING = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
_TOKENS_PER_TILE = (TILE // PATCH) ** 2 // 4


def _smolvlm():
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


def _idefics3():
    tokenizer = _tiled_tokenizer()
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**_TILING),
        tokenizer=tokenizer,
        image_seq_len=_TOKENS_PER_TILE,
        chat_template=_SMOL_CHAT,
    )
    return Idefics3ForConditionalGeneration(_tiled_config(Idefics3Config, tokenizer)), processor


_QWEN_PICTURE = {
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
}


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return _tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks], pad="<|endoftext|>", eos="<|im_end|>")


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


def _qwen2_5_vl():
    tokenizer = _qwen_tokenizer()
    # Windows of 2 x 2 merged patches, so that a picture of 32 x 32 pixels has four of them.
    tower = {**_QWEN_TOWER, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config=tower,
        text_config={**_decoder(tokenizer), "rope_parameters": rope},
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_QWEN_PICTURE),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**_QWEN_PICTURE),
        chat_template=_QWEN_CHAT,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl():
    tokenizer = _qwen_tokenizer()
    tower = {**_QWEN_TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    # Three layers: deepstack features reach the first two and leave the third alone.
    decoder = {**_decoder(tokenizer, layers=3), "head_dim": HIDDEN // 4, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=tower, text_config=decoder, **_qwen_ids(tokenizer))
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_QWEN_PICTURE),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**_QWEN_PICTURE),
        chat_template=_QWEN_CHAT,
    )
    return Qwen3VLForConditionalGeneration(config), processor


_BUILDERS: dict[str, Callable] = {
    "llava": _llava,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
FAMILIES = list(_BUILDERS)


@torch.no_grad()
def _widen(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix so that signals keep their size: the usual std 0.02 makes 64 wide models uniform."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, 0.5, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, 1 / math.sqrt(fan_in), generator=generator)
            if module.bias is not None:
                module.bias.normal_(0.0, 0.1, generator=generator)
    head = model.get_output_embeddings().weight
    head.normal_(0.0, 0.2, generator=generator)


def build(family: str, folder: Path | str, seed: int = 0) -> Path:
    """Write a tiny fp32 checkpoint of `family`, with its processor, into `folder` (made if missing).

    Returns:
        The folder, ready for `AutoModelForImageTextToText` and `AutoProcessor`.

    Raises:
        KeyError: for a family that is not in FAMILIES.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _BUILDERS[family]()
        _widen(model, torch.Generator().manual_seed(seed))
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

"""Models and rows of the shapes that the benchmarks measure, built here: nothing is downloaded.

The speed of a shape does not depend on what its weights know, so random ones do where no trained ones are at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PROMPT = "Describe the picture in one sentence."


@dataclass(frozen=True)
class Shape:
    """One workload. An iteration answers ``prompts`` prompts with ``group`` responses of ``length`` tokens each.

    Attributes:
        side: of the square pictures, in pixels.
        trl_batches: values of TRL's ``per_device_train_batch_size`` to try; the fastest is measured.
        micro_prompts: mmft's prompts per forward pass of the update.
        trl_generation: samples that TRL generates together, to try with the fastest batch, beside a whole iteration's.
        trl_compile: whether to try `torch_compile` as well; it pays off after some iterations alone.
        micro_trials: values of ``micro_prompts`` to try.
        stretch: each system runs all its iterations in a row, for one of TRL's takes more than a minute.
    """

    name: str
    side: int
    prompts: int
    group: int
    length: int
    trl_batches: tuple[int, ...]
    micro_prompts: int | None = None
    trl_generation: tuple[int, ...] = ()
    trl_compile: bool = False
    micro_trials: tuple[int, ...] = ()
    stretch: bool = False

    @property
    def samples(self) -> int:
        return self.prompts * self.group


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "bundled",
            side=96,
            prompts=32,
            group=8,
            length=16,
            trl_batches=(8, 16, 32, 64, 256),
            micro_prompts=8,
            trl_generation=(64, 128),
            trl_compile=True,
            micro_trials=(4, 8, 16, 32),
        ),
        Shape("smolvlm256m", 512, 2, 8, 20, (8, 16), micro_prompts=1, stretch=True),
        Shape("qwen250m", 448, 2, 8, 20, (8, 16), micro_prompts=1, stretch=True),
        # For the tests of the benchmarks themselves.
        Shape("tiny", 24, 2, 2, 3, (2, 4), trl_generation=(2,), micro_trials=(1, 2)),
    )
}


def build(shape: Shape, folder: Path) -> Path:
    """The shape's model and processor, saved in ``folder`` unless they are there already; returns where they are."""
    if shape.name == "bundled":
        from mmft.vlm.load import BUNDLED

        if (BUNDLED["scenes-vlm"] / "model.safetensors").is_file():
            return BUNDLED["scenes-vlm"]
    if not (folder / "done").is_file():
        torch.manual_seed(0)
        model, processor = _BUILDERS[shape.name]()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "done").touch()
    return folder


def rows(shape: Shape, count: int) -> list[dict]:
    """Rows ``id, prompt, image`` (PIL, RGB): random blocks of colour, every picture another one."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(blocks).resize((shape.side, shape.side), Image.Resampling.BICUBIC))
    prompt = [{"role": "user", "content": PROMPT}]
    return [{"id": str(i), "prompt": prompt, "image": picture} for i, picture in enumerate(pictures)]


# Content may be a plain string or a list of parts.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(size: int, special: list[str]):
    """``size`` tokens: words (every id is a real token, so all of the head's outputs can be sampled), bytes, and
    the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for token in dict.fromkeys(f"\u0120{word.strip('.')}" for word in PROMPT.split()):  # whole words, as in use
        for end in range(2, len(token) + 1):
            if token[:end] not in words:
                words.append(token[:end])
                merges.append((token[: end - 1], token[end - 1]))
    words += [f"\u0120w{i}" for i in range(size - len(special) - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left"
    )


def _llava(tiny: bool = False):
    """The architecture of the bundled model (see `recipes/pretrain_scenes.py`), or a miniature of it."""
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    hidden, side, patch = (32, 24, 12) if tiny else (128, 96, 12)
    tokenizer = _tokenizer(400 if tiny else 1460, ["<|pad|>", "<image>", "<|im_start|>", "<|im_end|>"])
    vision = SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=1 if tiny else 4,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 21 // 8,
        num_hidden_layers=1 if tiny else 3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=_CHAT,
        image_token="<image>",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, processor


def _smolvlm():
    """SmolVLM-256M-Instruct's dimensions: 512-px pictures, unsplit, 64 picture tokens each."""
    from transformers import (
        GenerationConfig,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    around = ["<fake_token_around_image>", "<global-img>"]
    tokenizer = _tokenizer(49280, ["<|pad|>", "<image>", "<|im_start|>", "<|im_end|>", *around])
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            **ids,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    picture = {
        "do_image_splitting": False,
        "size": {"longest_edge": 512},
        "max_image_size": {"longest_edge": 512},
    }
    clips = {"video_sampling": {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 512}}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**picture),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**picture, **clips),
        image_seq_len=64,
        chat_template=_CHAT,
    )
    model = SmolVLMForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ids)
    return model, processor


def _qwen2_5_vl():
    """Qwen2.5-VL-3B's layout at 250 M parameters: the shares of tower (20 %), decoder and embedding, the ratios of
    widths within a layer, windows in the tower, multimodal rotary positions; a 448-px picture is 256 tokens."""
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(32768, ["<|pad|>", "<|im_start|>", "<|im_end|>", *marks])
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    hidden = 768
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 480,
            "intermediate_size": 1284,
            "depth": 16,
            "num_heads": 6,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [3, 7, 11, 15],
            "out_hidden_size": hidden,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 4128,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            **ids,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ids)
    return model, processor


_BUILDERS = {
    "bundled": _llava,
    "tiny": lambda: _llava(tiny=True),
    "smolvlm256m": _smolvlm,
    "qwen250m": _qwen2_5_vl,
}

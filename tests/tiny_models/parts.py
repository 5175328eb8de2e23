"""What the builders share: sizes, the byte tokenizer, a small decoder and a small vision tower."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HIDDEN = 64
TILE = 32  # pixels along a side of one picture (LLaVA) or one tile (SmolVLM, InternVL, ...)
PATCH = 8

# Like the real templates, and content may be a plain string as well as a list of parts.
PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@IMAGE@{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)


def chatml(picture: str) -> str:
    """The template of Qwen and of what is built on it; ``picture`` stands where a picture goes."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + PARTS.replace("@IMAGE@", picture)
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def byte_tokenizer(
    special: list[str], *, pad: str, eos: str, bos: str | None = None, **named: str
) -> PreTrainedTokenizerFast:
    """One token a byte, and the family's special tokens behind them.

    Args:
        named: tokens that the processor asks the tokenizer for by name (``start_image_token="<img>"``).
    """
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        padding_side="left",
        **({"extra_special_tokens": named} if named else {}),
    )


def chatml_tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special], pad="<|endoftext|>", eos="<|im_end|>", **named
    )


def decoder(tokenizer: PreTrainedTokenizerFast, layers: int = 2) -> dict:
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


def tower() -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
    }

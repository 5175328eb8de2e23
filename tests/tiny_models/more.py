"""Families driven in a way of their own: Gemma 3, PaliGemma (1 and 2), BLIP-2, InstructBLIP, Qwen2-Audio.

Kept of each: Gemma 3's sliding and full layers, pictures that see themselves both ways and are longer than the window;
PaliGemma's positions from 1 and its prefix that is bidirectional throughout, and the softcapped logits of the second
one; the Q-Formers, of which InstructBLIP's reads the prompt with a tokenizer of its own; OPT's learned positions; the
sounds of Qwen2-Audio, padded to one length and masked.
"""

from __future__ import annotations

from tokenizers import processors
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    SiglipImageProcessor,
    WhisperFeatureExtractor,
)

from tiny_models.parts import HIDDEN, PARTS, PATCH, TILE, byte_tokenizer, decoder, tower

_SIDE = {"height": TILE, "width": TILE}
_GEMMA_CHAT = (
    "<bos>{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    + PARTS.replace("@IMAGE@", "<start_of_image>")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def gemma3():
    marks = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_tokenizer(
        ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", *marks.values()],
        pad="<pad>",
        eos="<end_of_turn>",
        bos="<bos>",
        **marks,
    )
    text = {
        **decoder(tokenizer, layers=3),
        "head_dim": HIDDEN // 4,
        "query_pre_attn_scalar": HIDDEN // 4,
        "tie_word_embeddings": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    config = Gemma3Config(
        text_config=text,
        # 8 x 8 patches, pooled two by two: 16 tokens a picture, more than the window.
        vision_config={"model_type": "siglip_vision_model", **tower(), "patch_size": 4},
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=_SIDE),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=_GEMMA_CHAT,
    )
    return Gemma3ForConditionalGeneration(config), processor


def _paligemma(text: dict, tied: bool = True):
    tokenizer = byte_tokenizer(["<pad>", "<bos>", "<eos>"], pad="<pad>", eos="<eos>", bos="<bos>")
    image_processor = SiglipImageProcessor(size=_SIDE)
    image_processor.image_seq_length = (TILE // PATCH) ** 2
    processor = PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    decoded = {**decoder(tokenizer), "head_dim": HIDDEN // 4, "tie_word_embeddings": tied, **text}
    config = PaliGemmaConfig(
        text_config=decoded,
        vision_config={"model_type": "siglip_vision_model", **tower(), "vision_use_head": False},
        image_token_index=processor.image_token_id,
        vocab_size=len(tokenizer),
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        tie_word_embeddings=tied,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def paligemma():
    # Untied, unlike the real one: tied weights this small can only say the last token again.
    return _paligemma({"model_type": "gemma"}, tied=False)


def paligemma2():
    windows = ["sliding_attention", "full_attention"]
    return _paligemma(
        {
            "model_type": "gemma2",
            "query_pre_attn_scalar": HIDDEN // 4,
            "sliding_window": 12,
            "layer_types": windows,
            # Low enough to bend the scores and logits of a model this small.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        }
    )


def _q_former(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the configurations of both Q-Formers share."""
    return {
        "vision_config": {**tower()},
        "qformer_config": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 256,
            "cross_attention_frequency": 1,
        },
        "num_query_tokens": 8,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }


def blip_2():
    # As OPT's: one token opens and ends every text, behind the picture's.
    tokenizer = _with_bos(byte_tokenizer(["<pad>", "</s>", "<image>"], pad="<pad>", eos="</s>", bos="</s>"))
    opt = {
        "model_type": "opt",
        **decoder(tokenizer),
        "tie_word_embeddings": True,
        "ffn_dim": 2 * HIDDEN,
        "word_embed_proj_dim": HIDDEN,
    }
    model = Blip2ForConditionalGeneration(Blip2Config(text_config=opt, **_q_former(tokenizer)))
    image_processor = BlipImageProcessor(size=_SIDE)
    return model, Blip2Processor(image_processor=image_processor, tokenizer=tokenizer, num_query_tokens=8)


def instructblip():
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = _with_bos(byte_tokenizer(special, pad="<pad>", eos="</s>", bos="<s>"))
    llama = {"model_type": "llama", **decoder(tokenizer)}
    model = InstructBlipForConditionalGeneration(InstructBlipConfig(text_config=llama, **_q_former(tokenizer)))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    processor = InstructBlipProcessor(
        image_processor=BlipImageProcessor(size=_SIDE),
        tokenizer=tokenizer,
        qformer_tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(words)}),
        num_query_tokens=8,
    )
    return model, processor


def qwen2_audio():
    marks = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks], pad="<|endoftext|>", eos="<|im_end|>"
    )
    config = Qwen2AudioConfig(
        # Two seconds at most: 200 frames of 10 ms, every fourth of which becomes a token.
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": 100,
        },
        text_config={"model_type": "qwen2", **decoder(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=16, chunk_length=2), tokenizer=tokenizer
    )
    return Qwen2AudioForConditionalGeneration(config), processor


BUILDERS = {
    "gemma3": gemma3,
    "paligemma": paligemma,
    "paligemma2": paligemma2,
    "blip-2": blip_2,
    "instructblip": instructblip,
    "qwen2_audio": qwen2_audio,
}

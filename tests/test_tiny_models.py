"""The tiny checkpoints behave like real ones; else every test built on them proves nothing."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

SEEING = [family for family in tiny_models.FAMILIES if family != "qwen2_audio"]
# Every picture becomes the same number of tokens, whatever its shape.
ONE_SIZE = {"llava", "idefics2", "gemma3", "paligemma", "paligemma2", "blip-2", "instructblip"}
# Called otherwise than their configurations' model_type.
MODEL_TYPE = {"pixtral": "llava", "paligemma2": "paligemma"}

pytestmark = pytest.mark.parametrize("family", SEEING)


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def chat(processor, text: str = "What is this?") -> str:
    if processor.chat_template is None:  # PaliGemma, BLIP: their processors put the picture first
        return text
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)


@pytest.fixture
def loaded(family, tiny_model):
    folder = tiny_model(family)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def last_logits(model, processor, image: Image.Image) -> torch.Tensor:
    inputs = processor(text=[chat(processor)], images=[image], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


def test_loads_as_its_own_family(family, loaded):
    model, processor = loaded
    assert model.config.model_type == MODEL_TYPE.get(family, family)
    assert model.dtype == torch.float32
    assert (
        len(processor.tokenizer) == model.get_output_embeddings().weight.shape[0] <= 1500
    )  # PaliGemma: 1,152 of places


def test_one_placeholder_per_feature(family, loaded):
    model, processor = loaded
    for width, height in [(32, 32), (64, 24), (16, 40)]:
        image = picture(0, width, height)
        inputs = processor(text=[chat(processor)], images=[image], return_tensors="pt")
        placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
        visual = {k: v for k, v in inputs.items() if k.startswith(("pixel", "image", "qformer"))}
        with torch.no_grad():
            features = model.get_image_features(**visual).pooler_output
        assert placeholders == sum(f.shape[:-1].numel() for f in features) > 0


def test_number_of_tokens_follows_the_picture(family, loaded):
    model, processor = loaded
    counts = set()
    for width, height in [(32, 32), (64, 24)]:
        image = picture(0, width, height)
        inputs = processor(text=[chat(processor)], images=[image], return_tensors="pt")
        counts.add(int((inputs["input_ids"] == model.config.image_token_id).sum()))
    assert len(counts) == (1 if family in ONE_SIZE else 2)


def test_picture_matters(family, loaded):
    model, processor = loaded
    one = last_logits(model, processor, picture(1))
    for other in (picture(2), Image.new("RGB", (32, 32))):
        assert (last_logits(model, processor, other) - one).abs().max() > 0.1


def test_distribution_has_peaks(family, loaded):
    model, processor = loaded
    logits = last_logits(model, processor, picture(1))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 0.5 < entropy < 0.95 * np.log(logits.numel())


def test_generates_from_a_ragged_batch(family, loaded):
    model, processor = loaded
    texts = [chat(processor, "Short"), chat(processor, "A rather longer question?")]
    images = [[picture(1)], [picture(2, 64, 24)]]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 4)


def test_template_takes_plain_strings(family, loaded):
    _, processor = loaded
    if processor.chat_template is None:
        return
    text = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert "Hi" in text and processor.image_token not in text


def test_tokenizer_is_lossless_and_special_tokens_are_single(family, loaded):
    tokenizer = loaded[1].tokenizer
    text = "A café, 3 cats; <b>bold</b>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.encode(tokenizer.eos_token, add_special_tokens=False) == [tokenizer.eos_token_id]


def test_same_seed_same_weights(family, tmp_path, tiny_model):
    again = AutoModelForImageTextToText.from_pretrained(tiny_models.build(family, tmp_path / "again"))
    once = AutoModelForImageTextToText.from_pretrained(tiny_model(family))
    theirs = once.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in again.state_dict().items())

"""The bundled model as a stranger meets it: plain Auto classes, no torchvision, no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmft
from mmft.data.scenes import PROMPT, attribute_claims, scene_rows

FOLDER = Path(mmft.__file__).parent / "assets" / "scenes_vlm"
QUESTION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
]


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_weights_are_small_and_fp32(model: Any) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_loads_where_torchvision_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from transformers import AutoProcessor\n"
        f"p = AutoProcessor.from_pretrained({str(FOLDER)!r})\n"
        "from PIL import Image\n"
        "out = p(text='<image>hello', images=Image.new('RGB', (40, 60)), return_tensors='pt')\n"
        "print(tuple(out['pixel_values'].shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(1, 3, 96, 96)" in done.stdout


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (96, 96)), ("RGB", (500, 333)), ("L", (31, 200)), ("RGBA", (64, 64))]
)
def test_placeholders_equal_features(processor: Any, model: Any, mode: str, size: tuple[int, int]) -> None:
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new(mode, size), return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert placeholders == features[0].shape[0] == 64


def test_chat_template(processor: Any) -> None:
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n<image>{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert processor.apply_chat_template(plain) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_generation_mask_covers_the_answer_and_its_end_alone(processor: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a red circle"}]
    out = processor.tokenizer.apply_chat_template(
        chat,
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    said = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert processor.tokenizer.decode(said) == "a red circle<|im_end|>"


def test_special_tokens(processor: Any, model: Any) -> None:
    """A pad that equals EOS would teach a trainer to mask the end of every caption."""
    tokenizer = processor.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert tokenizer.bos_token_id is None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.text_config.vocab_size == len(tokenizer)
    for token in ("<image>", "<|im_start|>", "<|im_end|>", "<|pad|>"):
        assert len(tokenizer(token)["input_ids"]) == 1


@pytest.mark.parametrize(
    "text",
    ["a red circle", "  two  spaces ", "Ünïcödé ☃ 日本", "a < image > b", "new\nline\ttab", "it's 5-7!"],
)
def test_any_text_comes_back(processor: Any, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_special_token_text_comes_back_as_itself(processor: Any) -> None:
    text = "<|im_start|>user\n<image>hi<|im_end|>"
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"


def test_common_words_of_photo_captions_are_short(processor: Any) -> None:
    text = " a man in a red shirt is riding a bike down the street while two dogs run on the grass"
    assert len(processor.tokenizer(text)["input_ids"]) <= 1.1 * len(text.split())


def test_held_out_captions_are_mostly_right(processor: Any, model: Any) -> None:
    """Weights that do not belong to the world, a wrong prompt or swapped picture channels all land far below."""
    rows = scene_rows("validation", 48)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    pictures = [rows[i]["image"] for i in range(len(rows))]
    inputs = processor(text=[text] * len(rows), images=pictures, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    answers = out[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    claims = [attribute_claims(t, rows.scene(i)) for i, t in enumerate(texts)]
    assert min(total for _, total in claims) >= 1
    assert sum(true for true, _ in claims) / sum(total for _, total in claims) > 0.9
    ended = (answers == model.generation_config.eos_token_id).any(1).float().mean()
    assert ended > 0.97


def test_the_picture_decides_the_caption(processor: Any, model: Any) -> None:
    rows = scene_rows("validation", 16)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(text=[text] * 16, images=[rows[i]["image"] for i in range(16)], return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert len({tuple(ids.tolist()) for ids in out[:, inputs["input_ids"].shape[1] :]}) >= 14


def test_training_log_tells_how_the_weights_came_about() -> None:
    lines = [json.loads(line) for line in (FOLDER / "training_log.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["steps"] == lines[-1]["step"]
    assert lines[-1]["cider_d"] > 0.9 * max(line.get("cider_d", 0.0) for line in lines)

"""Sounds in the prompt: files to log-probs, what the model cannot hear, and other wrong rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data.clips import write_sound

from mmft.batch import Responses
from mmft.data import OpenedRows, Sounds
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.media import blank

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(tiny_model):
    model, processor = load_model(str(tiny_model("qwen2_audio")))
    return build_policy(model, processor, lora_config(model, r=4))


def tone(hertz: float, seconds: float = 0.5, rate: int = 16_000) -> dict:
    return {"array": np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate), "sampling_rate": rate}


def logprobs(policy, row) -> torch.Tensor:
    ids = torch.tensor([[70, 71, 72]])
    prompts = policy.pictures.prompts([row], ["r"], CPU)
    with torch.no_grad():
        return policy(prompts, Responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([True]))).logprobs


def test_a_file_says_what_its_samples_say_and_another_sound_something_else(policy, tmp_path):
    path = write_sound(tmp_path / "a.wav", seconds=0.5, rate=16_000, channels=1)
    rows = OpenedRows([{"id": "r", "prompt": "what", "audio": str(path)}], "audio", Sounds().reader)
    sound = tone(440.0)
    same = {"prompt": "what", "audio": {**sound, "array": np.round(sound["array"] * 0.5 * 32767) / 32768}}
    first = logprobs(policy, rows[0])
    torch.testing.assert_close(first, logprobs(policy, same), atol=1e-3, rtol=0)
    for other in ({"prompt": "what", "audio": tone(1200.0)}, blank(same), {"prompt": "what"}):
        assert (first - logprobs(policy, other)).abs().max() > 1e-2


def test_two_sounds_stand_where_the_conversation_puts_them(policy):
    parts = [{"type": "text", "text": "one"}, {"type": "audio"}, {"type": "text", "text": "two"}, {"type": "audio"}]
    row = {"prompt": [{"role": "user", "content": parts}], "audio": [tone(300.0), tone(900.0, 0.8)]}
    swapped = {**row, "audio": row["audio"][::-1]}
    (ids,) = policy.pictures.prompts([row], ["r"], CPU).prompt_ids
    token = policy.pictures.token_ids["audio"]
    text = policy.tokenizer.decode(ids[ids != token])
    # 50 frames of 10 ms make 12 tokens, 80 make 20: halved by a convolution, then by pooling without padding.
    assert int((ids == token).sum()) == 12 + 20
    assert text.index("one") < text.index("Audio 1") < text.index("two") < text.index("Audio 2")
    assert (logprobs(policy, row) - logprobs(policy, swapped)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (tone(440.0, rate=8_000), "8000 samples a second, the model expects 16000; set data.audio.sampling_rate"),
        (tone(440.0, 2.5), "a sound of 2.5 s, the model hears at most 2 s"),
        ("a.wav", "a sound is str, expected 'array' and 'sampling_rate'"),
        ({"array": np.zeros((2, 100)), "sampling_rate": 16_000}, r"shape \(2, 100\), expected \(samples,\)"),
    ],
)
def test_wrong_sounds_are_named(policy, audio, said):
    with pytest.raises(ValueError, match=f"row q: .*{said}"):
        policy.pictures.prompts([{"prompt": "p", "audio": audio}], ["q"], CPU)


def test_families_that_do_not_hear_say_so(tiny_model):
    model, processor = load_model(str(tiny_model("llava")))
    pictures = build_policy(model, processor, lora_config(model, r=4)).pictures
    with pytest.raises(ValueError, match="row q: LlavaProcessor takes no sounds"):
        pictures.prompts([{"prompt": "p", "audio": tone(440.0)}], ["q"], CPU)

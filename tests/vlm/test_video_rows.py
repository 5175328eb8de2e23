"""Clips in the prompt, as pictures and through the processors' own video inputs, beside pictures and plain text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmft.batch import Responses
from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.media import blank
from mmft.vlm.pictures import check_placeholders

GROUP = 2
# What the templates of these families put where a clip goes; the tiny ones know pictures alone.
MARKS = {
    "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "llava_onevision": "<video>\n",
    "internvl": "<video>\n",
    "smolvlm": None,  # brings a template of its own for clips
}


def frame(seed: int, size=(40, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def clip(seed: int, frames: int, seconds: float, size=(40, 32)) -> dict:
    """A clip whose frames are the middles of equal stretches, as `mmft.data.video` makes it."""
    times = [(i + 0.5) * seconds / frames for i in range(frames)]
    return {"frames": [frame(seed + i, size) for i in range(frames)], "times": times, "duration": seconds}


ROWS = [
    {"prompt": "what moves", "video": clip(0, 4, 8.0)},
    {"prompt": "nothing to see here"},
    {"prompt": "a longer question about another clip", "video": clip(10, 3, 1.5, (32, 48))},
    {"prompt": "and a picture", "image": frame(20)},
]
IDS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module", params=MARKS)
def policy(request, tiny_model):
    model, processor = load_model(str(tiny_model(request.param)))
    if MARKS[request.param]:
        part = "{% elif part['type'] == 'video' %}" + MARKS[request.param]
        text = "{% elif part['type'] == 'text' %}"
        assert text in processor.chat_template
        processor.chat_template = processor.chat_template.replace(text, part + text)
    torch.manual_seed(0)
    policy = build_policy(model, processor, lora_config(model, r=4))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


def prompts_of(policy, rows=ROWS):
    policy.pictures.cache.clear()  # with raw pixels: the plain path needs them
    return policy.pictures.prompts(rows, IDS[: len(rows)], torch.device("cpu"))


def responses_of(policy, n: int, longest: int = 5) -> Responses:
    allowed = (~policy.banned).nonzero().flatten()
    ids = allowed[torch.randint(len(allowed), (n, longest), generator=torch.Generator().manual_seed(1))]
    mask = torch.arange(longest)[None] < torch.tensor([1 + i % longest for i in range(n)])[:, None]
    return Responses(ids * mask, mask, torch.ones(n, dtype=torch.bool))


@torch.no_grad()
def test_shared_prefix_is_the_plain_path_on_clips_pictures_and_text(policy):
    rows = list(ROWS)
    if policy.model.config.model_type == "llava_onevision":  # takes no clips of different lengths in one call
        rows[2] = {**rows[2], "video": clip(10, 4, 1.5, (32, 48))}
    prompts, responses = prompts_of(policy, rows), responses_of(policy, len(rows) * GROUP)
    shared = policy(prompts, responses).logprobs
    policy.shared_prefix = False
    try:
        plain = policy(prompts, responses).logprobs
    finally:
        policy.shared_prefix = True
    print(f"\n{policy.model.config.model_type}: clips, shared prefix against plain: {(shared - plain).abs().max():.1e}")
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=0)


@torch.no_grad()
def test_log_probs_are_those_of_a_user_who_calls_processor_and_model(policy):
    """Row by row, positions and masks left to transformers."""
    responses = responses_of(policy, len(ROWS))
    ours = policy(prompts_of(policy), responses).logprobs
    for n, row in enumerate(ROWS):
        counts = {name: 1 for name in ("image", "video") if name in row}
        text, options = policy.pictures.render(row["prompt"], counts), {}
        if "image" in row:
            options["images"] = [[row["image"]]]
        if "video" in row:
            video = row["video"]
            options["videos"] = [[np.asarray(f) for f in video["frames"]]]
            # One frame a tick, as if the clip had exactly these.
            rate = len(video["frames"]) / video["duration"]
            options["video_metadata"] = [
                {
                    "total_num_frames": len(video["frames"]),
                    "fps": rate,
                    "duration": video["duration"],
                    "frames_indices": [i + 0.5 for i in range(len(video["frames"]))],
                }
            ]
            options["do_sample_frames"] = False
        call = policy.processor if options else policy.tokenizer
        bos = policy.tokenizer.bos_token
        inputs = dict(
            call(text=[text], return_tensors="pt", add_special_tokens=not (bos and text.startswith(bos)), **options)
        )
        response = responses.ids[n, responses.mask[n]][None]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if key in inputs:
                more = {"input_ids": response, "attention_mask": torch.ones_like(response)}
                more = more.get(key, torch.zeros_like(response))
                inputs[key] = torch.cat([inputs[key], more.to(inputs[key].dtype)], 1)
        inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        logits = policy.model(**inputs).logits[0, -response.shape[1] - 1 : -1].float()
        theirs = logits.masked_fill(policy.banned, -torch.inf).log_softmax(-1).gather(-1, response[0][:, None])[:, 0]
        torch.testing.assert_close(ours[n, responses.mask[n]], theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_placeholders_are_features_and_a_clip_is_encoded_once(policy):
    rows, before = [ROWS[0], ROWS[2], {**ROWS[0], "prompt": "again"}], policy.pictures.encoded
    prompts = prompts_of(policy, rows)
    policy.features(prompts)
    check_placeholders(prompts, policy.pictures.token_ids)
    assert policy.pictures.encoded - before == 2
    fresh = policy(prompts, responses_of(policy, 3)).logprobs
    again = policy.pictures.prompts(rows, IDS[:3], torch.device("cpu"))
    assert policy.pictures.encoded - before == 2 and torch.equal(policy(again, responses_of(policy, 3)).logprobs, fresh)


@torch.no_grad()
def test_frames_their_order_and_grey_ones_change_the_log_probs(policy):
    responses = responses_of(policy, 1)
    row = ROWS[0]
    turned = {**row, "video": {**row["video"], "frames": row["video"]["frames"][::-1]}}
    first, other, grey = (policy(prompts_of(policy, [r]), responses).logprobs for r in (row, turned, blank(row)))
    assert (first - other).abs().max() > 1e-4 and (first - grey).abs().max() > 1e-4


def test_times_reach_the_model_where_the_family_has_a_place_for_them(policy):
    slow = {**ROWS[0], "video": clip(0, 4, 80.0)}
    one, other = (prompts_of(policy, [row]) for row in (ROWS[0], slow))
    same = torch.equal(one.prompt_ids, other.prompt_ids) and torch.equal(one.positions, other.positions)
    # Qwen2.5-VL places frames by seconds; Qwen3-VL and SmolVLM say the seconds in words; the others do not know them.
    assert same == (policy.model.config.model_type in ("qwen2_vl", "llava_onevision", "internvl"))


def test_clips_are_sampled_from(policy):
    prompts = prompts_of(policy)
    responses, sampled = generate(policy, prompts, GROUP, 6, 0.9, seed=3)
    with torch.no_grad():
        trained = policy(prompts, responses, 0.9).logprobs
    torch.testing.assert_close(trained, sampled.logprobs, atol=1e-4, rtol=0)


def test_a_list_of_frames_is_a_clip_of_one_a_second(policy):
    frames = [frame(i) for i in range(4)]
    listed, said = {"prompt": "p", "video": frames}, {"prompt": "p", "video": {"frames": frames, "duration": 4.0}}
    one, other = (prompts_of(policy, [row]) for row in (listed, said))
    assert torch.equal(one.prompt_ids, other.prompt_ids) and torch.equal(one.positions, other.positions)


def test_a_conversation_says_where_its_clip_goes(policy):
    parts = [{"type": "text", "text": "before"}, {"type": "video"}, {"type": "text", "text": "after <video>"}]
    row = {"prompt": [{"role": "user", "content": parts}], "video": ROWS[0]["video"]}
    text = policy.pictures.render(row["prompt"], {"video": 1})
    assert text.index("before") < text.index("after")
    counted = prompts_of(policy, [row, ROWS[0]])
    ids = list(policy.pictures.token_ids.values())
    places = [int(torch.isin(row_ids, torch.tensor(ids)).sum()) for row_ids in counted.prompt_ids]
    assert places[0] == places[1] > 0
    with pytest.raises(ValueError, match="row q: the prompt has places for 1 clips, the row has 0"):
        policy.pictures.prompts([{"prompt": row["prompt"]}], ["q"], torch.device("cpu"))
    with pytest.raises(ValueError, match="row q: a clip is str, expected 'frames'"):
        policy.pictures.prompts([{"prompt": "p", "video": "a.mp4"}], ["q"], torch.device("cpu"))


def test_families_without_video_inputs_say_so(tiny_model):
    model, processor = load_model(str(tiny_model("llava")))
    pictures = build_policy(model, processor, lora_config(model, r=4)).pictures
    with pytest.raises(ValueError, match="row q: LlavaProcessor takes no clips; with data.video.native false"):
        pictures.prompts([{"prompt": "p", "video": ROWS[0]["video"]}], ["q"], torch.device("cpu"))

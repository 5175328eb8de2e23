"""What is peculiar to Gemma 3, PaliGemma, BLIP-2, InstructBLIP and Qwen2-Audio, beyond the contract of every family."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch

from mmft.batch import Responses
from mmft.vlm.decoder import backbone, text_decoder
from mmft.vlm.load import build_policy, load_model, lora_config

CPU = torch.device("cpu")
PICTURE = {"prompt": "what is it", "image": oracle.picture(0, (32, 32))}


@pytest.fixture(scope="module")
def policy_of(tiny_model):
    """``policy_of(family)`` -> a policy without adapters, fresh for each call."""
    return lambda family: build_policy(*load_model(str(tiny_model(family))), needs_reference=False).eval()


def read(policy, rows) -> list[str]:
    prompts = policy.pictures.prompts(rows, [str(i) for i in range(len(rows))], CPU)
    return [
        policy.tokenizer.decode(ids[mask]) for ids, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
    ]


def logprobs(policy, rows, length: int = 20) -> torch.Tensor:
    """(rows, length) log-probs of one response to each row, longer than the windows of the tiny models."""
    ids = torch.randint(97, 122, (len(rows), length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    prompts = policy.pictures.prompts(rows, [str(i) for i in range(len(rows))], CPU)
    with torch.no_grad():
        return policy(prompts, Responses(ids, mask, torch.zeros(len(rows), dtype=torch.bool))).logprobs


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "paligemma2"])
def test_a_causal_reading_of_the_prompt_would_be_seen(policy_of, family):
    """Else the contract could not tell the families' masks from the usual one."""
    policy = policy_of(family)
    right = logprobs(policy, [PICTURE])
    policy.family = replace(policy.family, prompt_attention="causal")
    assert (logprobs(policy, [PICTURE]) - right).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_a_window_left_out_would_be_seen(policy_of, family):
    policy = policy_of(family)
    right = logprobs(policy, [PICTURE])
    for layer in text_decoder(policy.model, policy.family).layers:
        layer.self_attn.sliding_window = None
    assert (logprobs(policy, [PICTURE]) - right).abs().max() > 1e-2


def test_paligemma_reads_what_it_was_trained_on(policy_of):
    policy = policy_of("paligemma")
    two = {"prompt": "compare", "images": [oracle.picture(1, (32, 32)), oracle.picture(2, (40, 24))]}
    texts = read(policy, [PICTURE, two, {"prompt": "no picture"}])
    assert texts == [
        "<image>" * 16 + "<bos>what is it\n",
        "<image>" * 32 + "<bos>compare\n",
        "<bos>no picture\n",
    ]


def test_paligemma_may_write_places_and_segments(policy_of):
    policy = policy_of("paligemma")
    places = policy.tokenizer.convert_tokens_to_ids(["<loc0000>", "<loc1023>", "<seg000>", "<seg127>"])
    assert not policy.banned[places].any() and policy.banned[policy.pictures.token_ids["image"]]


def test_gemma3_writes_no_marks_of_pictures(policy_of):
    policy = policy_of("gemma3")
    marks = policy.tokenizer.convert_tokens_to_ids(["<start_of_image>", "<end_of_image>", "<image_soft_token>"])
    assert policy.banned[marks].all()


@pytest.mark.parametrize("family", ["blip-2", "instructblip"])
def test_blip_takes_one_picture_before_the_text(policy_of, family):
    policy = policy_of(family)
    bos = policy.tokenizer.bos_token
    assert read(policy, [PICTURE, {"prompt": "no picture"}]) == [
        "<image>" * 8 + f"{bos}what is it",
        f"{bos}no picture",
    ]
    two = {"prompt": "compare", "images": [PICTURE["image"]] * 2}
    with pytest.raises(ValueError, match="row 0: 2 pictures, a .* model takes at most 1"):
        read(policy, [two])


@pytest.mark.parametrize(("family", "encoded"), [("blip-2", 1), ("instructblip", 2)])
def test_only_instructblips_features_depend_on_the_prompt(policy_of, family, encoded):
    policy = policy_of(family)
    rows = [PICTURE, {**PICTURE, "prompt": "where is it"}, PICTURE]
    prompts = policy.pictures.prompts(rows, ["a", "b", "c"], CPU)
    features = policy.features(prompts)["image"]
    assert torch.equal(features[0], features[2])
    assert policy.pictures.encoded == policy_of(family).pictures.encoded + encoded
    assert torch.equal(features[0], features[1]) == (family == "blip-2")


@pytest.mark.parametrize("family", ["blip-2", "instructblip", "paligemma", "gemma3", "qwen2_audio"])
def test_adapters_go_to_the_decoder_alone(tiny_model, family):
    model, processor = load_model(str(tiny_model(family)))
    policy = build_policy(model, processor, lora_config(model, r=2))
    decoder = {id(module) for module in text_decoder(policy.model, policy.family).modules()}
    adapted = [(name, module) for name, module in policy.model.named_modules() if hasattr(module, "lora_A")]
    linear = {"blip-2": 6}.get(family, 7)  # of each layer: OPT has no gate
    assert len(adapted) == linear * len(text_decoder(policy.model, policy.family).layers)
    assert all(id(module) in decoder for _, module in adapted)


@pytest.mark.parametrize("family", ["blip-2", "instructblip"])
def test_training_is_of_the_distribution_that_was_sampled_from(policy_of, family):
    """OPT and the Q-Formers come with dropout."""
    policy = policy_of(family)
    evaluated = logprobs(policy, [PICTURE])
    policy.train()
    policy.pictures.cache.clear()
    torch.testing.assert_close(logprobs(policy, [PICTURE]), evaluated, atol=1e-5, rtol=0)


def test_the_t5_variants_of_blip_are_refused(tiny_model):
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    _, processor = load_model(str(tiny_model("blip-2")))
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    t5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    config = Blip2Config(vision_config=small, qformer_config=small, text_config=t5, image_token_index=258)
    with pytest.raises(ValueError, match="'blip-2' model has no 'language_model.model.decoder'"):
        build_policy(Blip2ForConditionalGeneration(config), processor, needs_reference=False)


def test_a_sounds_tokens_follow_its_length_and_its_silence_is_not_heard(policy_of):
    policy = policy_of("qwen2_audio")
    rows = [{"prompt": "what is it", "audio": oracle.sound(0, seconds)} for seconds in (0.5, 1.0, 1.5)]
    prompts = policy.pictures.prompts(rows, ["a", "b", "c"], CPU)
    places = (prompts.prompt_ids == policy.pictures.token_ids["audio"]).sum(-1)
    features = policy.features(prompts)["audio"]
    assert places.tolist() == [len(f) for f in features] == [12, 25, 37]  # a token every 40 ms
    tensors = prompts.visuals[0].tensors
    louder = tensors["input_features"].clone()
    louder[..., int(tensors["feature_attention_mask"].sum()) + 2 :] = 5.0  # 2 frames: the reach of the convolutions
    encode = policy.family.media[0].encoder
    with torch.no_grad():
        again = encode(backbone(policy.model), louder, tensors["feature_attention_mask"]).pooler_output[0]
    torch.testing.assert_close(again, features[0], atol=1e-5, rtol=0)


def test_two_sounds_in_one_prompt(policy_of):
    policy = policy_of("qwen2_audio")
    row = {"prompt": "which is louder", "audio": [oracle.sound(0, 0.5), oracle.sound(1, 1.0)]}
    prompts = policy.pictures.prompts([row], ["a"], CPU)
    assert [len(f) for f in policy.features(prompts)["audio"]] == [12, 25]
    response = torch.tensor([[97, 98, 99]])
    mask = torch.ones_like(response, dtype=torch.bool)
    with torch.no_grad():
        ours = policy(prompts, Responses(response, mask, torch.zeros(1, dtype=torch.bool))).logprobs[0]
    inputs = policy.processor(
        text=[policy.pictures.render(row["prompt"], 2)],
        audio=[sound["array"] for sound in row["audio"]],
        sampling_rate=16_000,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = policy.model(**oracle.continued(inputs, response[0], False)).logits[0, -4:-1]
    exact = logits.masked_fill(policy.banned, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(ours, exact.gather(-1, response[0, :, None]).squeeze(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("part", ["qformer", "language_projection", "query_tokens"])
def test_a_trained_q_former_is_asked_every_time(tiny_model, part):
    """Its features are not those of a frozen tower, though the vision model is frozen."""
    model, processor = load_model(str(tiny_model("blip-2")))
    assert build_policy(model.requires_grad_(False), processor, needs_reference=False).tower_frozen
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    assert not build_policy(model, processor, needs_reference=False).tower_frozen

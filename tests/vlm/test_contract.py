"""The contract of every family: the shared prefix is the plain forward, decoding is `generate`, pictures matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES

from mmft.batch import Responses
from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.pictures import check_placeholders
from mmft.vlm.plain import plain_generate
from mmft.vlm.selftest import selftest


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Ragged on purpose: prompts of different lengths, pictures of different sizes, one row without a picture.
ROWS = [
    {"prompt": "what is it", "image": picture(0, (32, 32))},
    {"prompt": "a longer question about the thing in the picture", "image": picture(1, (48, 32))},
    {"prompt": "no picture here"},
    {"prompt": "two", "images": [picture(2, (32, 48)), picture(3, (32, 32))]},
]
IDS = ["a", "b", "c", "d"]
GROUP = 3


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, tiny_model):
    model, processor = load_model(str(tiny_model(request.param)))
    torch.manual_seed(0)
    policy = build_policy(model, processor, lora_config(model, r=4))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zero at first, so that adapters off would be adapters on
            torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def prompts_of(policy):
    policy.pictures._cached.clear()  # with raw pixels: the plain path needs them
    return policy.pictures.prompts(ROWS, IDS, torch.device("cpu"))


def random_responses(policy, n: int, longest: int = 7) -> Responses:
    """Ragged random responses, one of them a single token."""
    allowed = (~policy.banned).nonzero().flatten()
    stream = torch.Generator().manual_seed(1)
    ids = allowed[torch.randint(len(allowed), (n, longest), generator=stream)]
    length = torch.randint(1, longest + 1, (n,), generator=stream)
    length[0], length[1] = 1, longest
    mask = torch.arange(longest)[None] < length[:, None]
    return Responses(ids * mask, mask, torch.ones(n, dtype=torch.bool))


def both_paths(policy, run):
    policy.shared_prefix = True
    shared = run()
    policy.shared_prefix = False
    plain = run()
    policy.shared_prefix = True
    return shared, plain


def test_packed_logprobs_and_values_are_the_plain_ones(policy):
    prompts, responses = prompts_of(policy), random_responses(policy, len(ROWS) * GROUP)
    with torch.no_grad():
        shared, plain = both_paths(policy, lambda: policy(prompts, responses, 0.7, entropy=True))
    error = (shared.logprobs - plain.logprobs).abs().max()
    print(f"\n{policy.model.config.model_type}: log-probs, shared prefix against plain: {error:.1e}")
    for name in ("logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(shared, name), getattr(plain, name), atol=1e-4, rtol=0)
    assert shared.logprobs[responses.mask].max() < 0 and (shared.logprobs[~responses.mask] == 0).all()


def test_packed_gradients_are_the_plain_ones(policy):
    prompts, responses = prompts_of(policy), random_responses(policy, len(ROWS) * GROUP)
    weights = torch.randn(responses.mask.shape, generator=torch.Generator().manual_seed(2))

    def gradients():
        policy.zero_grad()
        out = policy(prompts, responses, entropy=True)
        ((out.logprobs + out.values + 0.1 * out.entropy) * weights * responses.mask).sum().backward()
        return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    shared, plain = both_paths(policy, gradients)
    assert shared.keys() == plain.keys() and any("lora_A" in n for n in shared) and "value_head.weight" in shared
    errors = {n: float((shared[n] - plain[n]).norm() / plain[n].norm().clamp_min(1e-12)) for n in shared}
    worst = max(errors, key=errors.__getitem__)
    print(f"\n{policy.model.config.model_type}: gradients, relative: {errors[worst]:.1e}")
    assert errors[worst] <= 1e-5, f"{worst}: {errors[worst]:.2g}"


def test_reference_is_the_model_without_adapters(policy):
    prompts, responses = prompts_of(policy), random_responses(policy, len(ROWS) * GROUP)
    with torch.no_grad():
        reference, plain = both_paths(policy, lambda: policy(prompts, responses, reference=True).logprobs)
        adapted = policy(prompts, responses).logprobs
    torch.testing.assert_close(reference, plain, atol=1e-4, rtol=0)
    assert (reference - adapted).abs().max() > 1e-3


def test_sampling_logprobs_and_values_are_those_of_training(policy):
    """The ratio of the first minibatch is 1."""
    prompts = prompts_of(policy)
    responses, sampled = generate(policy, prompts, GROUP, 8, 0.9, seed=3)
    with torch.no_grad():
        trained = policy(prompts, responses, 0.9, entropy=True)
    ratio = (trained.logprobs - sampled.logprobs).exp()
    print(f"\n{policy.model.config.model_type}: first ratio - 1: {(ratio - 1).abs().max():.1e}")
    assert (ratio - 1).abs().max() <= 1e-4
    torch.testing.assert_close(trained.values, sampled.values, atol=1e-4, rtol=0)
    torch.testing.assert_close(trained.entropy, sampled.entropy, atol=1e-4, rtol=0)


def test_greedy_decoding_is_that_of_generate(policy):
    prompts = prompts_of(policy)
    shared, _ = generate(policy, prompts, 1, 8, temperature=0.0)
    theirs, _ = plain_generate(policy, prompts, 1, 8, temperature=0.0, seed=None)
    width = min(shared.ids.shape[1], theirs.ids.shape[1])
    assert torch.equal(shared.mask[:, :width], theirs.mask[:, :width])
    assert torch.equal(shared.ids[:, :width], theirs.ids[:, :width] * theirs.mask[:, :width])


def test_a_row_is_sampled_alike_in_any_batch(policy):
    prompts = prompts_of(policy)
    together, _ = generate(policy, prompts, GROUP, 6, seed=5)
    alone, _ = generate(policy, policy.pictures.prompts(ROWS[1:2], IDS[1:2], torch.device("cpu")), GROUP, 6, seed=5)
    width = alone.ids.shape[1]
    assert torch.equal(together.ids[GROUP : 2 * GROUP, :width], alone.ids)


def test_blank_picture_changes_the_logprobs_and_selftest_passes(policy):
    prompts = prompts_of(policy).select([0, 1])
    result = selftest(policy, prompts)
    assert result["logprob_error"] <= 1e-4 and result["blank_change"] > 1e-4


def test_every_picture_token_has_a_feature_and_is_encoded_once(policy):
    rows = [ROWS[0], ROWS[1], ROWS[0]]  # the same picture twice
    policy.pictures._cached.clear()
    before = policy.pictures.encoded
    prompts = policy.pictures.prompts(rows, ["x", "y", "z"], torch.device("cpu"))
    policy.features(prompts)
    check_placeholders(prompts, policy.pictures.image_token_id)
    policy(prompts, random_responses(policy, 3))
    again = policy.pictures.prompts(rows, ["x", "y", "z"], torch.device("cpu"))
    policy.features(again)
    assert policy.pictures.encoded - before == 2


def test_cached_features_give_the_same_numbers(policy):
    responses = random_responses(policy, len(ROWS))
    with torch.no_grad():
        fresh = policy(prompts_of(policy), responses).logprobs
        again = policy.pictures.prompts(ROWS, IDS, torch.device("cpu"))
        # Nothing large is remembered beside the features: SmolVLM's pixel masks are megabytes a row.
        assert all(set(record.tensors) <= {"image_grid_thw"} for record in again.visuals)
        cached = policy(again, responses).logprobs
    assert torch.equal(fresh, cached)


def test_placeholder_text_stays_text_and_placeholders_are_never_sampled(policy):
    marker = policy.tokenizer.convert_ids_to_tokens(policy.pictures.image_token_id)
    plain, hostile = ({**ROWS[0], "prompt": f"read {word} aloud"} for word in ("that", marker))
    counts = [
        int(
            (
                policy.pictures.prompts([row], ["h"], torch.device("cpu")).prompt_ids == policy.pictures.image_token_id
            ).sum()
        )
        for row in (plain, hostile)
    ]
    assert counts[0] == counts[1] > 0
    prompts = prompts_of(policy)
    responses, _ = generate(policy, prompts, 8, 12, temperature=5.0, seed=0)
    assert policy.banned[policy.pictures.image_token_id]
    assert not policy.banned[responses.ids[responses.mask]].any()


def test_a_prompt_with_another_number_of_pictures_is_refused(policy):
    row = {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]}
    with pytest.raises(ValueError, match="row q: the prompt has places for 1 pictures, the row has 0"):
        policy.pictures.prompts([row], ["q"], torch.device("cpu"))


def test_save_and_load_give_the_same_outputs(policy, tmp_path):
    from peft import PeftModel

    from mmft.training.checkpoint import save_adapter

    prompts, responses = prompts_of(policy), random_responses(policy, len(ROWS))
    with torch.no_grad():
        before = policy(prompts, responses).logprobs
    save_adapter(policy, tmp_path)
    base, processor = load_model(policy.model.get_base_model().config._name_or_path)
    again = build_policy(PeftModel.from_pretrained(base, tmp_path / "adapter"), processor)
    with torch.no_grad():
        after = again(again.pictures.prompts(ROWS, IDS, torch.device("cpu")), responses).logprobs
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)

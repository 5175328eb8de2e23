"""The contract of every family: the shared prefix is what transformers computes, decoding is `generate`, sampling
follows the softmax, pictures matter. Each test prints its worst number (`pytest -s`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from scipy.stats import chi2
from tiny_models import FAMILIES

from mmft.batch import PromptBatch, Responses
from mmft.vlm.decoder import text_decoder
from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.pictures import check_placeholders
from mmft.vlm.plain import _inputs, plain_generate
from mmft.vlm.selftest import selftest

CPU = torch.device("cpu")
GROUP = 3
# Largest error of a log-prob in bf16 on the shared prefix, against fp32 on the plain path; measured, and half as much
# again. The plain path's own error, the same or larger, is printed beside it.
BF16 = {
    "llava": 0.10,
    "llava_next": 0.07,
    "llava_onevision": 0.08,
    "smolvlm": 0.10,
    "idefics3": 0.10,
    "idefics2": 0.07,
    "qwen2_vl": 0.06,
    "qwen2_5_vl": 0.07,
    "qwen3_vl": 0.11,
    "internvl": 0.08,
    "mistral3": 0.11,
    "pixtral": 0.13,
    "gemma3": 0.12,
    "paligemma": 0.04,
    "paligemma2": 0.05,
    "blip-2": 0.04,
    "instructblip": 0.09,
    "qwen2_audio": 0.06,
}


def with_adapters(model, processor, **options):
    """A policy with adapters and a value head that do something; the same for the same model."""
    torch.manual_seed(0)
    policy = build_policy(model, processor, lora_config(model, r=4), **options)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or name == "value_head.weight":  # zero at first
            torch.nn.init.normal_(parameter, std=0.05 if "lora_B" in name else 1.0)
    return policy.eval()


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request, tiny_model) -> SimpleNamespace:
    """The same weights twice: ``shared`` on the shared prefix, ``plain`` never touched by it."""
    folder, rows = str(tiny_model(request.param)), oracle.rows_of(request.param)
    shared = with_adapters(*load_model(folder))
    plain = with_adapters(*load_model(folder), shared_prefix=False)
    assert shared.shared_prefix and not plain.shared_prefix
    return SimpleNamespace(
        family=request.param, folder=folder, shared=shared, plain=plain, rows=rows, ids=list("abcd"[: len(rows)])
    )


def prompts_of(policy, rows, ids=None) -> PromptBatch:
    return policy.pictures.prompts(rows, ids or [str(i) for i in range(len(rows))], CPU, pixels=True)


def random_responses(policy, n: int, longest: int = 7) -> Responses:
    """Ragged random responses, one of them a single token."""
    allowed = (~policy.banned).nonzero().flatten()
    stream = torch.Generator().manual_seed(1)
    ids = allowed[torch.randint(len(allowed), (n, longest), generator=stream)]
    length = torch.randint(1, longest + 1, (n,), generator=stream)
    length[0], length[1] = 1, longest
    mask = torch.arange(longest)[None] < length[:, None]
    return Responses(ids * mask, mask, torch.ones(n, dtype=torch.bool))


def worst(pair, what: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    error = float((ours - theirs).abs().max())
    print(f"\n{pair.family}: {what}: {error:.1e}")
    return error


# ---------------------------------------------------------------- numbers of given responses


def test_logprobs_are_those_of_the_model_called_row_by_row(pair):
    responses = random_responses(pair.shared, len(pair.rows) * GROUP)
    exact = oracle.logprobs(pair.plain, pair.rows, responses, 0.7)
    with torch.no_grad():
        shared, plain = (p(prompts_of(p, pair.rows), responses, 0.7, entropy=True) for p in (pair.shared, pair.plain))
    assert worst(pair, "log-probs, shared prefix against the model", shared.logprobs, exact) <= 1e-4
    assert worst(pair, "log-probs, plain path against the model", plain.logprobs, exact) <= 1e-4
    assert worst(pair, "values", shared.values, plain.values) <= 1e-4
    assert worst(pair, "entropy", shared.entropy, plain.entropy) <= 1e-4
    assert shared.logprobs[responses.mask].max() < 0 and (shared.logprobs[~responses.mask] == 0).all()


def gradients(policy, rows, responses, weights) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    out = policy(prompts_of(policy, rows), responses, entropy=True)
    ((out.logprobs + out.values + 0.1 * out.entropy) * weights * responses.mask).sum().backward()
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def worst_gradient(pair, what: str, reaches: tuple[str, ...], least: float = 0.0) -> float:
    """The largest relative error of one parameter's gradient.

    Args:
        reaches: parts of names, one of which some parameter with a gradient must have.
        least: a gradient counts as no smaller than this share of the whole one. A key's bias, for one, moves no
            softmax: its gradient is zero but for rounding.
    """
    responses = random_responses(pair.shared, len(pair.rows) * GROUP)
    weights = torch.randn(responses.mask.shape, generator=torch.Generator().manual_seed(2))
    shared, plain = (gradients(p, pair.rows, responses, weights) for p in (pair.shared, pair.plain))
    assert shared.keys() == plain.keys() and "value_head.weight" in shared
    assert any(part in name for name in shared for part in reaches)
    least = least * float(torch.stack([g.norm() for g in plain.values()]).norm()) + 1e-12
    errors = {n: float((shared[n] - plain[n]).norm() / plain[n].norm().clamp_min(least)) for n in shared}
    name = max(errors, key=errors.__getitem__)
    print(f"\n{pair.family}: {what}, relative: {errors[name]:.1e} ({name})")
    return errors[name]


def test_gradients_are_the_plain_ones(pair):
    assert worst_gradient(pair, "gradients of adapters and value head", ("lora_A",)) <= 1e-5


def test_gradients_of_every_weight_are_the_plain_ones(pair):
    """Vision tower and connector too: their features are shared by a group's responses."""
    with everything_trained(pair.shared), everything_trained(pair.plain):
        reaches = ("vision", "visual", "audio_tower")
        assert worst_gradient(pair, "gradients of all weights", reaches, least=1e-3) <= 1e-5


@contextmanager
def everything_trained(policy) -> Iterator[None]:
    frozen = [p for p in policy.parameters() if not p.requires_grad and p.is_floating_point()]
    was, policy.tower_frozen = policy.tower_frozen, False
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        policy.tower_frozen = was
        for parameter in frozen:
            parameter.requires_grad_(False)


def test_left_padding_changes_nothing(pair):
    """The plain path, prompts pushed to the right as `generate` takes them."""
    prompts, responses = prompts_of(pair.plain, pair.rows), random_responses(pair.plain, len(pair.rows))
    length, count = prompts.prompt_mask.sum(-1), responses.mask.sum(-1)
    width = int((length + count).max()) + 3  # so that every row is padded
    ids, mask, written = (torch.zeros(len(length), width, dtype=kind) for kind in (torch.long, torch.bool, torch.bool))
    for i in range(len(length)):
        row = torch.cat([prompts.prompt_ids[i, : length[i]], responses.ids[i, : count[i]]])
        ids[i, -len(row) :], mask[i, -len(row) :], written[i, -int(count[i]) :] = row, True, True
    with torch.no_grad():
        logits = pair.plain.model(
            input_ids=ids, attention_mask=mask.long(), **_inputs(pair.plain, prompts, ids, written, 1)
        ).logits
        shared = pair.shared(prompts_of(pair.shared, pair.rows), responses).logprobs
    everything = logits.masked_fill(pair.plain.banned, -torch.inf).log_softmax(-1)[:, :-1]
    left = everything.gather(-1, ids[:, 1:, None]).squeeze(-1)[written[:, 1:]]
    assert worst(pair, "log-probs, shared prefix against left padding", shared[responses.mask], left) <= 1e-4


def test_reference_is_the_model_without_adapters(pair):
    responses = random_responses(pair.shared, len(pair.rows) * GROUP)
    with torch.no_grad():
        reference = pair.shared(prompts_of(pair.shared, pair.rows), responses, reference=True).logprobs
        adapted = pair.shared(prompts_of(pair.shared, pair.rows), responses).logprobs
        with pair.plain.model.disable_adapter():
            exact = oracle.logprobs(pair.plain, pair.rows, responses)
    assert worst(pair, "reference log-probs", reference, exact) <= 1e-4
    assert (reference - adapted).abs().max() > 1e-3


@pytest.fixture(scope="session")
def in_bf16(pair):
    return with_adapters(*load_model(pair.folder, dtype="bfloat16"))


def test_bf16_stays_within_the_measured_bound(pair, in_bf16):
    responses = random_responses(pair.shared, len(pair.rows) * GROUP)
    with torch.no_grad():
        exact = pair.plain(prompts_of(pair.plain, pair.rows), responses).logprobs
        shared = in_bf16(prompts_of(in_bf16, pair.rows), responses).logprobs.float()
        in_bf16.shared_prefix = False
        plain = in_bf16(prompts_of(in_bf16, pair.rows), responses).logprobs.float()
    worst(pair, "bf16, plain path against fp32", plain, exact)
    assert worst(pair, "bf16, shared prefix against fp32", shared, exact) <= BF16[pair.family]
    mean = [float((x - exact)[responses.mask].abs().mean()) for x in (shared, plain)]
    assert mean[0] <= 1.5 * mean[1], f"mean error {mean[0]:.3g}, on the plain path {mean[1]:.3g}"


# ---------------------------------------------------------------- generation


def test_greedy_decoding_is_that_of_generate(pair):
    """Token for token, and rows that end early leave the others alone."""
    length = 8
    exact = [oracle.greedy(pair.plain, row, length) for row in pair.rows]
    ours, _ = generate(pair.shared, prompts_of(pair.shared, pair.rows), 1, length, temperature=0.0)
    assert [ids[mask].tolist() for ids, mask in zip(ours.ids, ours.mask, strict=True)] == exact
    padded, _ = plain_generate(pair.plain, prompts_of(pair.plain, pair.rows), 1, length, 0.0, seed=None)
    assert [ids[mask].tolist() for ids, mask in zip(padded.ids, padded.mask, strict=True)] == exact

    end = exact[0][2]
    ends, pair.shared.end_ids = pair.shared.end_ids, [end]
    try:
        cut, _ = generate(pair.shared, prompts_of(pair.shared, pair.rows), 1, length, temperature=0.0)
    finally:
        pair.shared.end_ids = ends
    until = [ids[: ids.index(end) + 1] if end in ids else ids for ids in exact]
    assert [ids[mask].tolist() for ids, mask in zip(cut.ids, cut.mask, strict=True)] == until
    assert cut.ended.tolist() == [end in ids for ids in exact]


def test_sampling_logprobs_and_values_are_those_of_training(pair):
    """The ratio of the first minibatch is 1."""
    prompts = prompts_of(pair.shared, pair.rows)
    responses, sampled = generate(pair.shared, prompts, GROUP, 8, 0.9, seed=3)
    with torch.no_grad():
        trained = pair.shared(prompts, responses, 0.9, entropy=True)
    ratio = (trained.logprobs - sampled.logprobs).exp()
    assert worst(pair, "first ratio - 1", ratio, torch.ones_like(ratio)) <= 1e-4
    torch.testing.assert_close(trained.values, sampled.values, atol=1e-4, rtol=0)
    torch.testing.assert_close(trained.entropy, sampled.entropy, atol=1e-4, rtol=0)


@contextmanager
def vocabulary(policy, tokens: torch.Tensor) -> Iterator[None]:
    """Only these tokens may be sampled."""
    was = policy.banned.clone(), policy.banned_ids
    policy.banned.fill_(True)[tokens] = False
    policy.banned_ids = policy.banned.nonzero().flatten()
    try:
        yield
    finally:
        policy.banned.copy_(was[0])
        policy.banned_ids = was[1]


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic of counts and its degrees of freedom; cells expected less than 5 times are one cell."""
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if len(expected) > 1 and expected[-1] < 5:
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def test_samples_follow_the_softmax(pair):
    """First tokens, and second tokens given the first, against the exact distribution over nine words and the end."""
    draws, temperature, row = 4000, 1.3, pair.rows[-1]
    with torch.no_grad():
        start = oracle.distributions(pair.plain, row, torch.empty(0, dtype=torch.long), temperature)[0]
    end = pair.plain.end_ids[0]
    start[end] = -torch.inf
    tokens = torch.cat([start.topk(9).indices, torch.tensor([end])])
    place = torch.full_like(start, -1, dtype=torch.long)
    place[tokens] = torch.arange(len(tokens))
    with vocabulary(pair.shared, tokens), vocabulary(pair.plain, tokens):
        first = oracle.distributions(pair.plain, row, tokens[:0], temperature)[0, tokens].exp().double()
        second = [oracle.distributions(pair.plain, row, t[None], temperature)[1, tokens].exp() for t in tokens]
        drawn, _ = generate(pair.shared, prompts_of(pair.shared, [row], ["r"]), draws, 2, temperature, seed=0)
    one = place[drawn.ids[:, 0]]
    assert (one >= 0).all() and torch.equal(drawn.mask[:, 1], drawn.ids[:, 0] != end)
    two = place[drawn.ids[:, 1]][drawn.mask[:, 1]]
    pairs = torch.bincount(one[drawn.mask[:, 1]] * len(tokens) + two, minlength=len(tokens) ** 2).view(len(tokens), -1)
    for name, tests in (
        ("first", [(torch.bincount(one, minlength=len(tokens)), first * draws)]),
        ("second", [(pairs[i], p.double() * pairs[i].sum()) for i, p in enumerate(second[:-1]) if pairs[i].sum() > 9]),
    ):
        statistics, freedoms = zip(*(chi_square(o.double(), e) for o, e in tests), strict=True)
        likely = float(chi2.sf(sum(statistics), sum(freedoms)))
        print(f"\n{pair.family}: {name} tokens: chi2 {sum(statistics):.1f}, {sum(freedoms)} free, p {likely:.3f}")
        assert likely > 1e-3


def test_a_row_is_sampled_alike_in_any_batch(pair):
    together, _ = generate(pair.shared, prompts_of(pair.shared, pair.rows, pair.ids), GROUP, 6, seed=5)
    alone, _ = generate(pair.shared, prompts_of(pair.shared, pair.rows[1:2], pair.ids[1:2]), GROUP, 6, seed=5)
    width = alone.ids.shape[1]
    assert torch.equal(together.ids[GROUP : 2 * GROUP, :width], alone.ids)


# ---------------------------------------------------------------- pictures


def flat(row: dict, level: int = 90) -> dict:
    """The row with nothing to be seen or heard in it: its pictures grey, its sound a constant."""
    if "audio" in row:
        return {**row, "audio": {**row["audio"], "array": np.full_like(row["audio"]["array"], level / 255)}}
    grey = [Image.new("RGB", p.size, (level, level, level)) for p in oracle.of_row(row)]
    return {"prompt": row["prompt"], "images": grey}


def test_blank_picture_changes_the_logprobs_and_selftest_passes(pair):
    responses = random_responses(pair.shared, len(pair.rows))
    with torch.no_grad():
        seen, blank = (
            pair.shared(prompts_of(pair.shared, rows), responses).logprobs
            for rows in (pair.rows, [flat(row) for row in pair.rows])
        )
    change = (seen - blank).abs().amax(-1)
    least = min(float(c) for c, row in zip(change, pair.rows, strict=True) if oracle.of_row(row))
    print(f"\n{pair.family}: blanking moves log-probs by at least {least:.2f}")
    assert least > 0.01
    assert all(c <= 1e-5 for c, row in zip(change, pair.rows, strict=True) if not oracle.of_row(row))
    result = selftest(pair.shared, prompts_of(pair.shared, pair.rows[:2]))
    assert result["logprob_error"] <= 1e-4 and result["blank_change"] > 1e-4


def test_every_picture_token_has_a_feature_and_is_encoded_once(pair):
    one, other = (flat(row, level=10) for row in pair.rows[:2])  # seen by no other test
    rows, policy = [one, other, one], pair.shared
    before = policy.pictures.encoded
    prompts = prompts_of(policy, rows)
    policy.features(prompts)
    check_placeholders(prompts, policy.pictures.token_ids)
    policy(prompts, random_responses(policy, 3))
    policy.features(policy.pictures.prompts(rows, ["x", "y", "z"], CPU))
    assert policy.pictures.encoded - before == 2

    (name, token_id), *_ = policy.pictures.token_ids.items()
    prompts.prompt_ids[1, (prompts.prompt_ids[1] == token_id).nonzero()[0]] = 5
    with pytest.raises(ValueError, match=f"row 1: .* {name} tokens in the prompt"):
        check_placeholders(prompts, policy.pictures.token_ids)


def test_cached_features_give_the_same_numbers(pair):
    responses = random_responses(pair.shared, len(pair.rows))
    rows = [flat(row, level=200) for row in pair.rows]
    with torch.no_grad():
        fresh = pair.shared(prompts_of(pair.shared, rows), responses).logprobs
        again = pair.shared.pictures.prompts(rows, pair.ids, CPU)
        # Nothing large is remembered beside the features: SmolVLM's pixel masks are megabytes a row.
        assert all(tensor.numel() <= 32 for record in again.visuals for tensor in record.tensors.values())
        cached = pair.shared(again, responses).logprobs
    assert torch.equal(fresh, cached)


def test_placeholder_text_stays_text_and_placeholders_are_never_sampled(pair):
    policy = pair.shared
    token_id = next(iter(policy.pictures.token_ids.values()))
    marker = policy.tokenizer.convert_ids_to_tokens(token_id)
    plain, hostile = ({**pair.rows[0], "prompt": f"read {word} aloud"} for word in ("that", marker))
    counts = [int((prompts_of(policy, [row]).prompt_ids == token_id).sum()) for row in (plain, hostile)]
    assert counts[0] == counts[1] > 0
    # What stands around pictures, and nowhere else.
    around = {int(i) for i in oracle.processed(pair.plain, plain)["input_ids"][0]}
    around -= {int(i) for i in oracle.processed(pair.plain, {"prompt": plain["prompt"]})["input_ids"][0]}
    around &= set(policy.tokenizer.added_tokens_decoder) - {policy.tokenizer.bos_token_id}
    print(f"\n{pair.family}: marks {policy.tokenizer.convert_ids_to_tokens(sorted(around))}")
    assert policy.banned[sorted(around)].all() and token_id in around
    responses, _ = generate(policy, prompts_of(policy, pair.rows), 8, 12, temperature=5.0, seed=0)
    assert not policy.banned[responses.ids[responses.mask]].any()


def test_a_prompt_with_another_number_of_pictures_is_refused(pair):
    row = {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]}
    with pytest.raises(ValueError, match="row q: the prompt has places for 1 pictures, the row has 0"):
        pair.shared.pictures.prompts([row], ["q"], CPU)


def test_adapters_sit_in_every_layer_of_the_decoder_and_nowhere_else(pair):
    adapted = {name.split(".lora_A")[0] for name, _ in pair.shared.named_modules() if name.endswith(".lora_A")}
    inside = text_decoder(pair.shared.model, pair.shared.family)
    linear = {
        name
        for name, module in pair.shared.named_modules()
        if hasattr(module, "lora_A") and any(module is other for other in inside.modules())
    }
    layers = inside.config.num_hidden_layers
    print(f"\n{pair.family}: {len(adapted)} layers adapted, {layers} times {len(adapted) // layers}")
    assert adapted == linear and len(adapted) % layers == 0 and len(adapted) >= 6 * layers


def test_save_and_load_give_the_same_outputs(pair, tmp_path):
    from peft import PeftModel

    from mmft.training.checkpoint import save_adapter

    responses = random_responses(pair.shared, len(pair.rows))
    save_adapter(pair.shared, tmp_path)
    base, processor = load_model(pair.folder)
    again = build_policy(PeftModel.from_pretrained(base, tmp_path / "adapter"), processor)
    with torch.no_grad():
        before, after = (p(prompts_of(p, pair.rows), responses).logprobs for p in (pair.shared, again))
    assert worst(pair, "log-probs, saved and loaded", after, before) <= 1e-6

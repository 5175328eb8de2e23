"""What the engine may do to save work, and must not change by it."""

from __future__ import annotations

import oracle
import pytest
import torch

from mmft.batch import Responses
from mmft.vlm.adapters import FoldedLora, folded
from mmft.vlm.generate import generate, invert
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.logprobs import Distribution, token_logprobs

CPU = torch.device("cpu")


@pytest.fixture(params=["llava", "qwen3_vl", "gemma3"])
def policy(request, tiny_model):
    torch.manual_seed(0)
    model, processor = load_model(str(tiny_model(request.param)))
    policy = build_policy(model, processor, lora_config(model, r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or name == "value_head.weight":
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


def prompts_of(policy):
    rows = oracle.rows_of(policy.model.config.model_type)
    return policy.pictures.prompts(rows, [str(i) for i in range(len(rows))], CPU, pixels=True)


def batch(policy, group: int = 3, longest: int = 6):
    prompts = prompts_of(policy)
    allowed = (~policy.banned).nonzero().flatten()
    stream = torch.Generator().manual_seed(1)
    n = len(prompts) * group
    ids = allowed[torch.randint(len(allowed), (n, longest), generator=stream)]
    length = torch.randint(1, longest + 1, (n,), generator=stream)
    length[0], length[1] = 1, longest
    mask = torch.arange(longest)[None] < length[:, None]
    return prompts, Responses(ids * mask, mask, torch.ones(n, dtype=torch.bool))


def gradients(policy, prompts, responses):
    policy.zero_grad()
    out = policy(prompts, responses)
    (out.logprobs.sum() + out.values.square().sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_checkpointed_activations_give_the_same_gradients(policy):
    prompts, responses = batch(policy)
    policy.train()
    plain = gradients(policy, prompts, responses)
    policy.checkpoint_activations()
    again = gradients(policy, prompts, responses)
    assert plain.keys() == again.keys() and len(plain) > 4
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_checkpointing_really_runs_the_layers_again(policy):
    prompts, responses = batch(policy)
    policy.train()
    policy.checkpoint_activations()
    from mmft.vlm.decoder import text_decoder

    runs = []
    text_decoder(policy.model, policy.family).layers[-1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients(policy, prompts, responses)
    assert len(runs) == 2


def test_compiled_layers_give_the_same_gradients_and_samples(policy):
    """Traced, but without the compiler behind it, which takes minutes: what could change is in the tracing."""
    torch._dynamo.reset()  # one count of recompilations for all families: the last ones would run untraced
    prompts, responses = batch(policy)
    plain, written = gradients(policy, prompts, responses), generate(policy, prompts, 2, 5, seed=3)[0]
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    policy.compile_decoder(as_it_is)
    again = gradients(policy, prompts, responses)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert torch.equal(generate(policy, prompts, 2, 5, seed=3)[0].ids, written.ids)
    assert graphs


def test_responses_of_one_token_need_nothing_but_their_prompts(policy):
    prompts, responses = batch(policy, group=2, longest=3)
    one = Responses(responses.ids[:, :1], responses.mask[:, :1], responses.ended)
    with torch.no_grad():
        alone, first = policy(prompts, one).logprobs, policy(prompts, responses).logprobs[:, :1]
    torch.testing.assert_close(alone, first, atol=1e-5, rtol=0)


def test_long_responses_outgrow_their_room_and_prompts_leave(policy):
    """More tokens than the first room of the cache, with prompts that end at different times."""
    prompts = prompts_of(policy)
    responses, sampled = generate(policy, prompts, 2, 70, temperature=1.0, seed=4)
    assert responses.mask.sum(-1).max() > 40
    with torch.no_grad():
        trained = policy(prompts, responses)
    torch.testing.assert_close(trained.logprobs, sampled.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(trained.values, sampled.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", ["many", "few"])  # for many one product is cheaper, for few two more thin ones
def test_folded_adapters_are_the_adapters(policy, tokens):
    layers = [module for module in policy.model.modules() if isinstance(module, FoldedLora)]
    assert layers
    for layer in layers:
        inside, outside = layer.base_layer.weight.shape[1], layer.base_layer.weight.shape[0]
        x = torch.randn(inside + outside if tokens == "many" else 4, inside, requires_grad=True)
        weights = torch.randn(len(x), outside)

        def derivatives(forward, layer=layer, x=x, weights=weights):
            layer.zero_grad()
            x.grad = None
            y = forward(x)
            (y * weights).sum().backward()
            return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]

        theirs = derivatives(super(FoldedLora, layer).forward)
        for ours, expected in zip(derivatives(layer), theirs, strict=True):
            assert (ours - expected).norm() <= 1e-5 * expected.norm()
        with folded(policy.model, rows=2), torch.no_grad():
            torch.testing.assert_close(layer(x[:2]), theirs[0][:2], atol=1e-4, rtol=1e-5)
        assert layer.folded is None


@pytest.mark.parametrize("keep", [True, False])
def test_fused_logprobs_have_the_gradients_of_log_softmax(keep, monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, targets, banned = torch.randn(12, 8, requires_grad=True), torch.randint(3, 50, (12,)), torch.tensor([0, 2])
    monkeypatch.setattr("mmft.vlm.logprobs.CHUNK_BYTES", 5 * 50 * 4)  # three chunks
    if not keep:
        monkeypatch.setattr("mmft.vlm.logprobs.KEPT_BYTES", 0)
    weights = torch.randn(12)

    def run(function):
        head.zero_grad()
        hidden.grad = None
        logprobs = function()
        (logprobs * weights).sum().backward()
        return logprobs.detach(), hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()

    def plain():
        logits = (head(hidden) / 0.7).index_fill(-1, banned, float("-inf"))
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    fused = run(lambda: token_logprobs(Distribution(head, banned, 0.7), hidden, targets)[0])
    for ours, expected in zip(fused, run(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [3, 64, 65, 1000])
def test_tokens_are_drawn_where_the_running_sum_passes_the_draw(vocabulary):
    stream = torch.Generator().manual_seed(0)
    weights = torch.rand(200, vocabulary, generator=stream)
    weights[:, vocabulary // 2 :: 2] = 0.0
    uniforms = torch.rand(200, generator=stream, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    cumulative = weights.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    drawn = invert(weights, uniforms)
    assert torch.equal(drawn[2:], expected[2:])
    assert (weights.gather(-1, drawn) > 0).all()

"""oneDNN's products are torch's, and the engine gives the same with them. Forced on: no test has a layer so large."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.nn import functional

from mmft.batch import Responses
from mmft.vlm import products
from mmft.vlm.adapters import FoldedLora, folded
from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, load_model, lora_config


@pytest.fixture
def forced(monkeypatch):
    """Every product by oneDNN; a list of the shapes of their weights."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch was built without oneDNN")
    used, product = [], products._product
    monkeypatch.setattr(products, "_HERE", True)
    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(products, "_product", lambda x, w, c: used.append(tuple(w.shape)) or product(x, w, c))
    return used


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "transposed", "strided input", "strided gradient"])
def test_values_and_gradients(forced, shape, bias, kind):
    torch.manual_seed(0)
    weight = torch.randn(24, 40).t() if kind == "transposed" else torch.randn(40, 24)
    x = torch.randn(*shape[:-1], 48)[..., ::2] if kind == "strided input" else torch.randn(shape)
    leaves = [weight.requires_grad_(), x.requires_grad_()] + ([torch.randn(40, requires_grad=True)] if bias else [])

    def derivatives(function):
        y = function(leaves[1], leaves[0], leaves[2] if bias else None)
        loss = y.sum() if kind == "strided gradient" else y.square().sum()  # of a sum it is one number, expanded
        return [y, *torch.autograd.grad(loss, leaves)]

    ours = derivatives(products.linear)
    assert forced
    for found, expected in zip(ours, derivatives(functional.linear), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_a_bias_alone_gets_its_gradient(forced):
    bias = torch.zeros(5, requires_grad=True)
    products.linear(torch.randn(3, 4), torch.randn(5, 4), bias).sum().backward()
    assert forced and torch.equal(bias.grad, torch.full((5,), 3.0))


def test_a_frozen_weight_keeps_no_input_for_the_backward_pass(forced):
    """The inputs of all frozen layers would be most of the activations."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        products.linear(torch.randn(7, 4, requires_grad=True), torch.randn(5, 4))
    assert forced and kept == [(5, 4)]


def test_a_ghost_s_weights_and_a_gpu_s_are_not_packed(forced):
    """`mmft doctor memory` plans with weights that are not there; a GPU's host may have an AMD CPU."""
    weight = torch.empty(40, 24, device="meta")
    assert products.packed(weight, 16) is weight


def test_packed_weights(forced):
    weight, bias = torch.randn(40, 24), torch.randn(40)
    for rows in (1, 16, 300):  # packed for 16
        x = torch.randn(rows, 24)
        found = products.linear(x, products.packed(weight, 16), bias)
        torch.testing.assert_close(found, functional.linear(x, weight, bias), atol=1e-4, rtol=1e-5)


def test_what_is_not_for_it_goes_torchs_way(forced):
    x, weight = torch.randn(3, 8), torch.randn(8, 8)
    products.linear(x.bfloat16(), weight.bfloat16())
    products.linear(x[:0], weight)
    products.linear(x[0], weight.requires_grad_()).sum().backward()
    weight.requires_grad_(False)
    products.linear(x, torch.randn(8, 16)[:, ::2])
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert not forced


def test_compiled_layers_are_not_given_packed_weights(forced, tiny_model):
    """What `torch.compile` traces would take them for ordinary tensors, and fail."""
    model, processor = load_model(str(tiny_model("llava")))
    policy = build_policy(model, processor, lora_config(model, r=4))
    layers = [module for module in policy.model.modules() if isinstance(module, FoldedLora)]
    with folded(policy.model, rows=2):
        assert layers and all(layer.folded.is_mkldnn for layer in layers)
    policy.compile_decoder(lambda graph, inputs: graph.forward)
    with folded(policy.model, rows=2):
        assert not any(layer.folded.is_mkldnn for layer in layers)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_5_vl", "paligemma"])
def test_the_engine_gives_the_same(family, tiny_model, request):
    """Log-probs, gradients of all that trains, and sampled tokens."""
    torch.manual_seed(0)
    model, processor = load_model(str(tiny_model(family)))
    policy = build_policy(model, processor, lora_config(model, r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or name == "value_head.weight":
            torch.nn.init.normal_(parameter, std=0.05)
    rows = oracle.rows_of(policy.model.config.model_type)
    prompts = policy.pictures.prompts(rows, [str(i) for i in range(len(rows))], torch.device("cpu"), pixels=True)
    n = 2 * len(prompts)
    allowed = (~policy.banned).nonzero().flatten()
    ids = allowed[torch.arange(n * 5).view(n, 5) % len(allowed)]
    responses = Responses(ids, torch.ones(n, 5, dtype=torch.bool), torch.ones(n, dtype=torch.bool))

    def outcome():
        policy.zero_grad()
        policy.pictures.forget()  # features are computed anew
        out = policy(prompts, responses)
        (out.logprobs.sum() + out.values.square().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        return out.logprobs.detach(), gradients, generate(policy, prompts, 2, 6, seed=3)[0].ids

    with pytest.MonkeyPatch.context() as without:
        without.setattr(products, "_HERE", False)
        expected = outcome()
    used = request.getfixturevalue("forced")
    found = outcome()
    assert len(used) > 20
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 4
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    assert torch.equal(found[2], expected[2])

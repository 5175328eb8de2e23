"""What is trained by each mode of ``model.tune``, and what the reference is meanwhile; weights in 4 and 8 bits."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import oracle
import pytest
import torch
from peft import PeftModel

from mmft.batch import Responses
from mmft.recipe.sections import Model
from mmft.training.checkpoint import save_adapter
from mmft.vlm.adapters import FoldedLora
from mmft.vlm.decoder import text_decoder
from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, connectors, load_model, train_last_layers, tune
from mmft.vlm.selftest import selftest

FAMILIES = ("llava", "smolvlm", "qwen3_vl")
MODES = {
    "frozen": {"tune": "frozen", "trained_layers": 1},
    "hybrid": {"tune": "hybrid", "lora": {"r": 4}},
    "dora": {"lora": {"r": 4, "dora": True}},
    "rslora": {"lora": {"r": 4, "rslora": True}},
}
CPU = torch.device("cpu")
ROWS = oracle.PICTURES[:2]
GROUP = 3


def policy_of(folder, options: dict, critic: str = "head", **loading):
    torch.manual_seed(0)
    model, processor = load_model(str(folder), **loading)
    return build_policy(model, processor, tune(model, Model(**options)), critic)


def prompts_of(policy):
    return policy.pictures.prompts(ROWS, ["0", "1"], CPU)


def responses_of(policy, length: int = 5) -> Responses:
    n = len(ROWS) * GROUP
    ids = torch.randint(5, 60, (n, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length)[None] < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    return Responses(ids * mask, mask, torch.zeros(n, dtype=torch.bool))


def learn(policy, steps: int = 2) -> None:
    """A few steps up the responses' likelihood, of everything that is trainable."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        out = policy(prompts_of(policy), responses_of(policy))
        (-out.logprobs.sum() + (out.values - 1).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def expected(policy, mode: str) -> set[str]:
    """Names of what the mode is to train, found another way than by `tune`."""
    names = {n for n, _ in policy.named_parameters()}
    head = {n for n in names if n.startswith("value_head")}
    if mode == "frozen":
        last = max(int(n.split(".layers.")[1].split(".")[0]) for n in names if _of_decoder(n) and ".layers." in n)
        return head | {n for n in names if _of_decoder(n) and (f".layers.{last}." in n or ".norm." in n)}
    found = {n for n in names if "lora_" in n}
    if mode == "hybrid":
        found |= {n for n in names if ".modules_to_save." in n}
    return head | found


def _of_decoder(name: str) -> bool:
    return "language_model." in name or "text_model." in name


@pytest.fixture(scope="module", params=[(f, m) for f in FAMILIES for m in MODES], ids=lambda p: "-".join(p))
def trained(request, tiny_model):
    """A policy of a family and mode, before and after it has learned."""
    family, mode = request.param
    policy = policy_of(tiny_model(family), MODES[mode])
    before = copy.deepcopy(policy.state_dict())
    with torch.no_grad():
        start = policy(prompts_of(policy), responses_of(policy)).logprobs
    learn(policy)
    return family, mode, policy, before, start


def test_only_what_the_mode_names_moves(trained):
    family, mode, policy, before, _ = trained
    after = policy.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    wanted = expected(policy, mode)
    trainable = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trainable == wanted
    # A bias of keys moves all scores of a query alike: softmax has no gradient for it.
    assert moved <= wanted and all("k_proj.bias" in n for n in wanted - moved)
    connector = {n for n in wanted if ".modules_to_save." in n}
    assert bool(connector) == (mode == "hybrid")
    assert any("lora_magnitude_vector" in n for n in wanted) == (mode == "dora")


def test_the_reference_stays_the_model_it_started_from(trained):
    """Bitwise; of hybrid with the connector it came with, of frozen with the layers it came with."""
    _, _, policy, _, start = trained
    with torch.no_grad():
        reference = policy(prompts_of(policy), responses_of(policy), reference=True).logprobs
        now = policy(prompts_of(policy), responses_of(policy)).logprobs
    # Folded layers are another order of summation.
    torch.testing.assert_close(reference, start, atol=2e-5, rtol=0)
    assert (now - start).abs().max() > 1e-2
    learn(policy, 1)
    with torch.no_grad():
        assert torch.equal(reference, policy(prompts_of(policy), responses_of(policy), reference=True).logprobs)


def test_sampling_training_and_the_models_own_forward_agree(trained):
    _, _, policy, _, _ = trained
    prompts = policy.pictures.prompts(ROWS, ["0", "1"], CPU, pixels=True)
    result = selftest(policy, prompts)
    assert policy.shared_prefix and result["logprob_error"] <= 1e-4 and result["own_error"] <= 1e-4
    policy.eval()
    with torch.no_grad():
        responses, sampled = generate(policy, prompts_of(policy), GROUP, 6, 0.9, seed=3)
        again = policy(prompts_of(policy), responses, 0.9).logprobs
        exact = oracle.logprobs(policy, ROWS, responses, 0.9)
    torch.testing.assert_close(again, sampled.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(again, exact, atol=1e-4, rtol=0)


def test_saved_and_loaded_by_plain_libraries_it_says_the_same(trained, tiny_model, tmp_path):
    family, mode, policy, _, _ = trained
    save_adapter(policy, tmp_path)
    if mode == "frozen":
        policy.processor.save_pretrained(tmp_path / "model")
        again = build_policy(*load_model(str(tmp_path / "model")), needs_reference=False)
    else:
        base, processor = load_model(str(tiny_model(family)))
        again = build_policy(PeftModel.from_pretrained(base, tmp_path / "adapter"), processor)
    policy.eval()
    with torch.no_grad():
        before, after = (p(prompts_of(p), responses_of(p)).logprobs for p in (policy, again.eval()))
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


def test_the_frozen_reference_shares_all_that_is_not_trained(tiny_model):
    policy = policy_of(tiny_model("llava"), MODES["frozen"])
    (reference,) = policy._reference
    own = {id(p) for p in policy.model.parameters()}
    copied = sum(p.numel() for p in reference.parameters() if id(p) not in own)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert copied == trained < sum(p.numel() for p in policy.model.parameters()) / 3
    policy.to(torch.bfloat16)  # both come along, and still share
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in reference.parameters() if id(p) not in own) == trained


def test_features_behind_a_trained_connector_are_never_remembered(tiny_model):
    """The same rows again after the connector moved, on a record that was encoded before, and adapters off."""
    policy = policy_of(tiny_model("llava"), MODES["hybrid"]).eval()
    prompts, responses = prompts_of(policy), responses_of(policy)
    with torch.no_grad():
        first = policy(prompts, responses).logprobs
        reference = policy(prompts, responses, reference=True).logprobs
        for name, parameter in policy.named_parameters():
            if ".modules_to_save." in name:
                parameter.mul_(1.5)
        second = policy(prompts, responses).logprobs
        exact = oracle.logprobs(policy, ROWS, responses)
        assert (second - first).abs().max() > 1e-2
        torch.testing.assert_close(second, exact, atol=1e-4, rtol=0)
        assert torch.equal(policy(prompts, responses, reference=True).logprobs, reference)
    assert not policy.tower_frozen and len(policy.pictures.cache) == 0


def test_rslora_is_scaled_by_the_root_of_the_rank_and_folds(tiny_model):
    policy = policy_of(tiny_model("llava"), {"lora": {"r": 4, "alpha": 8, "rslora": True}})
    layers = [m for m in policy.modules() if isinstance(m, FoldedLora)]
    assert layers and {m.scaling["default"] for m in layers} == {4.0}
    layer = layers[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(200, layer.in_features)
    plain = layer.base_layer(x) + 4.0 * layer.lora_B["default"](layer.lora_A["default"](x))
    torch.testing.assert_close(layer(x), plain, atol=1e-4, rtol=1e-4)


def test_dora_is_not_folded(tiny_model):
    """Its product is W + s B A with rows of another length: folding it as LoRA's would be another model."""
    policy = policy_of(tiny_model("llava"), MODES["dora"])
    layer = next(m for m in policy.modules() if isinstance(m, FoldedLora))
    assert layer.fold() is None and not layer._foldable(layer.base_layer.weight)


def test_what_a_mode_cannot_do_is_said(tiny_model):
    model, _ = load_model(str(tiny_model("llava")))
    with pytest.raises(ValueError, match="model.trained_layers: got 7, the model has 2 layers"):
        train_last_layers(model, 7)
    model.model.multi_modal_projector = torch.nn.Identity()
    del model.model.multi_modal_projector
    with pytest.raises(ValueError, match="model.tune: hybrid trains the connector, and a 'llava' model has none"):
        tune(model, Model(tune="hybrid"))


# ---------------------------------------------------------------- 4 and 8 bits


@pytest.fixture(scope="module", params=[("llava", "nf4"), ("smolvlm", "int8"), ("qwen3_vl", "nf4")], ids="-".join)
def quantised(request, tiny_model):
    pytest.importorskip("bitsandbytes")
    family, kind = request.param
    policy = policy_of(tiny_model(family), {"tune": "hybrid", "lora": {"r": 4}}, quantize=kind)
    return family, policy


def test_towers_and_decoder_are_quantised_head_and_connector_are_not(quantised):
    _, policy = quantised
    kinds = {n: type(m).__name__ for n, m in policy.named_modules() if isinstance(m, torch.nn.Linear)}
    in_bits = {n for n, kind in kinds.items() if kind in ("Linear4bit", "Linear8bitLt")}
    full = {n for n in kinds if n not in in_bits and "lora_" not in n and not n.startswith("value_head")}
    assert any("vision" in n or "visual" in n for n in in_bits)
    layers = text_decoder(policy.model, policy.family).layers
    of_decoder = {id(m) for m in layers.modules() if isinstance(m, torch.nn.Linear)}
    assert sum(id(m) in of_decoder for n, m in policy.named_modules() if n in in_bits) == 7 * len(layers)
    assert all("lm_head" in n or "projector" in n or "connector" in n or "merger" in n for n in full), full


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_dora_learns_on_quantised_weights(kind, tiny_model):
    """PEFT puts the weights back in each pass; in 8 bits bitsandbytes then has no scales for the next."""
    pytest.importorskip("bitsandbytes")
    policy = policy_of(tiny_model("llava"), MODES["dora"], quantize=kind)
    with torch.no_grad():
        first, again = (policy(prompts_of(policy), responses_of(policy)).logprobs for _ in range(2))
    assert torch.equal(first, again)
    learn(policy)
    assert all(p.abs().max() > 0 for n, p in policy.named_parameters() if "lora_B" in n)


def test_quantised_weights_are_learned_on_and_stay_as_they_are(quantised, tiny_model, tmp_path):
    """Adapters and connector learn, every gradient reaches the first layer, and the adapter loads onto full weights."""
    family, policy = quantised
    frozen = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    prompts = policy.pictures.prompts(ROWS, ["0", "1"], CPU, pixels=True)
    result = selftest(policy, prompts)
    assert result["own_error"] <= 1e-4 and result["logprob_error"] <= 1e-4
    responses, sampled = generate(policy, prompts, 1, 4, 1.0, seed=0)  # in evaluation mode, without gradient, first
    policy.train()
    with torch.no_grad():
        start = policy(prompts_of(policy), responses_of(policy)).logprobs
        torch.testing.assert_close(policy(prompts, responses).logprobs, sampled.logprobs, atol=1e-4, rtol=0)
    learn(policy)
    grown = {n for n, p in policy.named_parameters() if "lora_B" in n and bool(p.abs().max() > 0)}
    assert grown == {n for n, _ in policy.named_parameters() if "lora_B" in n}
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)
    with torch.no_grad():
        reference = policy(prompts_of(policy), responses_of(policy), reference=True).logprobs
        now = policy(prompts_of(policy), responses_of(policy)).logprobs
    torch.testing.assert_close(reference, start, atol=1e-3, rtol=0)
    save_adapter(policy, tmp_path)
    base, processor = load_model(str(tiny_model(family)))
    again = build_policy(PeftModel.from_pretrained(base, tmp_path / "adapter"), processor)
    weights, loaded = ({n: p for n, p in x.model.named_parameters() if "lora_" in n} for x in (policy, again))
    assert weights.keys() == loaded.keys() and all(torch.equal(weights[n], loaded[n]) for n in weights)
    with torch.no_grad():
        full = again(prompts_of(again), responses_of(again)).logprobs
    error, moved = (full - now).abs().mean(), (now - start).abs().mean()
    print(f"\n{family}: learned {moved:.3f} nats, on the unquantised base {error:.3f} away")
    assert error < moved / 2


def test_a_quantised_model_does_not_keep_its_file_in_memory(tiny_model):
    """A mapped file counts as memory when it is read, and stays for as long as one tensor still lies in it."""
    pytest.importorskip("bitsandbytes")
    folder = str(tiny_model("internvl"))

    def mapped() -> bool:
        return folder in Path("/proc/self/maps").read_text()

    plain = load_model(folder)
    assert mapped()
    del plain
    gc.collect()
    assert not mapped()
    model, _ = load_model(folder, "nf4")
    assert not mapped() and next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("smolvlm", ["connector"]),
        ("qwen3_vl", ["visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1"]),
        ("blip-2", ["language_projection"]),
    ],
)
def test_a_connector_is_all_of_what_stands_between_tower_and_decoder(tiny_model, family, paths):
    assert connectors(load_model(str(tiny_model(family)))[0]) == paths

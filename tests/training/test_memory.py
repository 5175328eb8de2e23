"""The memory planner: what it counts is what torch allocates, and what is added to it is right by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmft.cli import main
from mmft.recipe import load_recipe
from mmft.training import memory
from mmft.training.config import PPOConfig
from mmft.training.memory_trace import Ghosts, QuantisedLinear, _rollout, ghost_policy, probe_prompt, trace_step
from mmft.training.update import microbatch_loss
from mmft.vlm.load import build_policy, load_model, tune

RECIPE = "recipes/caption_ppo.yaml"
MODES = ("lora", "full", "frozen", "hybrid")
FEW = ["data.train_rows=8", "eval.rows=2", "rollout.max_completion_length=6"]


def recipe_of(name, *overrides):
    return load_recipe(RECIPE, [f"model.name={name}", *FEW, *overrides])


def rows(count: int = 2):
    from mmft.data import load_rows

    found = load_rows("scenes", "train", count)
    return [found[i] for i in range(count)]


def allocated(run) -> int:
    """Most bytes of tensors alive at once while ``run`` goes, as torch's own profiler records them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [("lora", False), ("lora", True), ("full", False), ("full", True), ("frozen", False), ("hybrid", False)],
)
def test_an_update_takes_what_the_trace_says(tiny_model, mode, checkpointing):
    name = str(tiny_model("llava"))
    recipe = recipe_of(
        name,
        f"model.tune={mode}",
        "model.trained_layers=1",
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
    )
    config = PPOConfig(prompts_per_step=2, num_generations=4, max_completion_length=24, eval_rows=1)
    ghost = ghost_policy(recipe)
    trace = trace_step(ghost, config, probe_prompt(ghost, rows(1)), 2)
    found = next(segment.peak for segment in trace.segments if segment.phase == "update")

    model, processor = load_model(name)
    policy = build_policy(model, processor, tune(model, recipe.model))
    if checkpointing:
        policy.checkpoint_activations()
    policy.train()
    prompts = policy.pictures.prompts(rows(1) * 2, ["a@0", "b@1"], policy.device)
    prompts.visuals[1].key = "another"  # the planner takes every picture to be new
    policy.features(prompts)
    part = _rollout(prompts, config, policy)

    def update():
        loss, _ = microbatch_loss(policy, part, [0, 1], config, 1.0)
        loss.backward()

    assert sum(found.values()) == pytest.approx(allocated(update), rel=0.05)


def test_masks_are_real_and_numbers_are_not():
    with Ghosts(vocabulary=7) as ghosts, ghosts.phase("x"):
        x = torch.zeros(4, 3)
        mask = torch.tensor([True, False, True, False])
        picked = x[mask]
        assert picked.shape == (2, 3) and picked.device.type == "meta"
        assert torch.arange(4)[mask].tolist() == [0, 2]
        assert bool(torch.isfinite(x).all())
        y = torch.zeros(5, 7)
        del y
        assert ghosts.live["logits"] == 0
    segment = next(s for s in ghosts.segments if s.phase == "x")
    assert segment.peak["logits"] == 5 * 7 * 4
    assert segment.peak["activations"] >= 4 * 3 * 4 + 2 * 3 * 4


def test_quantised_layers_have_the_size_of_bitsandbytes_ones():
    layer = nn.Linear(128, 256, device="meta")
    assert QuantisedLinear(layer, "nf4").weight.nbytes == 16384 + 512 + 8
    assert QuantisedLinear(layer, "int8").weight.nbytes == 32768 + 1024


def test_what_ranks_share():
    gradients, moments = 100, 200
    assert memory._share(gradients, moments, 100, ranks=1, zero=0) == 300
    assert memory._share(gradients, moments, 100, ranks=4, zero=0) == 400  # DDP's buckets
    assert memory._share(gradients, moments, 100, ranks=4, zero=1) == 150
    assert memory._share(gradients, moments, 100, ranks=4, zero=2) == 75
    assert memory._share(0, moments, 100, ranks=4, zero=3) == 50  # in a phase without gradients


def test_moments_in_8_bits_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weights = [nn.Parameter(torch.randn(80, 64)), nn.Parameter(torch.randn(30))]
    optimizer = bitsandbytes.optim.AdamW8bit(weights)
    sum(w.square().sum() for w in weights).backward()
    optimizer.step()
    held = [
        v for w in weights for k, v in optimizer.state[w].items() if k in ("state1", "state2", "absmax1", "absmax2")
    ]
    assert memory.moments("adamw_8bit", weights) == sum(v.nbytes for v in held)
    assert memory.moments("adamw", weights) == 2 * 4 * (80 * 64 + 30) and memory.moments("sgd", weights) == 0


def test_the_reference_of_frozen_counts_copies_alone_and_adapters_count_apart(tiny_model):
    name = str(tiny_model("llava"))
    of = {mode: ghost_policy(recipe_of(name, f"model.tune={mode}", "model.trained_layers=1")) for mode in MODES}
    sizes = {mode: memory._weights(recipe_of(name), policy, "cpu")[0] for mode, policy in of.items()}
    trained = {mode: sum(p.nbytes for p in policy.model.parameters() if p.requires_grad) for mode, policy in of.items()}
    assert sizes["lora"] == sizes["hybrid"] == sizes["full"] / 2 == trained["full"]
    assert sizes["frozen"] == sizes["lora"] + trained["frozen"]


def test_a_token_of_the_cache():
    text = SimpleNamespace(num_key_value_heads=3, head_dim=64, num_hidden_layers=30)
    config = SimpleNamespace(get_text_config=lambda: text)
    policy = SimpleNamespace(model=SimpleNamespace(config=config, dtype=torch.float32))
    assert memory._cache_bytes(policy) == 46080  # 2 * 30 layers * 3 heads * 64 * 4 bytes


def test_longer_responses_and_larger_microbatches_cost_what_they_hold(tiny_model):
    name = str(tiny_model("llava"))
    peaks = {}
    for micro in (1, 2):
        recipe = recipe_of(name, f"train.micro_prompts={micro}", "rollout.prompts_per_step=4")
        plan = memory.plan_memory(recipe, base=1 << 30, rows=1)
        peaks[micro] = next(p for p in plan.phases if p.name == "update").activations
    assert 1.6 < peaks[2] / peaks[1] <= 2.05


def test_the_command(tiny_model, tmp_path, capsys):
    words = ["doctor", "memory", RECIPE, f"model.name={tiny_model('llava')}", *FEW, "--rows", "1"]
    assert main([*words, "--device-gib", "8", "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "reference" in shown and "fits into the 8.0 GiB of this GPU" in shown
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["peak"] == max(phase["total"] for phase in plan["phases"])
    assert main([*words, "--device-gib", "0.01"]) == 1
    assert main([*words, "--device-gib", "8", "--ranks", "5"]) == 2
    assert "cannot be shared evenly by 5 ranks" in capsys.readouterr().err

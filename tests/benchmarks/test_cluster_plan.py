"""The plan past this machine: counts against transformers, memory against the ZeRO paper and the planner's trace,
waiting against drawn responses, and identities that hold on any machine."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import _calibrate, _work, cluster_plan
from benchmarks._cluster import GB, NF4, Job, Lengths, Link, Machine, normal_maximum, weight_bytes
from benchmarks._cluster_memory import memory, peak
from benchmarks._cluster_models import MEASURED, MODELS
from benchmarks._cluster_search import fastest, fastest_served
from benchmarks._cluster_time import Decoder, gather_seconds, reduce_seconds, seconds, volumes
from benchmarks.cluster_plan import H100
from mmft.vlm.load import BUNDLED

SEVEN = MODELS["Qwen2.5-VL-7B"]
SMALL = MODELS["SmolVLM-256M"]
# A machine on which nothing takes time but what a test asks about.
FREE = Machine("free", 1e18, ((1, 1e30),), 1e30, 1e30, 0.0, 0.0, True, 8, Link(1e30, 0.0), Link(1e30, 0.0))


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name: str, tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForMultimodalLM

    model = MODELS[name]
    config = AutoConfig.from_pretrained(cluster_plan.ghost_folder(model, tmp_path))
    config.text_config.vocab_size, config.text_config.pad_token_id = model.vocabulary, None
    with torch.device("meta"):
        made = AutoModelForMultimodalLM.from_config(config)
    made.tie_weights()
    assert sum(p.numel() for p in {id(p): p for p in made.parameters()}.values()) == model.parameters


@pytest.mark.parametrize("name", ["SmolVLM-256M", "Qwen2.5-VL-7B"])
def test_nf4_packs_what_the_loader_packs(name: str, tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForMultimodalLM

    from mmft.vlm.quantised import IN_FULL

    model = MODELS[name]
    with torch.device("meta"):
        made = AutoModelForMultimodalLM.from_config(
            AutoConfig.from_pretrained(cluster_plan.ghost_folder(model, tmp_path))
        )
    layers = {n: m for n, m in made.named_modules() if type(m) is torch.nn.Linear}
    packed = sum(m.weight.numel() for n, m in layers.items() if not any(re.match(whole, n) for whole in IN_FULL))
    assert weight_bytes(model, Job(quantize=True)) == packed * NF4 + (model.parameters - packed) * 2


def test_layers_and_adapters_are_those_that_work_is_counted_from() -> None:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForMultimodalLM

    from mmft.vlm.load import lora_config

    with torch.device("meta"):
        made = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(BUNDLED["scenes-vlm"]))
        made = get_peft_model(made, lora_config(made))
    model = MEASURED["bundled"]
    key = lambda x: (x.inner, x.outer, x.rank, x.first, x.last)  # noqa: E731
    assert sorted(model.linears(16), key=key) == sorted(_work._linears(made), key=key)
    assert model.adapters(16) == sum(p.numel() for n, p in made.named_parameters() if "lora_" in n)


# ---------------------------------------------------------------- memory


def _states(job: Job) -> float:
    kinds = memory(SEVEN, job)["update"]
    return sum(kinds[k] for k in ("weights", "gradients", "optimizer")) / SEVEN.parameters


def test_model_states_are_those_of_the_zero_paper() -> None:
    # Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB.
    job = Job(gpus=64, tune="full", kl=False, prompts=64)
    assert _states(replace(job, gpus=1)) == pytest.approx(120 / 7.5)
    assert _states(replace(job, zero=1)) == pytest.approx(31.4 / 7.5, abs=0.01)
    assert _states(replace(job, zero=2)) == pytest.approx(16.6 / 7.5, abs=0.01)
    gathered = 2 * GB / SEVEN.parameters  # what ZeRO-3 holds whole besides, which the figure leaves out
    assert _states(replace(job, zero=3)) == pytest.approx(1.9 / 7.5 + gathered, abs=0.01)


def test_shards_vanish_with_many_gpus_and_activations_stay() -> None:
    few, many = (memory(SEVEN, Job(gpus=n, zero=3, tune="full", prompts=n, kl=False))["update"] for n in (8, 1 << 20))
    assert many["optimizer"] + many["gradients"] < 1e-4 * (few["optimizer"] + few["gradients"])
    assert many["weights"] == pytest.approx(2 * GB, rel=1e-3)  # gathered: 10^9 parameters
    assert many["activations"] == few["activations"] > 0


def test_rollout_holds_the_whole_model_under_zero_3() -> None:
    assert memory(SEVEN, Job(gpus=64, zero=3, prompts=64))["rollout"]["weights"] == 2 * SEVEN.parameters


@pytest.mark.parametrize("micro", [1, 8])
def test_closed_memory_is_near_the_planners_trace(micro: int) -> None:
    job = Job(prompts=16, micro=micro, lengths=Lengths(16, 16, 0.0), itemsize=4, folds=True)
    closed, seen = cluster_plan.traced("bundled", job, BUNDLED["scenes-vlm"])
    assert closed == pytest.approx(seen, rel=0.2)


def test_checkpointing_trades_memory_for_a_forward_pass() -> None:
    job = Job(prompts=8, micro=4)
    light = replace(job, checkpointing=True)
    assert peak(SEVEN, light) < peak(SEVEN, job)
    plain, again = (seconds(SEVEN, j, replace(H100, host=0.0, host_update=0.0)) for j in (job, light))
    assert again["backward"] - plain["backward"] == pytest.approx(plain["forward"])


# ---------------------------------------------------------------- communication


def test_ring_by_hand() -> None:
    machine = replace(FREE, inside=Link(100.0, 1.0), across=Link(5.0, 10.0))
    assert gather_seconds(machine, 1, 800.0) == reduce_seconds(machine, 1, 800.0) == 0.0
    assert gather_seconds(machine, 4, 800.0) == pytest.approx(3 + 3 / 4 * 800 / 100)
    # Two nodes: eight adapters of 5 each carry 40, below the 100 inside; 2 hops across, 14 inside.
    assert gather_seconds(machine, 16, 800.0) == pytest.approx(2 * 10 + 14 + 15 / 16 * 800 / 40)
    # An all-reduce moves twice the bytes; two trees, up and down: 1 hop across and 7 inside each.
    assert reduce_seconds(machine, 16, 800.0) == pytest.approx(2 * (10 + 7) + 2 * 15 / 16 * 800 / 40)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_one_gpu_communicates_nothing(tune: str, zero: int) -> None:
    job = Job(gpus=1, zero=zero, tune=tune, prompts=4)
    assert set(volumes(SEVEN, job).values()) == {0.0}
    found = seconds(SEVEN, job, H100)
    assert found["communication"] == found["gather"] == found["waiting"] == 0.0


def test_volumes_are_those_of_the_zero_paper() -> None:
    # Section 7: stages 1 and 2 move what data parallelism moves, stage 3 one and a half times that.
    def passed(zero: int) -> float:
        v = volumes(SEVEN, Job(gpus=8, zero=zero, tune="full", prompts=8))
        return 2 * v["reduce"] + v["scatter"] + v["gather"]

    assert passed(1) == passed(2) == passed(0)
    assert passed(3) == pytest.approx(1.5 * passed(0))
    # Of four microbatches stage 2 scatters four gradients, stage 1 their sum.
    several = [volumes(SEVEN, Job(gpus=8, zero=z, tune="full", prompts=32))["scatter"] for z in (1, 2)]
    assert several[1] == 4 * several[0]
    # With adapters the gradients are small, and stage 3 still gathers every frozen weight, for each microbatch.
    adapters = volumes(SEVEN, Job(gpus=8, zero=3, prompts=32, micro=1))
    assert adapters["gather"] > 4 * 2 * weight_bytes(SEVEN, Job())


# ---------------------------------------------------------------- waiting


def test_longest_of_many_against_draws() -> None:
    lengths = Lengths(40, 128)
    drawn = lengths.draw(np.random.default_rng(0), (4000, 64))
    assert lengths.moments == pytest.approx((drawn.mean(), drawn.std()), rel=0.01)
    assert lengths.longest(64) == pytest.approx(drawn.max(1).mean(), rel=0.01)
    assert Lengths(20, 50, 0.0).longest(64) == 20.0
    normal = np.random.default_rng(0).standard_normal((100_000, 16)).max(1).mean()
    assert normal_maximum(16) == pytest.approx(normal, abs=0.01)


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "ranks"), [(8, 1), (8, 16), (64, 8), (512, 4)])
def test_decoding_time_against_drawn_responses(spread: float, rows: int, ranks: int) -> None:
    job = Job(lengths=Lengths(40, 128, spread))
    decoder = Decoder(SEVEN, job, replace(H100, host=0.0, host_update=0.0))
    drawn = job.lengths.draw(np.random.default_rng(1), (100, ranks, rows))
    t = np.arange(job.lengths.most)
    active = (drawn[..., None, :] > t[:, None]).sum(-1)  # (trials, ranks, tokens)
    spent = np.where(active > 0, decoder.token(t, np.maximum(active, 1)), 0.0).sum(-1)
    one, slowest = decoder.seconds(rows, ranks)
    assert one == pytest.approx(spent.mean(), rel=0.02)
    true = spent.max(1).mean()
    assert 0.98 * true < slowest < 1.1 * true


def test_prompts_keys_are_read_once_for_their_group_and_by_an_engine_for_every_response() -> None:
    job, machine = Job(group=8, lengths=Lengths(10, 10, 0.0)), replace(FREE, bandwidth=1.0)
    keys = 2 * SEVEN.cached  # bytes of a token
    p = job.prompt(SEVEN)
    at = np.array([4]), np.array([16.0])
    weights = float(Decoder(SEVEN, job, machine)._products(16.0))
    assert Decoder(SEVEN, job, machine).token(*at)[0] == pytest.approx(weights + (2 * p + 16 * 4) * keys, rel=1e-9)
    served = Decoder(SEVEN, job, machine, engine=True).token(*at)[0]
    assert served == pytest.approx(weights + 16 * (p + 4) * keys, rel=1e-9)


# ---------------------------------------------------------------- time


def test_operations_of_an_update_by_hand() -> None:
    # 2 operations per weight and token forward, 2 backward for the input, and (all weights trained) 2 for the weight;
    # the last layer and the head only where a token is predicted, attention counted apart.
    rate = 1e12
    machine, job = replace(FREE, rates=((1, rate),)), Job(prompts=1, epochs=1, lengths=Lengths(64, 64, 0.0))
    tokens = job.prompt(SEVEN) + 8 * 63
    for tune, share in (("lora", 4), ("full", 6)):
        found = seconds(SEVEN, replace(job, tune=tune), machine)
        told = (found["forward"] + found["backward"]) * rate
        assert told == pytest.approx(share * SEVEN.matrices * tokens, rel=0.35)
        assert told > share * SEVEN.matrices * tokens


def test_more_gpus_divide_the_work_and_not_the_tokens() -> None:
    one, eight = (
        seconds(SMALL, Job(gpus=n, prompts=64, micro=8), replace(H100, host=0.0, host_update=0.0)) for n in (1, 8)
    )
    for phase in ("prepare", "vision", "reward"):
        assert eight[phase] == pytest.approx(one[phase] / 8, rel=0.05), phase
    issuing = [seconds(SMALL, Job(gpus=n, prompts=64), replace(FREE, host=1e-3))["decode"] for n in (1, 8)]
    assert issuing[1] > 0.6 * issuing[0]  # a token of fewer responses takes the CPU as long


def test_offload_takes_the_optimizer_off_the_gpu_and_costs_time() -> None:
    job = Job(gpus=8, zero=3, tune="full", prompts=8)
    away = replace(job, offload=True)
    assert memory(SEVEN, away)["update"]["optimizer"] == 0.0
    assert memory(SEVEN, away)["update"]["weights"] == 2 * GB + 2 * SEVEN.parameters  # what is gathered; the reference
    assert seconds(SEVEN, away, H100)["communication"] > seconds(SEVEN, job, H100)["communication"]
    assert seconds(SEVEN, away, H100)["optimizer"] > 10 * seconds(SEVEN, job, H100)["optimizer"]


# ---------------------------------------------------------------- search and tables


def test_the_fastest_plan_fits_and_no_other_is_faster() -> None:
    model, job = MODELS["Qwen2.5-VL-3B"], Job(gpus=8, tune="full")
    room = H100.memory * H100.usable
    plan = fastest(model, job, H100, 128)
    assert plan.peak <= room
    others = [
        replace(job, zero=zero, checkpointing=again, prompts=8 * share, micro=micro)
        for zero in range(4)
        for again in (False, True)
        for share in (1, 2, 4, 8, 16)
        for micro in (1, 2, 4, 8, 16)
        if micro <= share
    ]
    rates = [o.prompts * o.group / sum(seconds(model, o, H100).values()) for o in others if peak(model, o) <= room]
    assert len(rates) > 20
    assert plan.rate > max(rates) / 1.04  # a simpler setting may be 3 % slower


def test_weights_too_large_for_a_gpu_do_not_fit_whole() -> None:
    assert fastest(MODELS["Qwen2.5-VL-72B"], Job(gpus=64, tune="full"), H100) is None
    assert fastest(MODELS["Qwen2.5-VL-72B"], Job(gpus=64), H100).job.quantize


def test_every_phase_is_in_the_tables_shares() -> None:
    for plan in (fastest(SMALL, Job(gpus=8), H100), fastest_served(SMALL, Job(gpus=8), H100)):
        assert plan.seconds == sum(plan.phases.values())
        assert set(plan.phases) <= {name for names in cluster_plan.SHARES.values() for name in names}
        assert sum(map(int, cluster_plan._shares(plan))) == pytest.approx(100, abs=3)  # five rounded numbers


# ---------------------------------------------------------------- against measurement


def _found(decode: float) -> dict:
    rates = {"rates": [[1, 1e9], [1024, 50e9]], "bandwidth": 10e9, "stream": 20e9}
    parts = dict.fromkeys([*cluster_plan.PARTS, "step"], 2.0)
    shapes = dict.fromkeys(_calibrate.SHAPE_NAMES, {"seconds": parts, "prepared": 0.25, "text": 100})
    alone = {"rates": rates, "issuing": {"decode": decode, "update": 3 * decode}} | shapes
    return {"1": alone, "2": alone | {"all_reduce": [[4, 2e-3], [1000, 4e-3]]}}


def test_measured_rates_become_a_machine() -> None:
    machine = _calibrate.machine(_found(1e-3), 2)
    assert reduce_seconds(machine, 2, 1000) == pytest.approx(4e-3, rel=1e-6)
    assert reduce_seconds(machine, 2, 0) == pytest.approx(2e-3)
    assert machine.rate(1024) == 50e9 and machine.rate(1) == 1e9 and machine.rate(32) == pytest.approx(25.5e9)
    assert machine.together(1.0, 5) == pytest.approx(1.005)  # a CPU computes and issues in turn


def test_comparison_foretells_each_part_of_each_step() -> None:
    lines = cluster_plan.compare(_found(0.0))
    slower = cluster_plan.compare(_found(0.1))
    assert len(lines) == 2 * 2 * 7
    for line, slow in zip(lines, slower, strict=True):
        assert line["measured"] == 2.0
        more = slow["foretold"] - line["foretold"]
        assert more == pytest.approx(0.0) if line["part"] == "prepare" else more > 0.1
        if line["part"] == "prepare":
            assert line["foretold"] == pytest.approx(
                0.25 * {"bundled": 32, "smolvlm256m": 2}[line["shape"]] / line["processes"]
            )
    step = [x["foretold"] for x in lines if x["part"] == "step"]
    assert step[2] < step[0]  # the same rates, and half of the prompts each

"""Generation engines: who samples may change, what is sampled and what the update starts from may not.

The vLLM server here is a stand-in that speaks its protocol over HTTP, with a real model behind it; TRL's own client
talks to it. vLLM itself is not installed where these tests run, and TRL's client asks for it, so that one question
is answered for it. vLLM in this process is stood in for by the few classes that are used of it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from vllm_stand_in import StandIn, modules

from mmft.training.engines import generate_with, vllm_engine
from mmft.training.vllm_engine import placeholders
from mmft.training.vllm_here import VLLMHere
from mmft.training.vllm_server import VLLMServer
from mmft.vlm.load import build_policy, load_model, lora_config

GROUP, LENGTH = 3, 6


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


ROWS = [
    {"prompt": "what is it", "image": picture(0)},
    {"prompt": "a longer question about two things", "images": [picture(1), picture(2)]},
    {"prompt": "no picture"},
]
IDS = ["a", "b", "c"]


def stir(policy, seed: int, size: float = 0.1) -> None:
    """Moves the adapter, far enough to be seen in log-probs."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * size)


@pytest.fixture
def policy(tiny_model):
    model, processor = load_model(str(tiny_model("llava")))
    torch.manual_seed(0)
    policy = build_policy(model, processor, lora_config(model, r=4))
    stir(policy, 0)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


@pytest.fixture
def stand_in(tiny_model):
    server = StandIn(tiny_model("llava"))
    yield server
    server.close()


@pytest.fixture
def server(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *_: True)
    return VLLMServer(stand_in.url, tmp_path, timeout=20)


@pytest.fixture
def here(stand_in, tmp_path, monkeypatch):
    for name, module in modules(stand_in).items():
        monkeypatch.setitem(sys.modules, name, module)
    return VLLMHere(tmp_path)


def prompts_of(policy, which=(0, 1, 2)):
    return policy.pictures.prompts([ROWS[i] for i in which], [IDS[i] for i in which], policy.device)


def write(engine, policy, temperature=1.0, seed=1, which=(0, 1, 2)):
    return generate_with(engine, policy, prompts_of(policy, which), GROUP, LENGTH, temperature, seed)


@pytest.mark.parametrize(("engine", "temperature"), [("server", 1.0), ("server", 0.7), ("here", 0.7)])
def test_vllm_samples_and_the_policy_scores(engine, temperature, policy, request):
    engine = request.getfixturevalue(engine)
    responses, outputs = write(engine, policy, temperature)
    assert responses.ids.shape[0] == len(ROWS) * GROUP
    assert engine.gap["max"] < 1e-4  # two implementations of one distribution: temperature, bans, pictures, adapter
    own = policy(prompts_of(policy), responses, temperature, entropy=True)
    for name in ("logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(outputs, name), getattr(own, name).detach())
    ends = torch.isin(responses.ids, torch.tensor(policy.end_ids)) & responses.mask
    assert torch.equal(responses.ended, ends.any(-1))
    assert not torch.isin(responses.ids[responses.mask], policy.banned_ids).any()


def test_responses_that_end_early(server, stand_in, policy):
    stand_in.faults["tokens"] = lambda row: row[:2]  # what a server sends whose responses are all short
    responses, outputs = write(server, policy)
    assert responses.mask.tolist() == [[True, True]] * (len(ROWS) * GROUP)
    assert outputs.logprobs.shape == responses.ids.shape and server.gap["max"] < 1e-4


def test_draws_follow_seed_and_row_not_the_batch(server, policy):
    together, _ = write(server, policy)
    again, _ = write(server, policy)
    alone, _ = write(server, policy, which=(1,))
    other, _ = write(server, policy, seed=2)
    renamed = policy.pictures.prompts([ROWS[1]], ["z"], policy.device)
    twin, _ = generate_with(server, policy, renamed, GROUP, LENGTH, 1.0, 1)
    assert alone.ids.tolist() != twin.ids.tolist()
    assert torch.equal(together.ids, again.ids)
    width = alone.ids.shape[1]
    assert torch.equal(together.ids[GROUP : 2 * GROUP, :width], alone.ids)
    assert not torch.equal(together.mask, other.mask) or not torch.equal(together.ids, other.ids)
    assert len({tuple(row) for row in together.ids.tolist()}) > len(ROWS)  # the responses of a group differ


@pytest.mark.parametrize("engine", ["hf", "server", "here"])
def test_greedy_responses_are_the_native_ones(engine, policy, request):
    engine = engine if engine == "hf" else request.getfixturevalue(engine)
    native, expected = write("native", policy, temperature=0.0)
    responses, outputs = write(engine, policy, temperature=0.0)
    assert torch.equal(responses.ids, native.ids) and torch.equal(responses.mask, native.mask)
    torch.testing.assert_close(outputs.logprobs, expected.logprobs, atol=1e-4, rtol=0)


def test_hf_gets_the_pixels_of_remembered_pictures(policy):
    fresh, _ = write("hf", policy)
    assert policy.pictures.encoded and len(policy.pictures.cache), "nothing was remembered: the test tests nothing"
    remembered, _ = write("hf", policy)
    assert torch.equal(fresh.ids, remembered.ids)


def test_the_adapter_goes_to_the_server_when_it_changed(server, stand_in, policy):
    write(server, policy)
    write(server, policy)
    assert len(stand_in.loads) == 1
    stir(policy, 1)
    write(server, policy)
    assert len(stand_in.loads) == 2 and server.gap["max"] < 1e-4
    assert stand_in.adapters == [server.adapter]  # the old one is let go, here and on the disk
    assert [p.name for p in server.folder.iterdir()] == [server.adapter]


def test_a_second_run_may_find_its_adapter_loaded(server, stand_in, policy, tmp_path):
    write(server, policy)
    second = VLLMServer(stand_in.url, tmp_path / "second", timeout=20)
    write(second, policy)
    assert second.adapter == server.adapter and len(stand_in.loads) == 1


@pytest.mark.parametrize("engine", ["server", "here"])
def test_stale_weights_are_found(engine, stand_in, policy, request):
    engine = request.getfixturevalue(engine)
    write(engine, policy)
    stand_in.faults["deaf"] = True
    stir(policy, 1)
    with pytest.raises(ValueError, match=r"another distribution.*Row [abc].*nats a token.*tolerance 0.1"):
        write(engine, policy)
    assert engine.gap["mean"] > 0.1


def test_a_lost_picture_is_found_in_its_row(server, stand_in, policy):
    stand_in.faults["blind"] = True
    with pytest.raises(ValueError, match=r"Row [ab]: its log-probs differ"):
        write(server, policy)
    write(server, policy, which=(2,))  # a row without a picture does not notice


def test_raw_logprobs_are_found(server, stand_in, policy):
    stand_in.faults["raw"] = True
    with pytest.raises(ValueError, match="processed_logprobs"):
        write(server, policy, temperature=0.5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda row: [100_000, *row[1:]], RuntimeError, "tokens below"),
        (lambda row: [*row, *row] * LENGTH, RuntimeError, f"1 to {LENGTH} tokens"),
        (lambda row: [], RuntimeError, f"1 to {LENGTH} tokens"),
        (lambda row: [(row[0] + 1) % 90 + 5, *row[1:]], ValueError, "another distribution"),
    ],
    ids=["no such token", "too long", "nothing", "another token"],
)
def test_wrong_token_ids_are_found(server, stand_in, policy, change, error, words):
    stand_in.faults["tokens"] = change
    with pytest.raises(error, match=words):
        write(server, policy)


def test_a_server_that_goes_is_told_by_name(server, stand_in, policy):
    write(server, policy)
    stand_in.close()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"{server.url}.*is gone"):
        write(server, policy)
    assert time.monotonic() - began < 30


def test_a_slow_server_is_not_waited_for(stand_in, server, policy, tmp_path):
    stand_in.faults["slow"] = 2
    hasty = VLLMServer(stand_in.url, tmp_path, timeout=0.5)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="rollout.vllm.timeout: 0.5 s"):
        write(hasty, policy, which=(2,))
    assert time.monotonic() - began < 2


def test_no_server(server, stand_in, tmp_path):
    stand_in.close()
    with pytest.raises(ValueError, match=r"rollout.vllm.url: no server at .*vllm serve"):
        VLLMServer(stand_in.url, tmp_path, timeout=0.1)


def test_a_server_that_takes_no_adapters(server, stand_in, policy):
    stand_in.faults["fixed"] = True
    with pytest.raises(RuntimeError, match="404.*--enable-lora"):
        write(server, policy)


def test_without_vllm_the_recipe_key_is_named(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *_: False)
    with pytest.raises(ValueError, match=r"rollout.engine: vllm.*trl\[vllm\]"):
        VLLMServer(stand_in.url, tmp_path)


def test_a_policy_without_adapters_cannot_be_sent(server, tiny_model):
    model, processor = load_model(str(tiny_model("llava")))
    with pytest.raises(ValueError, match="model.tune"):
        write(server, build_policy(model, processor))


def test_vllm_here_gets_the_base_model_and_each_new_adapter(here, stand_in, policy):
    write(here, policy)
    write(here, policy)
    assert here.llm.options["model"] == policy.model.config._name_or_path
    assert here.llm.options["max_lora_rank"] == 8 and here.llm.options["dtype"] == "float32"
    assert len(stand_in.loads) == 1
    stir(policy, 1)
    write(here, policy)
    assert len(stand_in.loads) == 2 and here.gap["max"] < 1e-4


def test_pictures_laid_out_in_other_tokens_are_refused(here, stand_in, policy):
    stand_in.faults["layout"] = True
    with pytest.raises(ValueError, match="row a: vLLM lays its pictures out in other tokens"):
        write(here, policy)


def test_vllm_here_asks_for_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="rollout.vllm.url is null.*pip install vllm"):
        vllm_engine(tmp_path, url=None)


def test_an_adapter_on_the_tower_cannot_be_sent(server, tiny_model):
    model, processor = load_model(str(tiny_model("llava")))
    with pytest.raises(ValueError, match="model.lora.target: language"):
        write(server, build_policy(model, processor, lora_config(model, r=4, target="all")))


def test_missing_logprobs_are_found(server, policy, monkeypatch):
    answers = server.client.generate
    monkeypatch.setattr(server.client, "generate", lambda *a, **k: answers(*a, **k) | {"logprobs": None})
    with pytest.raises(ValueError, match="differ by inf"):
        write(server, policy)


def test_an_unknown_engine(policy):
    with pytest.raises(ValueError, match="native, hf or vllm"):
        write("vlm", policy)


def test_placeholders_of_pictures():
    # 9 is the picture token. Neighbours are parted by the server's lengths.
    assert placeholders([1, 9, 9, 9, 9, 2], 9, [2, 2], "r") == [{"offset": 1, "length": 2}, {"offset": 3, "length": 2}]
    # A server that counts two marks around each picture in.
    assert placeholders([7, 9, 9, 7, 1, 7, 9, 9, 7], 9, [4, 4], "r") == [
        {"offset": 1, "length": 2},
        {"offset": 6, "length": 2},
    ]
    for tiles, lengths in (([9, 9, 7, 9, 9], [5]), ([1, 9, 9], [2, 2]), ([9, 9, 9], [2])):
        with pytest.raises(ValueError, match="row r: .*unbroken runs"):
            placeholders(tiles, 9, lengths, "r")

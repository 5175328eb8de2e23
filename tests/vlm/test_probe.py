"""The probe reads off a model what the table states of its family, finds enough for families that nobody listed, and
says what it cannot find."""

from __future__ import annotations

import re

import oracle
import pytest
import tiny_models
import torch
from tiny_models import unlisted
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

from mmft.batch import Responses
from mmft.vlm.decoder import placeholder_id
from mmft.vlm.families import FAMILIES, family_of
from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.probe import probe

CPU = torch.device("cpu")
IDS = ["a", "b", "c", "d"]


def adapted(model, target: str) -> set[str]:
    return {name for name, _ in model.named_modules() if re.fullmatch(target, name)}


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_finds_what_the_table_states(name, tiny_model):
    model, processor = load_model(str(tiny_model(name)))
    found, stated = probe(model, processor), FAMILIES[model.config.model_type]
    for fact in ("decoder", "positions", "prompt_attention", "features_read_prompt"):
        assert getattr(found, fact) == getattr(stated, fact), fact
    assert adapted(model, found.lora_target) == adapted(model, stated.lora_target)
    placeholders = {placeholder_id(model, medium) for medium in stated.media}
    marks = set(processor.tokenizer.convert_tokens_to_ids(list(found.marks)))
    known = processor.tokenizer.get_vocab()
    assert marks - placeholders >= {known[mark] for mark in stated.marks if mark in known} - placeholders
    if name == "qwen2_audio":  # has no method that encodes sounds: nothing to find
        assert found.notes and not found.shared_prefix
        return
    assert found.shared_prefix and not found.notes
    media = {medium.name: medium for medium in stated.media}
    assert {medium.name for medium in found.media} == media.keys()
    for medium in found.media:
        assert medium.encoder == media[medium.name].encoder
        assert placeholder_id(model, medium) == placeholder_id(model, media[medium.name])
        assert set(medium.inputs) <= set(media[medium.name].inputs), medium.name


@pytest.fixture(scope="module", params=unlisted.BUILDERS)
def stranger(request, tmp_path_factory):
    """A family that only the probe knows, with adapters that do something: once shared, once plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models._BUILDERS, request.param, unlisted.BUILDERS[request.param])
        folder = str(tiny_models.build(request.param, tmp_path_factory.mktemp("stranger")))
    assert request.param not in FAMILIES
    policies = []
    for shared_prefix in (None, False):
        model, processor = load_model(folder)
        torch.manual_seed(0)
        policy = build_policy(model, processor, lora_config(model, r=4), shared_prefix=shared_prefix)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        policies.append(policy.eval())
    return policies


def test_an_unlisted_family_works_on_the_shared_prefix_by_the_probe_alone(stranger):
    shared, plain = stranger
    assert shared.shared_prefix and not shared.family.notes and not plain.shared_prefix
    prompts = shared.pictures.prompts(oracle.PICTURES, IDS, CPU)
    allowed = (~shared.banned).nonzero().flatten()
    ids = allowed[torch.randint(len(allowed), (12, 6), generator=torch.Generator().manual_seed(0))]
    responses = Responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(12, dtype=torch.bool))
    with torch.no_grad():
        ours = shared(prompts, responses, 0.7).logprobs
    theirs = oracle.logprobs(plain, oracle.PICTURES, responses, 0.7)
    assert (ours - theirs).abs().max() <= 1e-4


def test_an_unlisted_family_writes_what_generate_writes(stranger):
    shared, plain = stranger
    written, _ = generate(shared, shared.pictures.prompts(oracle.PICTURES, IDS, CPU), 1, 8, temperature=0.0)
    for row, ids, mask in zip(oracle.PICTURES, written.ids, written.mask, strict=True):
        assert ids[mask].tolist() == oracle.greedy(plain, row, 8)


def test_an_unlisted_familys_marks_are_never_sampled(stranger):
    shared, _ = stranger
    marks = shared.tokenizer.convert_tokens_to_ids(list(shared.family.marks))
    assert marks and shared.banned[marks].all()


REFUSED = {
    "mllama": "cross_attention_states",  # pictures are looked at in layers of their own
    "lfm3_vl": "conv",
    "qwen3_5": "linear_attention",
    "llama4": "chunked_attention",
    "gemma4": "per_layer_inputs",
    "florence2": "encoder-decoder",
    "granite_docling": "logits_scaling",
    "kosmos-2": "none of get_image_features",
    "blip-2": "no image placeholder",  # a configuration older than placeholders
    "dots3_note": "indexed_attention",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_found_is_said_and_the_plain_path_taken(model_type):
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(CONFIG_MAPPING[model_type]())
    found = probe(model)
    assert not found.shared_prefix
    assert any(REFUSED[model_type] in note for note in found.notes), found.notes


def test_a_processor_of_another_family_is_noticed(tiny_model):
    reads_prompts, _ = load_model(str(tiny_model("instructblip")))
    _, without = load_model(str(tiny_model("blip-2")))
    assert any("needs qformer_input_ids" in note for note in probe(reads_prompts, without).notes)
    llava, _ = load_model(str(tiny_model("llava")))
    _, tiles = load_model(str(tiny_model("smolvlm")))
    assert any("gives pixel_attention_mask, which no encoder takes" in note for note in probe(llava, tiles).notes)


def test_adapters_do_not_hide_the_facts(tiny_model):
    from peft import get_peft_model

    model, processor = load_model(str(tiny_model("llava")))
    before = probe(model, processor)
    after = probe(get_peft_model(model, lora_config(model)), processor)
    assert (after.decoder, after.media, after.marks, after.notes) == (
        before.decoder,
        before.media,
        before.marks,
        before.notes,
    )


def test_listed_families_are_not_probed(tiny_model):
    model, processor = load_model(str(tiny_model("llava")))
    assert family_of(model) is FAMILIES["llava"]

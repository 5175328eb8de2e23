"""Adapters by strangers (row 30): twelve that are malformed raise, naming file and field; sound ones load and go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mmft.vlm.adapter_files import CONFIG, WEIGHTS, check_adapter, load_adapter, read_adapter
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.policy import Policy

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model("qwen2_vl")


def adapted(folder: Path, **options: Any):
    """A `PeftModel` whose adapter says something."""
    from peft import get_peft_model

    model, _ = load_model(str(folder))
    config = lora_config(model, r=4)
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("adapter") / "adapter"
    adapted(folder).save_pretrained(where, save_embedding_layers=False)
    return where


@pytest.fixture(scope="module")
def base(folder):
    return load_model(str(folder))[0]


@pytest.fixture(scope="module")
def filled(folder):
    return adapted(folder)


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def with_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return changed


def one(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def first_changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return with_tensors(lambda t: t | {one(t, part): change(t[one(t, part)]).contiguous()})


MALFORMED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "wrong r": (with_config(r=8), WEIGHTS, "expected rank 8"),
    "missing": (with_tensors(lambda t: {k: v for k, v in t.items() if k != one(t, "lora_B")}), WEIGHTS, "is missing"),
    "extra": (
        with_tensors(lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
        WEIGHTS,
        "lm_head.lora_A.weight is of no layer",
    ),
    "prefixed": (with_tensors(lambda t: {f"module.{k}": v for k, v in t.items()}), WEIGHTS, "has another prefix"),
    "NaN": (
        first_changed("lora_A", lambda t: t.clone().index_fill_(0, torch.tensor([1]), float("nan"))),
        WEIGHTS,
        "NaN",
    ),
    "empty": (first_changed("lora_A", lambda t: t[:0]), WEIGHTS, "is empty"),
    "bad JSON": (lambda folder: (folder / CONFIG).write_text('{"r": 4,'), CONFIG, "no JSON"),
    "type": (with_config(peft_type="IA3"), CONFIG, 'peft_type: got "IA3"'),
    "r = 0": (with_config(r=0), CONFIG, "r: got 0"),
    "target": (with_config(target_modules=[]), CONFIG, "target_modules: got []"),
    "dtype": (first_changed("lora_B", lambda t: t.to(torch.int8)), WEIGHTS, "dtype torch.int8"),
    "base": (with_config(base_model_name_or_path=7), CONFIG, "base_model_name_or_path: got 7"),
}
# Beyond the twelve: what PEFT would fill in, import, open or rewrite the base model for.
MORE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no tensors": (with_tensors(lambda t: {}), WEIGHTS, "holds no tensors"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), CONFIG, "holds a list"),
    "alpha": (with_config(lora_alpha=float("nan")), CONFIG, "lora_alpha: got NaN"),
    "no r": (with_config(r=None), CONFIG, "r: got null"),
    "r = true": (with_config(r=True), CONFIG, "r: got true"),
    "regular expression": (with_config(target_modules="("), CONFIG, "target_modules"),
    "module to import": (with_config(megatron_config={"a": 1}, megatron_core="os"), CONFIG, "megatron_config"),
    "file to open": (with_config(corda_config={"covariance_file": "x.bin"}), CONFIG, "corda_config"),
    "rewritten base": (with_config(init_lora_weights="pissa"), CONFIG, 'init_lora_weights: got "pissa"'),
    "unknown option": (with_config(new_trick=True), CONFIG, "new_trick"),
    "DoRA without": (with_config(use_dora=True), WEIGHTS, "lora_magnitude_vector is missing"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), WEIGHTS, "cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "is missing"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), CONFIG, "is missing"),
}


@pytest.mark.parametrize("name", [*MALFORMED, *MORE])
def test_malformed_adapters_raise_by_file_and_field(saved, base, filled, tmp_path, name):
    broken = tmp_path / "adapter"
    shutil.copytree(saved, broken)
    change, file, field = (MALFORMED | MORE)[name]
    change(broken)
    for model in (None, base, filled):
        with pytest.raises(ValueError) as caught:
            check_adapter(broken, model)
        assert str(caught.value).startswith(str(broken / file)) and field in str(caught.value), caught.value
    with pytest.raises(ValueError):
        load_adapter(base, broken)


def test_twelve_are_malformed():
    assert len(MALFORMED) == 12


def _renamed(t: Tensors) -> Tensors:
    return {k.replace("layers.0.", "layers.7."): v for k, v in t.items()}


@pytest.mark.parametrize(
    ("change", "file", "field"),
    [
        (with_tensors(_renamed), WEIGHTS, "lora_A.weight is missing, which the model needs"),
        (
            with_tensors(lambda t: t | {k.replace("layers.0.", "layers.7."): v.clone() for k, v in t.items()}),
            WEIGHTS,
            "has not",
        ),
        (first_changed("lora_A", lambda t: t[:, :-1]), WEIGHTS, "the model's is"),
        (with_config(target_modules="nothing"), WEIGHTS, "is of no layer"),
    ],
    ids=["other layers", "more layers", "narrower", "target"],
)
def test_an_adapter_of_another_model_is_told_by_the_model(saved, base, filled, tmp_path, change, file, field):
    broken = tmp_path / "adapter"
    shutil.copytree(saved, broken)
    change(broken)
    for model in (base, filled):
        with pytest.raises(ValueError) as caught:
            check_adapter(broken, model)
        assert str(caught.value).startswith(str(broken / file)) and field in str(caught.value), caught.value


def test_an_adapter_that_names_another_base_is_refused(saved, base, tmp_path):
    broken = tmp_path / "adapter"
    shutil.copytree(saved, broken)
    with_config(base_model_name_or_path="someone/another-model")(broken)
    with pytest.raises(ValueError, match="base_model_name_or_path: got .*another-model.*the model is"):
        check_adapter(broken, base)
    for same in (f"elsewhere/{Path(base.config._name_or_path).name}", None):
        with_config(base_model_name_or_path=same)(broken)
        check_adapter(broken, base)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["merger"]},
        {"rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["lora", "rslora", "dora", "saved modules", "ranks", "embeddings"],
)
def test_sound_adapters_load_bitwise_and_go_on_learning(folder, tmp_path, options):
    model = adapted(folder, **options)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = read_adapter(tmp_path, model)
    assert set(tensors) == set(load_file(tmp_path / WEIGHTS))
    plain, processor = load_model(str(folder))
    again = load_adapter(plain, tmp_path)
    assert isinstance(again, PeftModel)
    ours, theirs = dict(again.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    learning = {name for name, value in ours.items() if value.requires_grad}
    assert learning == {name for name, value in theirs.items() if value.requires_grad} and learning
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.equal(again(input_ids=ids).logits, load_model(str(folder))[0](input_ids=ids).logits)
    assert isinstance(build_policy(again, processor, critic="none"), Policy)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(again, tmp_path)

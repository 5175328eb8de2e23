"""Training that goes on from an adapter: what it starts from, what its reference is, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_trainer import count_wanted, rows, weights

from mmft.batch import Responses
from mmft.recipe import RecipeError, load_recipe
from mmft.recipe.sections import Model
from mmft.training import distributed
from mmft.training.config import PPOConfig
from mmft.training.run import assemble
from mmft.training.trainer import PPOTrainer
from mmft.vlm.adapter_files import CONFIG, WEIGHTS
from mmft.vlm.load import build_policy, load_model
from mmft.vlm.start import start

SHAPE = {"lora": {"r": 4, "alpha": 16}}


def trainer_of(folder: Path, name: Path, steps: int, **options) -> PPOTrainer:
    torch.manual_seed(0)
    base, processor = load_model(str(name), options.get("quantize"))
    model, adapters = start(base, Model(**SHAPE | {"name": str(name)} | options))
    config = PPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        prompts_per_step=2,
        num_generations=3,
        max_completion_length=6,
        learning_rate=1e-2,
        save_steps=1,
        keep_last=3,
        report_to=(),
    )
    return PPOTrainer(model, count_wanted, config, rows(), rows(2), processor, adapters)


@pytest.fixture(scope="module")
def first(tiny_model, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("first") / "run"
    trainer_of(folder, tiny_model("llava"), 2).train()
    return folder


def logprobs(trainer: PPOTrainer, **which) -> torch.Tensor:
    prompts = trainer.prompts(1)
    ids = torch.arange(5, 5 + 4 * len(prompts)).view(len(prompts), 4)
    answers = Responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(prompts), dtype=torch.bool))
    with torch.no_grad():
        return trainer.policy(prompts, answers, **which).logprobs


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_the_reference_is_the_model_as_it_starts_and_a_resumed_run_is_the_same(tiny_model, first, tmp_path, quantize):
    """Not the bare base; bitwise the policy at first, and still that when the policy has moved and after a resume."""
    if quantize:
        pytest.importorskip("bitsandbytes")
    options = {"adapter": str(first), "quantize": quantize}
    unbroken = trainer_of(tmp_path / "run", tiny_model("llava"), 3, **options)
    learned = load_file(first / "adapter" / WEIGHTS)
    begun = weights(unbroken)
    assert all(torch.equal(v, begun["model." + n.replace(".weight", ".default.weight")]) for n, v in learned.items())
    as_it_starts = logprobs(unbroken)
    assert torch.equal(logprobs(unbroken, reference=True), as_it_starts)
    with unbroken.policy.model.disable_adapter():
        assert not torch.allclose(logprobs(unbroken), as_it_starts, atol=1e-3)
    own = {p.data_ptr() for p in unbroken.policy.parameters()}
    copied = {n for n, p in unbroken.policy._reference[0].named_parameters() if p.data_ptr() not in own}
    assert copied == {n.removeprefix("model.") for n in begun if "lora_" in n}  # base weights are there once

    unbroken.train()
    ended = weights(unbroken)
    assert any(not torch.equal(ended[n], begun[n]) for n in begun if "lora_" in n)
    resumed = trainer_of(tmp_path / "run", tiny_model("llava"), 3, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoints" / "step-000002")
    assert all(torch.equal(value, ended[name]) for name, value in weights(resumed).items())
    for trainer in (unbroken, resumed):
        assert torch.equal(logprobs(trainer, reference=True), as_it_starts)

    base, processor = load_model(str(tiny_model("llava")))  # what is saved stands on the same base, by plain PEFT
    again = dict(
        build_policy(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"), processor).named_parameters()
    )
    assert all(torch.equal(value, again[name]) for name, value in ended.items() if "lora_" in name)
    said = json.loads((tmp_path / "run" / "adapter" / CONFIG).read_text())
    assert said["base_model_name_or_path"] == str(tiny_model("llava"))


def test_a_run_is_not_resumed_with_another_adapter_under_the_same_name(tiny_model, first, tmp_path):
    """The reference would be another one, and nobody would know."""
    other = shutil.copytree(first / "adapter", tmp_path / "adapter")
    trainer_of(tmp_path / "run", tiny_model("llava"), 1, adapter=str(other)).train()
    tensors = load_file(other / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, other / WEIGHTS)
    with pytest.raises(ValueError, match="made with start"):
        trainer_of(tmp_path / "run", tiny_model("llava"), 2, adapter=str(other)).train(resume_from_checkpoint=True)


def test_a_new_adapter_costs_no_reference_of_its_own(tiny_model, first):
    base, processor = load_model(str(tiny_model("llava")))
    model, _ = start(base, Model(**SHAPE, adapter=str(first)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert not build_policy(model, processor)._reference


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": {"r": 8, "alpha": 16}}, "model.lora.r: got 8, expected 4"),
        ({"lora": {"r": 8, "alpha": 32}}, "so set model.lora.r=4 model.lora.alpha=16"),
        ({"lora": SHAPE["lora"] | {"dora": True}}, "model.lora.dora: got true, expected false"),
        ({"lora": SHAPE["lora"] | {"target": ".*q_proj"}}, "model.lora.target: got '.*q_proj', expected '"),
        ({"lora": SHAPE["lora"] | {"target": "all"}}, "model.lora.target: got all, expected '"),
        ({"tune": "hybrid"}, "model.tune: got hybrid, expected lora"),
        ({"adapter": "runs/nowhere"}, "no folder 'runs/nowhere'"),
    ],
)
def test_what_does_not_fit_the_adapter_is_refused_by_its_key(tiny_model, first, options, said):
    base, _ = load_model(str(tiny_model("llava")))
    with pytest.raises(ValueError) as caught:
        start(base, Model(**SHAPE | {"adapter": str(first)} | options))
    assert str(caught.value).startswith("model.adapter: ") and said in str(caught.value), caught.value
    assert not hasattr(base, "peft_config")


def test_the_line_that_is_offered_works(tiny_model, first):
    """A target that the recipe has no word for: the message's own words are taken."""
    base, _ = load_model(str(tiny_model("llava")))
    with pytest.raises(ValueError) as caught:
        start(base, Model(adapter=str(first), lora={"r": 2, "target": ".*q_proj"}))
    with pytest.raises(ValueError) as caught:  # layers are compared when the numbers agree
        start(base, Model(adapter=str(first), lora=SHAPE["lora"] | {"target": ".*q_proj"}))
    target = str(caught.value).split("model.lora.target='")[1].split("'")[0]
    model, adapters = start(base, Model(adapter=str(first), lora=SHAPE["lora"] | {"target": target}))
    assert adapters is None and model.peft_config["default"].r == 4


def test_an_adapter_of_another_base_model_is_refused(tiny_model, first):
    for name in ("qwen2_vl", "internvl"):
        base, _ = load_model(str(tiny_model(name)))
        with pytest.raises(ValueError, match=r"model\.adapter: .*base_model_name_or_path.*expected an adapter of that"):
            start(base, Model(**SHAPE, adapter=str(first), name=str(tiny_model(name))))


def test_a_base_of_the_same_name_with_other_weights_is_refused(tiny_model, first, tmp_path):
    """Every warm start is called warm_start; a true copy is taken."""
    copy = shutil.copytree(tiny_model("llava"), tmp_path / tiny_model("llava").name)
    options = Model(**SHAPE, adapter=str(first), name=str(copy))
    assert start(load_model(str(copy))[0], options)[1] is None
    tensors = load_file(copy / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"whose weights are not the model's \(model\.name must be its base model"):
        start(load_model(str(copy))[0], options)


def test_folders_without_a_finished_adapter_say_what_to_do(tiny_model, first, tmp_path):
    base, _ = load_model(str(tiny_model("llava")))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(first / "checkpoints", unfinished / "checkpoints")
    with pytest.raises(ValueError, match="step-000002"):
        start(base, Model(**SHAPE, adapter=str(unfinished)))
    checkpoint = unfinished / "checkpoints" / "step-000002"
    assert start(base, Model(**SHAPE, adapter=str(checkpoint)))[1] is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        start(load_model(str(tiny_model("llava")))[0], Model(**SHAPE, adapter=str(tmp_path / "empty")))


@pytest.mark.parametrize("word", ["model.tune=full", "model.tune=frozen", "warm_start.epochs=1"])
def test_keys_that_cannot_go_with_an_adapter(word):
    with pytest.raises(RecipeError, match=r'model\.adapter: got "runs/first", expected null with'):
        load_recipe("recipes/caption_ppo.yaml", ["model.adapter=runs/first", word])


def test_the_recipe_reaches_the_trainer(tmp_path):
    small = ["data.train_rows=4", "eval.rows=2", "eval.every=0", "rollout.prompts_per_step=2", "output.trackers=[]"]
    made = assemble(load_recipe("recipes/caption_ppo.yaml", [*small, f"output.dir={tmp_path}/a"]))
    for name, parameter in made.policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    made.policy.model.save_pretrained(tmp_path / "adapter")
    words = [*small, f"output.dir={tmp_path}/b", f"model.adapter={tmp_path}/adapter"]
    second = weights(assemble(load_recipe("recipes/caption_ppo.yaml", words)))
    assert all(torch.equal(value, second[name]) for name, value in weights(made).items() if "lora_" in name)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_engines_that_take_the_shared_weights_apart_are_refused(engine, first, tiny_model, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, tiny_model("llava"), 1, adapter=str(first))
    monkeypatch.setattr(distributed, "engine_of", lambda accelerator: engine)
    with pytest.raises(ValueError, match=f"{engine} takes them apart.*model.adapter.*algorithm.kl_coef"):
        distributed.prepare(trainer.accelerator, trainer.policy, trainer.optimizer)

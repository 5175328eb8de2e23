"""Modes of ``model.tune`` and quantised weights in the loop: what they save, and that a resumed run is the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_trainer import count_wanted, rows, weights

from mmft.batch import Responses
from mmft.recipe import load_recipe
from mmft.recipe.sections import Model
from mmft.training.config import PPOConfig
from mmft.training.run import assemble, rows_of
from mmft.training.trainer import PPOTrainer
from mmft.training.warm_start import warm_start
from mmft.vlm.load import build_policy, load_model, tune

CASES = {
    "frozen": ({"tune": "frozen", "trained_layers": 1}, {}),
    "hybrid": ({"tune": "hybrid", "lora": {"r": 4}}, {}),
    "dora": ({"lora": {"r": 4, "dora": True}}, {}),
    "rslora": ({"lora": {"r": 4, "rslora": True}}, {}),
    "nf4, AdamW in 8 bits": ({"quantize": "nf4"}, {"optimizer": "adamw_8bit"}),
    "int8, hybrid": ({"quantize": "int8", "tune": "hybrid", "lora": {"r": 4}}, {}),
}


def trainer_of(folder: Path, model: Path, options: dict, **more) -> PPOTrainer:
    torch.manual_seed(0)
    base, processor = load_model(str(model), options.get("quantize"))
    config = PPOConfig(
        output_dir=str(folder),
        max_steps=3,
        prompts_per_step=2,
        num_generations=3,
        max_completion_length=6,
        learning_rate=1e-2,
        save_steps=1,
        keep_last=3,
        report_to=(),
        **more,
    )
    return PPOTrainer(base, count_wanted, config, rows(), rows(2), processor, tune(base, Model(**options)))


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_saves_and_resumes_bitwise(tiny_model, tmp_path, case):
    options, more = CASES[case]
    if options.get("quantize") or more:
        pytest.importorskip("bitsandbytes")
    unbroken = trainer_of(tmp_path / "run", tiny_model("llava"), options, **more)
    start = weights(unbroken)
    unbroken.train()
    learned = weights(unbroken)
    assert any(not torch.equal(learned[name], start[name]) for name in learned if "value_head" not in name)
    resumed = trainer_of(tmp_path / "run", tiny_model("llava"), options, **more)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoints" / "step-000002")
    for name, value in weights(resumed).items():
        assert torch.equal(value, learned[name]), name
    prompts = resumed.prompts(1)
    with torch.no_grad():
        rollout = [
            trainer.policy(prompts, _answers(len(prompts)), reference=True).logprobs for trainer in (unbroken, resumed)
        ]
    assert torch.equal(*rollout)
    if options.get("tune") != "frozen":  # by plain PEFT, on weights that are not quantised
        base, processor = load_model(str(tiny_model("llava")))
        again = build_policy(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"), processor)
        loaded = dict(again.named_parameters())
        assert all(torch.equal(value, loaded[name]) for name, value in learned.items() if "value_head" not in name)


def _answers(count: int):
    ids = torch.arange(5, 5 + 4 * count).view(count, 4)
    return Responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(count, dtype=torch.bool))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.tune=frozen", "model.trained_layers=1"], {".layers.2."}),
        (["model.tune=hybrid", "model.lora.dora=true"], {"modules_to_save", "lora_A", "lora_magnitude_vector"}),
        (["model.quantize=nf4", "model.lora.rslora=true", "train.optimizer=adamw_8bit"], {"lora_A"}),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_the_recipe_reaches_the_model(tmp_path, words, parts):
    small = ["data.train_rows=4", "eval.rows=2", "eval.every=0", "rollout.prompts_per_step=2", "output.trackers=[]"]
    recipe = load_recipe("recipes/caption_ppo.yaml", [*small, f"output.dir={tmp_path}", *words])
    trainer = assemble(recipe)
    names = [n for n, p in trainer.policy.named_parameters() if p.requires_grad]
    assert all(any(part in name for name in names) for part in parts)
    assert all(any(part in name for part in (*parts, "value_head", "lora_", "norm")) for name in names)
    adapters = getattr(trainer.policy.model, "peft_config", {}).get("default")
    if adapters is not None:
        assert adapters.use_dora == recipe.model.lora.dora and adapters.use_rslora == recipe.model.lora.rslora
    assert bool(getattr(trainer.policy.model, "is_loaded_in_4bit", False)) == (recipe.model.quantize == "nf4")


def test_a_warm_start_on_4_bits_is_merged_into_whole_weights(tmp_path):
    """The adapters learn on quantised weights, and what is saved is the full model plus them, to the last bit."""
    pytest.importorskip("bitsandbytes")
    words = ["warm_start.max_steps=2", "warm_start.batch_size=2", "warm_start.tune=lora", "data.train_rows=4"]
    words += ["model.name=scenes-vlm", "model.quantize=nf4", "model.lora.r=2", "data.name=scenes", "data.eval=test"]
    recipe = load_recipe("recipes/caption_photos.yaml", [*words, f"output.dir={tmp_path}"])
    folder = warm_start(recipe, rows_of(recipe, "train", 4), tmp_path / "warm")
    before, after = (dict(load_model(name)[0].named_parameters()) for name in ("scenes-vlm", str(folder)))
    assert before.keys() == after.keys() and {p.dtype for p in after.values()} == {torch.float32}
    changed = {n: (after[n] - before[n]).detach() for n in before if not torch.equal(after[n], before[n])}
    assert changed and all("language_model" in n and n.endswith("_proj.weight") for n in changed)
    assert {int(torch.linalg.matrix_rank(change, rtol=1e-2)) for change in changed.values()} <= {1, 2}

"""Merging is checked by what the merged model writes; whatever is not the adapter on its base is not kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from made_runs import TUNED, greedy, made_run
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmft import Captioner
from mmft.cli import main
from mmft.inference import merge as merging
from mmft.inference.merge import merge
from mmft.recipe import load_recipe
from mmft.training.run import assemble
from mmft.vlm.load import load_model

CASES = ["dora", "rslora", "hybrid", "frozen", "nf4"]


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_is_merged(case, tmp_path, scenes):
    if case == "nf4":
        pytest.importorskip("bitsandbytes")
    made_run(tmp_path / "run", TUNED[case])
    made = merge(tmp_path / "run", tmp_path / "merged")
    assert made.difference <= 1e-4 and made.same == made.captions == 8
    assert (made.changed > 0.1) == (case != "frozen") and bool(made.notes) == (case == "nf4")
    rows = list(scenes[:4])
    whole = Captioner(tmp_path / "run", quantize=None).write(rows).texts
    assert Captioner(tmp_path / "merged").write(rows).texts == whole
    assert whole != Captioner("scenes-vlm").write(rows, max_new_tokens=24).texts


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert main(["merge", str(trained), str(folder)]) == 0
    return folder


def test_the_folder_is_one_of_transformers(merged, trained):
    """No mmft, no PEFT: the weights that transformers loads are base + scaled B A of the adapter's own file."""
    from safetensors.torch import load_file

    model, base = AutoModelForImageTextToText.from_pretrained(merged), load_model("scenes-vlm")[0]
    assert AutoProcessor.from_pretrained(merged).tokenizer.eos_token_id == model.generation_config.eos_token_id
    saved = load_file(trained / "adapter" / "adapter_model.safetensors")
    weights, start = dict(model.named_parameters()), dict(base.named_parameters())
    layers = {name.partition("base_model.model.")[2].rpartition(".lora_")[0] for name in saved}
    assert len(layers) == 21
    for layer in layers:
        a, b = (saved[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        expected = start[f"{layer}.weight"] + 2.0 * (b @ a)  # alpha 32, rank 16
        torch.testing.assert_close(weights[f"{layer}.weight"], expected, rtol=0, atol=1e-6)
    assert all(torch.equal(weights[n], start[n]) for n in start if n.removesuffix(".weight") not in layers)
    assert "run" in (merged / "README.md").read_text() and str(trained.parent) not in (merged / "README.md").read_text()


def test_a_merged_model_is_trained_on(merged, trained, scenes, tmp_path):
    words = [f"model.name={merged}", f"output.dir={tmp_path}", "data.train_rows=4", "eval.rows=4", "output.trackers=[]"]
    words += ["train.steps=1", "rollout.prompts_per_step=2", "rollout.num_generations=2", "train.micro_prompts=null"]
    trainer = assemble(load_recipe("recipes/caption_ppo.yaml", [*words, "eval.every=0"]))
    trainer.train()
    assert trainer.before.texts == Captioner(trained).write(scenes[:4]).texts


def test_what_is_another_model_is_not_kept(trained, tmp_path, monkeypatch):
    def base_alone(policy, found, folder, dtype):
        load_model("scenes-vlm")[0].save_pretrained(folder)
        policy.processor.save_pretrained(folder)

    monkeypatch.setattr(merging, "_save", base_alone)
    with pytest.raises(ValueError, match="not the adapter on its base.*nothing was saved"):
        merge(trained, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_half_precision_that_would_round_the_training_away(tmp_path, capsys):
    made_run(tmp_path / "run", TUNED["rslora"], scale=1e-4)
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 2
    assert "of what training changed" in (said := capsys.readouterr().err) and "--dtype float32" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_half_precision_that_is_precise_enough(trained, tmp_path):
    made = merge(trained, tmp_path / "merged", dtype="bfloat16")
    assert 0 < made.difference < 0.25 < made.changed
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_nothing_is_written_over(trained, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert main(["merge", str(trained), str(tmp_path / "mine")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_is_captioned_and_merged(family, tiny_model, tmp_path, scenes):
    model = {"name": str(tiny_model(family)), "lora": {"r": 4}}
    policy = made_run(tmp_path / "run", model, rollout={"max_completion_length": 8})
    rows = list(scenes[:2]) if "image" in policy.pictures.token_ids else [{"prompt": "What is heard?"}] * 2
    captioner = Captioner(tmp_path / "run")
    assert captioner.write(rows).texts == greedy(policy, rows, 8)
    assert captioner.write(rows, method="beam", num=1).texts == captioner.write(rows).texts
    made = merge(tmp_path / "run", tmp_path / "merged")
    assert made.difference <= 1e-4 < made.changed and made.same == made.captions

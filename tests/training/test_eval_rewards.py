"""`eval.rewards: false`: held-out captions are not shown to the rewards, and everything after copes with that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmft.recipe import load_recipe
from mmft.training.config import PPOConfig, from_recipe
from mmft.training.trainer import PPOTrainer

ROWS = [{"prompt": "say", "image": Image.new("RGB", (32, 32)), "references": ["a dog"]}] * 2
SMALL = {"max_steps": 1, "prompts_per_step": 1, "num_generations": 2, "max_completion_length": 3, "report_to": ()}


class Judge:
    """Counts what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, completions, **columns):
        self.asked.append(len(completions))
        return [float(len(text)) for text in completions]


def lengths(texts, rows, ended):
    return {"length": np.array([float(len(text)) for text in texts])}


@pytest.mark.parametrize("wanted", [True, False])
def test_the_rewards_are_asked_of_held_out_captions_only_where_wanted(wanted, tiny_model, tmp_path):
    judge, model = Judge(), str(tiny_model("llava"))
    config = PPOConfig(output_dir=str(tmp_path / "run"), eval_rewards=wanted, **SMALL)
    trainer = PPOTrainer(model, judge, config, ROWS, ROWS, compute_metrics=lengths)
    trainer.train()
    # Once in training, of two responses; and before and after it, of both held-out rows.
    assert judge.asked == ([2, 2, 2] if wanted else [2])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "length" in summary["before"] and "length" in summary["after"]
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert ('"reward' in samples) == wanted
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Words per caption" in page


def test_rewards_that_are_the_only_metrics_are_needed(tiny_model):
    config = PPOConfig(eval_rewards=False, **SMALL)
    with pytest.raises(ValueError, match="eval_rewards=False.*compute_metrics"):
        PPOTrainer(str(tiny_model("llava")), Judge(), config, ROWS, ROWS)


def test_the_key_reaches_the_trainer(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("eval: {rewards: false}\n")
    assert from_recipe(load_recipe(file)).eval_rewards is False
    assert from_recipe(load_recipe(file, ["eval.rewards=true"])).eval_rewards is True
    with pytest.raises(ValueError, match="eval_rewards='no': expected true or false"):
        PPOConfig(eval_rewards="no")

"""PPO itself, without a reference to compare with: bandits of known optimum, on a real (tiny) model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmft.training.config import A2CConfig, PPOConfig
from mmft.training.trainer import A2CTrainer, PPOTrainer
from mmft.vlm.load import build_policy, load_model, lora_config

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
WANTED = {"red": str.isalpha, "blue": str.isdigit}
ROWS = [
    {"id": name, "prompt": "which", "image": Image.new("RGB", (32, 32), rgb), "colour": name}
    for name, rgb in COLOURS.items()
]


def contextual_bandit(completions, colour, **_):
    """1 for a letter under the red picture and for a digit under the blue one. The optimum, 1, needs the picture:
    whoever ignores it gets 0.5 at most."""
    return [float(t.isascii() and WANTED[c](t)) for t, c in zip(completions, colour, strict=True)]


def train(tiny_model, tmp_path, trainer_class, config_class, **options):
    torch.manual_seed(0)
    model, processor = load_model(str(tiny_model("llava")))
    policy = build_policy(model, processor, lora_config(model, r=8), critic=options.get("critic", "head"))
    config = config_class(
        output_dir=str(tmp_path),
        max_steps=60,
        prompts_per_step=8,
        num_generations=16,
        max_completion_length=1,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        kl_coef=0.0,
        report_to=(),
        **options,
    )
    trainer = trainer_class(policy, contextual_bandit, config, ROWS)
    history = [trainer.step(step) for step in range(1, config.max_steps + 1)]
    return history


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "options"),
    [
        (PPOTrainer, PPOConfig, {"critic": "head"}),
        (PPOTrainer, PPOConfig, {"critic": "none"}),
        (A2CTrainer, A2CConfig, {"critic": "head"}),
    ],
    ids=["ppo", "ppo-leave-one-out", "a2c"],
)
def test_bandit_reaches_95_percent_of_the_optimum(tiny_model, tmp_path, trainer_class, config_class, options):
    history = train(tiny_model, tmp_path, trainer_class, config_class, **options)
    first = history[0]["reward"]
    last = sum(metrics["reward"] for metrics in history[-5:]) / 5
    print(f"\nmean reward of samples: first step {first:.3f}, last five steps {last:.3f} (optimum 1)")
    assert first < 0.5 and last >= 0.95
    assert all(abs(metrics["first_ratio_error"]) <= 1e-4 for metrics in history)

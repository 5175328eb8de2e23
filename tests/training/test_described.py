"""A run that was put together in Python writes a recipe that says the same run."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from mmft.recipe import load_recipe
from mmft.training.config import A2CConfig, PPOConfig, from_recipe
from mmft.training.described import describe
from mmft.training.guards import DEFAULT_GUARDS, Guard
from mmft.training.run import rewards_of
from mmft.training.trainer import A2CTrainer, PPOTrainer
from reward_models import DocumentFrequencies
from reward_models.metrics.bleu import Bleu
from reward_models.metrics.cider import CiderD
from reward_models.terms import Format

ROWS = [{"prompt": "say", "image": Image.new("RGB", (32, 32))}] * 4


def reward(completions, **columns):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def make(tiny_model):
    """options, rewards -> a trainer; the model is loaded once."""
    policy = None

    def made(config: PPOConfig, rewards=reward):
        nonlocal policy
        kind = A2CTrainer if isinstance(config, A2CConfig) else PPOTrainer
        trainer = kind(policy or str(tiny_model("llava")), rewards, config, ROWS)
        policy = trainer.policy
        return trainer

    return made


ODD = {
    "kl_target": 3.0,
    "missing_eos_penalty": 0.5,
    "value_learning_rate": 0.1,
    "vllm": {"url": None, "memory": 0.5},
    "eval_steps": 2,
    "patience": 3,
    "cache_bytes": 5 << 20,
    "cache_disk_bytes": 7 << 20,
    "report_to": ("ledger",),
    "guards": {"held_out": Guard(0.1, "stop", patience=4), "blank_picture": Guard(0.3, every=5)},
}


@pytest.mark.parametrize(
    "config",
    [
        PPOConfig(),
        A2CConfig(),
        PPOConfig(cliprange_value=None, timeout=None),  # null, where the recipe's own default is a number
        PPOConfig(**ODD),
        PPOConfig(guards={}),
    ],
    ids=["ppo", "a2c", "nulls", "odd", "no guards"],
)
def test_the_recipe_gives_the_config_back(make, tmp_path, config):
    config = dataclasses.replace(config, output_dir=str(tmp_path))
    describe(make(config), tmp_path / "recipe.yaml")
    found = from_recipe(load_recipe(tmp_path / "recipe.yaml"))
    assert type(found) is type(config)
    assert config.vllm is None or found.vllm == found.vllm | config.vllm
    for field in dataclasses.fields(config):
        if field.name not in ("vllm", "guards", "eval_batch"):  # the last is in no recipe
            assert getattr(found, field.name) == getattr(config, field.name), field.name
    own = {"blank_picture": "every", "held_out": "patience"}
    for name in DEFAULT_GUARDS:
        keys = ("limit", "action", own.get(name, "limit"))
        one, two = (guards.get(name) for guards in (found.guards, config.guards))
        assert (one is None) == (two is None), name
        assert one is None or all(getattr(one, key) == getattr(two, key) for key in keys), name


def test_the_recipe_makes_the_reward_objects_again(make, tmp_path):
    frequencies = DocumentFrequencies.from_references([["a dog runs"], ["a cat sits"]])
    rewards = [CiderD(frequencies, n=3, sigma=4.0), Bleu(2, tokenizer="ptb"), Format(ends_with=(".", "!"), strict=True)]
    trainer = make(PPOConfig(output_dir=str(tmp_path), reward_weights=[1.0, 0.5, 0.2]), rewards)
    describe(trainer, tmp_path / "recipe.yaml")
    again = rewards_of(load_recipe(tmp_path / "recipe.yaml"), frequencies)
    assert [part.signature for part in again.parts] == [part.signature for part in trainer.reward_funcs.parts]


def test_a_key_among_a_reward_s_options_is_not_written(make, tmp_path):
    class Judge:
        def __init__(self, api_key, auth, model):
            self.api_key, self.auth, self.model = api_key, auth, model

        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

    judge = Judge("open sesame", "let me in", "large")
    describe(make(PPOConfig(output_dir=str(tmp_path)), judge), tmp_path / "recipe.yaml")
    (said,) = load_recipe(tmp_path / "recipe.yaml").rewards
    assert said.options == {"api_key": "(hidden)", "auth": "(hidden)", "model": "large"}


def test_a_run_that_no_recipe_can_say_is_told(make, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\n")  # of an earlier run in this folder
    describe(make(PPOConfig(cliprange=(0.2, 0.3), output_dir=str(tmp_path))), path)
    assert not path.exists()
    assert "no recipe.yaml is written" in (said := capsys.readouterr().err) and "algorithm.cliprange" in said


def test_a_refused_resume_leaves_the_recipe_as_it_is(make, tmp_path):
    sizes = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 3, "report_to": ()}
    config = PPOConfig(output_dir=str(tmp_path), max_steps=1, save_steps=1, **sizes)
    make(config).train()
    before = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match="made with seed 0, this run has seed 7"):
        make(dataclasses.replace(config, seed=7)).train(resume_from_checkpoint=True)
    assert (tmp_path / "recipe.yaml").read_bytes() == before

"""Options given in Python are held to the ranges of the recipe's keys."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

from mmft.recipe import Recipe
from mmft.training.config import A2CConfig, PPOConfig, from_recipe
from mmft.training.from_trl import settled


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": -1e-4}, "learning_rate=-0.0001: expected a finite number > 0"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4': expected a finite number > 0"),
        ({"num_generations": 0}, "num_generations=0: expected a whole number >= 1"),
        ({"max_steps": 2.5}, "max_steps=2.5: expected a whole number >= 1"),
        ({"eval_batch": 0}, "eval_batch=0"),
        ({"gamma": 2, "seed": -1}, "seed=-1: expected a whole number >= 0 and < 4294967296; gamma=2: expected"),
        ({"beta": -1.0}, "kl_coef=-1.0: expected a finite number >= 0"),
        ({"cliprange": 0}, "cliprange=0: expected a number > 0, or two of them"),
        ({"cliprange": (0.1, 0.2, 0.3)}, "cliprange=(0.1, 0.2, 0.3)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: expected a finite number > 0"),  # would shorten all to nothing
        ({"num_train_epochs": 0}, "num_train_epochs=0: expected a number > 0"),
        ({"reward_weights": 0.5}, "reward_weights=0.5: expected a list"),
        ({"guards": {"shares": None}}, "expected a dict with a Guard for some of bad_endings, "),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: expected a whole number >= 1"),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 0}, "steps_per_generation=0"),
        ({"use_vllm": True, "vllm_mode": "remote"}, "vllm_mode='remote' cannot be had here: expected colocate"),
    ],
)
@pytest.mark.parametrize("cls", [PPOConfig, A2CConfig])
def test_what_is_out_of_range_is_refused(cls, options, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError) as error:
            cls(**options)
    assert words in str(error.value)


def test_what_is_in_range_is_taken():
    taken = {"seed": np.int64(3), "learning_rate": np.float32(1e-3), "cliprange": (0.2, 0.28), "timeout": None}
    config = PPOConfig(**taken, entropy_coef=-0.1, guards={}, save_steps=0.5, num_train_epochs=1)
    assert {name: getattr(config, name) for name in taken} == taken


def test_steps_below_nothing_are_refused():
    with pytest.raises(ValueError, match="eval_steps=-2: expected a whole number of steps"):
        settled(PPOConfig(eval_steps=-2), rows=8)


@pytest.mark.parametrize(("name", "cls"), [("ppo", PPOConfig), ("a2c", A2CConfig)])
def test_what_nobody_says_is_the_same_in_a_recipe_and_in_python(name, cls):
    recipe, python = from_recipe(Recipe.model_validate({"algorithm": {"name": name}})), cls()
    other = {f.name for f in dataclasses.fields(cls) if getattr(recipe, f.name) != getattr(python, f.name)}
    # A recipe saves and evaluates on the way, and spells out what a vLLM server would be.
    assert other == {"output_dir", "save_steps", "eval_steps", "vllm"}

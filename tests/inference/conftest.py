"""A run in Python and pictures, once for all tests of using what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmft import PPOConfig, PPOTrainer, load_rows


@pytest.fixture(scope="session")
def scenes():
    return load_rows("scenes", "test", limit=8)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, scenes) -> Path:
    """The folder of two steps on the bundled model, by the lines of the README."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train = load_rows("scenes", "train", limit=8)
    sizes = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "save_steps": 1}
    args = PPOConfig(str(folder), **sizes, learning_rate=0.02, report_to=())
    PPOTrainer("scenes-vlm", "cider_d", args, train, scenes, peft_config="lora").train()
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory, scenes) -> Path:
    """A folder with images/ of eight drawn pictures."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    for i, row in enumerate(scenes):
        row["image"].save(folder / "images" / f"{i}.png")
    return folder

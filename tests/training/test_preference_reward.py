"""A learned reward inside a run: it reads the policy's own base weights and leaves the policy alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_trainer import rows, trainer_of, weights

from reward_models import RewardPart, WeightedRewards
from reward_models.preference import Pair, PreferenceReward, train_preference


@pytest.fixture(scope="module")
def judge(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    pairs = [Pair(row["prompt"], (row["image"],), row["wanted"] * 3, "xyz", id=row["id"]) for row in rows()]
    options = {"backbone": str(tiny_model("llava")), "heads": 2, "lora": 2, "steps": 3, "batch_size": 3, "width": 8}
    train_preference(pairs, folder, calibration=pairs, log=None, **options)
    return folder


def rewards(folder):
    return WeightedRewards([RewardPart("preference", PreferenceReward.load(folder), normalize="running")])


def parameters(trainer) -> int:
    return sum(p.numel() for p in trainer.policy.parameters())


def test_it_shares_the_policys_weights(tiny_model, judge, tmp_path):
    plain = parameters(trainer_of(tiny_model, tmp_path / "a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a judge with a model of its own would be announced
        trainer = trainer_of(tiny_model, tmp_path / "b", rewards(judge))
    added = parameters(trainer) - plain
    assert 0 < added < 0.1 * plain
    base = trainer.policy.model.get_base_model()
    assert trainer.reward_funcs.parts[0].function.judge.backbone.model is trainer.policy.model
    assert base is trainer.policy.model.get_base_model()
    trained = set(weights(trainer))
    metrics = trainer.step(1)
    assert set(weights(trainer)) == trained and not any("preference" in name for name in trained)
    assert np.isfinite(metrics["reward/preference"]) and metrics["reward/preference/std"] >= 0
    assert metrics["first_ratio_error"] <= 1e-4


def test_a_run_with_it_resumes_bitwise_and_saves_the_policys_adapter_alone(tiny_model, judge, tmp_path):
    unbroken = trainer_of(tiny_model, tmp_path / "a", rewards(judge), save_steps=2)
    unbroken.train()
    resumed = trainer_of(tiny_model, tmp_path / "b", rewards(judge), save_steps=2)
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoints" / "step-000002")
    for name, value in weights(unbroken).items():
        assert torch.equal(value, weights(resumed)[name]), name
    saved = sorted(p.name for p in (tmp_path / "a" / "adapter").iterdir())
    assert saved == ["adapter_config.json", "adapter_model.safetensors"]


def test_full_fine_tuning_gives_it_a_model_of_its_own(tiny_model, judge, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, rewards(judge), full=True)
    assert np.isfinite(trainer.step(1)["reward/preference"])
    assert trainer.reward_funcs.parts[0].function.judge.backbone.model is not trainer.policy.model

"""Guards on live numbers: when each speaks, what it leads to."""

from __future__ import annotations

import json

import pytest
import torch
from test_trainer import trainer_of, weights

from mmft.evaluation.health import text_health
from mmft.training.guards import DEFAULT_GUARDS, LIMITS, Guard, Guards
from reward_models import RewardPart, WeightedRewards

SOUND = {"bad_ending": 0.0, "repetition": 0.0, "words": 10.0, "reward": 1.0}


def spoken(guards, *steps):
    return [[alarm.guard for alarm in guards.look(i, SOUND | step)] for i, step in enumerate(steps, 1)]


def test_health_by_hand():
    found = text_health(["a dog with the", "a dog", "", "red red red red"])
    assert found["words"].tolist() == [4, 2, 0, 4]
    assert found["bad_ending"].tolist() == [1, 0, 1, 0]
    assert found["repetition"].tolist() == [0, 0, 0, pytest.approx(2 / 3)]


def test_a_sound_run_is_left_in_peace():
    guards = Guards(DEFAULT_GUARDS)
    assert spoken(guards, *[{"share/a": 0.5, "share/b": 0.5}] * 10) == [[]] * 10


def test_each_number_has_its_guard():
    def after_five_sound(**change):
        return spoken(Guards(DEFAULT_GUARDS), *[{}] * 5, *[change] * 4)[5:]

    assert ["bad_endings"] in after_five_sound(bad_ending=0.9)
    assert ["repetition"] in after_five_sound(repetition=0.9)
    assert ["length_drift"] in after_five_sound(words=20.0)
    assert ["length_drift"] in after_five_sound(words=2.0)
    assert ["share"] in after_five_sound(**{"share/a": 0.99, "share/b": 0.01})
    assert ["blank_picture"] in after_five_sound(blank_picture=0.5)


def test_it_speaks_once_and_again_after_coming_back():
    bad, sound = {"bad_ending": 1.0}, {"bad_ending": 0.0}
    # the mean of three steps: 1/3 > 0.2 at once, 0 again three sound steps later
    assert spoken(Guards(DEFAULT_GUARDS), sound, sound, bad, bad, sound, sound, sound, bad) == [
        [], [], ["bad_endings"], [], [], [], [], ["bad_endings"]
    ]  # fmt: skip


def test_one_part_alone_has_no_share_to_hold():
    assert spoken(Guards(DEFAULT_GUARDS), {"share/a": 1.0}) == [[]]


def test_held_out_against_the_reward():
    guards = Guards({"held_out": Guard(0.03, "stop", patience=2)})
    story = [(1.0, 2.0), (2.0, 3.0), (3.0, 2.5), (4.0, 2.4), (5.0, 2.3)]  # training reward, held-out metric
    found = []
    for step, (reward, value) in enumerate(story):
        guards.look(step, SOUND | {"reward": reward})
        found.append([(a.guard, a.action) for a in guards.held_out(step, value, "cider_d")])
    assert found == [[], [], [], [("held_out", "stop")], []] and guards.best_step == 1


def test_held_out_may_fall_with_the_reward():
    guards = Guards({"held_out": Guard(0.03, "stop", patience=1)})
    for step, (reward, value) in enumerate([(3.0, 3.0), (1.0, 2.0), (0.5, 1.0)]):
        guards.look(step, SOUND | {"reward": reward})
        assert guards.held_out(step, value) == []


def test_state_goes_on_where_it_was():
    one, other = Guards(DEFAULT_GUARDS), Guards(DEFAULT_GUARDS)
    spoken(one, *[{}] * 4, {"words": 14.0})
    one.held_out(5, 2.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert json.dumps(other.state_dict()) == json.dumps(one.state_dict())
    assert other.look(6, SOUND | {"words": 90.0})[0].text == one.look(6, SOUND | {"words": 90.0})[0].text


def test_wrong_guards_are_refused():
    with pytest.raises(ValueError, match="unknown guard 'lenght'.*length_drift"):
        Guards({"lenght": Guard(1.0)})
    with pytest.raises(ValueError, match="'halt': expected one of log, stop, rollback"):
        Guard(1.0, "halt")
    assert set(DEFAULT_GUARDS) == set(LIMITS)


def more_text(completions, **_):
    """A reward that can be had by writing nothing sensible at all."""
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("action", ["log", "stop", "rollback"])
def test_what_follows_an_alarm(tiny_model, tmp_path, action):
    guards = {"repetition": Guard(-1.0, action)}  # any text is beyond this limit: speaks at step 1
    options = {"guards": guards, "max_steps": 3, "learning_rate": 1e-2, "eval_steps": 5}
    trainer = trainer_of(tiny_model, tmp_path, more_text, **options)
    started = weights(trainer)
    summary = trainer.train()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == ([1, 2, 3] if action == "log" else [1])
    assert [(a["guard"], a["step"], a["action"]) for a in summary["alarms"]] == [("repetition", 1, action)]
    assert json.loads((tmp_path / "alarms.jsonl").read_text())["guard"] == "repetition"
    assert summary["rolled_back_to"] == (0 if action == "rollback" else None)
    unchanged = all(torch.equal(value, started[name]) for name, value in weights(trainer).items())
    assert unchanged is (action == "rollback")


def test_blank_pictures_are_tried_when_asked_for(tiny_model, tmp_path):
    blind = {"blank_picture": Guard(0.4, every=2)}
    trainer = trainer_of(tiny_model, tmp_path, lambda completions, **_: [1.0] * len(completions), guards=blind)
    # A constant reward is earned without the picture every time.
    assert "blank_picture" not in trainer.step(1) and trainer.step(2)["blank_picture"] == 1.0


def test_alarms_survive_a_resume(tiny_model, tmp_path):
    options = {"guards": {"repetition": Guard(-1.0)}, "max_steps": 4, "save_steps": 2}
    trainer_of(tiny_model, tmp_path, more_text, **options).train()
    resumed = trainer_of(tiny_model, tmp_path, more_text, **options)
    summary = resumed.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-000002")
    assert [(a["guard"], a["step"]) for a in summary["alarms"]] == [("repetition", 1)]


def test_rollback_after_a_resume_that_brought_no_best_state(tiny_model, tmp_path):
    """The first run kept none, for its guards only logged: the training stops and says so, and its result is there."""
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 10}
    trainer_of(tiny_model, tmp_path / "a", more_text, guards={"repetition": Guard(2.0)}, **options).train()
    resumed = trainer_of(
        tiny_model, tmp_path / "b", more_text, guards={"repetition": Guard(-1.0, "rollback")}, **options
    )
    summary = resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoints" / "step-000002")
    assert summary["rolled_back_to"] is None and summary["alarms"][0]["step"] == 3
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").is_file()


def test_rollback_without_evaluations_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="set eval_steps"):
        trainer_of(tiny_model, tmp_path, more_text, guards={"repetition": Guard(0.2, "rollback")})


@pytest.mark.parametrize("how", [None, "group", "batch"])
def test_blank_pictures_are_compared_in_plain_scores(tiny_model, tmp_path, how):
    # Kills: normalised scores of one side against bare ones of the other.
    part = RewardPart("ids", lambda completion_ids, **_: [7.0 + len(ids) for ids in completion_ids], normalize=how)
    guards = {"blank_picture": Guard(0.4, every=1)}
    trainer = trainer_of(tiny_model, tmp_path, WeightedRewards([part]), guards=guards, max_completion_length=2)
    vocabulary = trainer.policy.banned.shape[0]
    trainer.policy.ban([i for i in range(vocabulary) if i not in trainer.policy.end_ids])
    assert trainer.step(1)["blank_picture"] == 1.0  # every text is the end token alone: 8 on both sides
    assert trainer.step(2)["reward"] == 8.0


def test_not_a_number_is_no_alarm():
    assert spoken(Guards(DEFAULT_GUARDS), {"blank_picture": float("nan")}) == [[]]


def test_a_part_without_spread_leaves_all_of_it_to_the_other(tiny_model, tmp_path):
    parts = [RewardPart("text", more_text), RewardPart("flat", lambda completions, **_: [1.0] * len(completions))]
    metrics = trainer_of(tiny_model, tmp_path, WeightedRewards(parts)).step(1)
    assert (metrics["share/text"], metrics["share/flat"]) == (1.0, 0.0)

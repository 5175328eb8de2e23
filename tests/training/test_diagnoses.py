"""The classic failures: each is made in a real run where that is cheap, on a series of numbers elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_trainer import trainer_of

from mmft.training.config import PPOConfig
from mmft.training.diagnoses import DIAGNOSES, Diagnoses
from mmft.training.guards import DEFAULT_GUARDS, Guards

# The 60 steps of recipes/caption_ppo.yaml, and of the A2C recipe without a critic.
HEALTHY = {
    path.stem: [json.loads(line) for line in path.read_text().splitlines()]
    for path in sorted((Path(__file__).parent / "healthy_runs").glob("*.jsonl"))
}
SOUND = HEALTHY["caption_ppo"][30]


def told(config: PPOConfig, lines: list[dict]) -> list[tuple[str, int]]:
    diagnoses = Diagnoses(config)
    return [(alarm.guard, alarm.step) for step, line in enumerate(lines, 1) for alarm in diagnoses.look(step, line)]


def after_sound(steps: int = 5, **numbers: float) -> list[dict]:
    return [SOUND] * steps + [SOUND | numbers] * 30


@pytest.fixture
def run(tiny_model, tmp_path):
    """``run(reward, steps, **options)`` -> name, step and text of what a run on a tiny model was told."""

    def go(reward, steps: int, **options) -> dict[str, tuple[int, str]]:
        trainer = trainer_of(tiny_model, tmp_path, reward, max_steps=steps, guards={}, **options)
        alarms = [alarm for step in range(1, steps + 1) for alarm in trainer.guards.look(step, trainer.step(step))]
        assert len({alarm.guard for alarm in alarms}) == len(alarms), "said twice"
        return {alarm.guard: (alarm.step, alarm.text) for alarm in alarms}

    return go


def graded(completions, **_):
    """A number that nearly every text has to itself, and that nothing learns."""
    return [sum(map(ord, text)) % 101 / 100 for text in completions]


# ---------------------------------------------------------------- sound runs


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_in_peace(name):
    critic = {"caption_ppo": "head", "caption_a2c": "none"}[name]
    assert len(HEALTHY[name]) == 60 and told(PPOConfig(critic=critic), HEALTHY[name]) == []


# ---------------------------------------------------------------- real failures


def test_a_constant_reward(run):
    found = run(lambda completions, **_: [0.0] * len(completions), 3)
    step, text = found["equal_rewards"]
    assert (
        step == 2 and "same number to nearly every response" in text and text.endswith("docs/metrics.md#equal_groups")
    )


def test_a_reward_that_no_response_changes(run):
    """It differs from prompt to prompt, so the step's rewards do; but no response is better than another."""
    found = run(lambda wanted, **_: [float(ord(w)) for w in wanted], 3, critic="none", kl_coef=0.0)
    assert "to all responses to a prompt" in found["equal_rewards"][1] and found["no_gradient"][0] == 2


def test_responses_that_are_all_the_same(run):
    found = run(graded, 3, temperature=1e-3)
    assert "all responses to a prompt are the same text" in found["equal_rewards"][1]


def test_rewards_that_drop_everything(run, tiny_model):
    from reward_models import RewardPart, WeightedRewards

    nothing = RewardPart("nothing", lambda completions, **_: [float("nan")] * len(completions), nonfinite="drop")
    assert "all responses were dropped" in run(WeightedRewards([nothing]), 3)["equal_rewards"][1]


def test_a_learning_rate_far_too_high(run):
    found = run(graded, 5, learning_rate=0.05, num_ppo_epochs=4, critic="none", kl_coef=0.001)
    assert found["clipped"][0] == 3 and found["kl_running_away"][0] == 4  # the first step is the reference itself
    assert "algorithm.kl_coef" in found["kl_running_away"][1] and "train.learning_rate" in found["clipped"][1]


def test_a_policy_that_collapses(run):
    """Driven there by an entropy bonus of the wrong sign."""
    found = run(graded, 8, learning_rate=0.02, entropy_coef=-1.0)
    assert "algorithm.entropy_coef=0.01" in found["entropy_collapse"][1]


def test_a_policy_that_does_not_move(run):
    found = run(graded, 26, learning_rate=1e-12, value_learning_rate=1e-2, prompts_per_step=2)
    assert found["not_moving"][0] == 25  # 20 steps of grace, then five in a row
    assert "no_gradient" not in found and "kl_running_away" not in found


def test_responses_without_an_end(run):
    found = run(graded, 6, max_completion_length=2)
    step, text = found["never_ending"]
    assert step == 5 and "rollout.max_completion_length" in text


# ---------------------------------------------------------------- series of numbers


def test_a_critic_that_foresees_nothing():
    config = PPOConfig()
    assert told(config, [SOUND | {"explained_variance": 0.0}] * 40) == [("critic_not_learning", 22)]
    assert told(PPOConfig(critic="none"), [SOUND | {"explained_variance": 0.0}] * 40) == []
    # Equal rewards leave nothing to foresee; that is said, and only that.
    flat = SOUND | {"explained_variance": 0.0, "equal_groups": 1.0, "reward_std": 0.0}
    assert told(config, [flat] * 40) == [("equal_rewards", 2)]


def test_a_reward_that_stays_where_it_was():
    noise = [0.1, -0.2, 0.3, 0.0, -0.1, 0.2, -0.3]

    def series(gain: float) -> list[dict]:
        return [SOUND | {"reward": 1.0 + gain * i + noise[i % 7]} for i in range(60)]

    assert told(PPOConfig(), series(0.0)) == [("reward_not_rising", 44)]
    assert told(PPOConfig(), series(-0.01)) == [("reward_not_rising", 44)]
    assert told(PPOConfig(), series(0.002)) == [("reward_not_rising", 44)]  # less than chance moves it
    assert told(PPOConfig(), series(0.01)) == []
    assert told(PPOConfig(prompts_per_step=8), series(0.0)) == []  # 60 steps are 480 prompts: chance still rules


def test_the_kl_limit_follows_length_and_target():
    config = PPOConfig(kl_target=2.0)
    long = {"response_length": 100.0}
    assert told(PPOConfig(), after_sound(kl=8.0)) == [("kl_running_away", 8)]
    assert told(PPOConfig(), after_sound(kl=8.0, **long)) == []
    assert told(config, after_sound(kl=8.0, **long)) == [("kl_running_away", 8)]
    assert told(config, after_sound(kl=5.0, **long)) == []
    assert told(PPOConfig(kl_coef=0.0), after_sound(kl=8.0)) == []  # nobody measures it there


def test_one_bad_step_is_no_failure():
    bad = SOUND | {"kl": 99.0, "entropy": 0.0, "clip_fraction": 1.0, "ended_fraction": 0.0, "grad_norm": 0.0}
    lines = [SOUND] * 5 + ([bad] + [SOUND] * 4) * 6
    assert told(PPOConfig(), lines) == []


def test_it_speaks_again_only_after_it_was_gone():
    ill, sound = SOUND | {"clip_fraction": 0.9}, SOUND
    assert told(PPOConfig(), [ill] * 5 + [sound] * 9 + [ill] * 5) == [("clipped", 3)]
    assert told(PPOConfig(), [ill] * 5 + [sound] * 10 + [ill] * 5) == [("clipped", 3), ("clipped", 18)]


def test_a_resumed_run_is_told_the_same():
    lines = [SOUND | {"reward": 2.0, "explained_variance": 0.0, "clip_fraction": 0.9 * (i % 9 > 3)} for i in range(60)]
    unbroken = told(PPOConfig(), lines)
    assert {name for name, _ in unbroken} == {"clipped", "critic_not_learning", "reward_not_rising"}
    for cut in (1, 5, 21, 43):
        guards = [Guards(DEFAULT_GUARDS, None, Diagnoses(PPOConfig())) for _ in range(2)]
        for step, line in enumerate(lines[:cut], 1):
            guards[0].look(step, line)
        guards[1].load_state_dict(json.loads(json.dumps(guards[0].state_dict())))
        for step, line in enumerate(lines[cut:], cut + 1):
            guards[1].look(step, line)
        assert [(a.guard, a.step) for a in guards[1].alarms if a.guard in DIAGNOSES] == unbroken


def test_numbers_that_are_missing_say_nothing():
    """A step that taught nothing has no numbers of an update, and one that dropped everything no reward."""
    lost = {k: v for k, v in SOUND.items() if k not in ("grad_norm", "clip_fraction", "equal_groups")}
    assert told(PPOConfig(), [lost | {"reward": float("nan"), "entropy": float("nan")}] * 50) == []
    ill, unknown = SOUND | {"clip_fraction": 0.9}, SOUND | {"clip_fraction": float("nan")}
    assert told(PPOConfig(), [ill] * 5 + [unknown] * 10 + [ill] * 5) == [("clipped", 3)]  # it was not gone

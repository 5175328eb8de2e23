"""Dense rewards, shaping and dropped rows on their way from the reward side to the update."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_trainer import rows, trainer_of, weights

from mmft.algorithms import returns
from mmft.batch import Responses
from mmft.training import rollout as stages
from reward_models import WeightedRewards
from reward_models.rewards import RewardPart


def letters(text: str) -> float:
    return float(sum(c.isascii() and c.isalpha() for c in text))


class Letters:
    """1 for each letter; dense or not."""

    __name__ = "letters"

    def __call__(self, completions, **_):
        return [letters(text) for text in completions]

    def increments(self, pieces, **_):
        return [np.array([letters(piece) for piece in row]) for row in pieces]


def sampled(trainer, step=1):
    rollout = stages.sample(trainer.policy, trainer.prompts(step), trainer.config, step)
    pieces = stages.pieces_of(trainer.policy, rollout.responses)
    stages.score(rollout, trainer.reward_funcs, trainer.config, step, pieces)
    return rollout, pieces


def with_credit(tiny_model, folder, credit, **options):
    return trainer_of(tiny_model, folder, WeightedRewards([RewardPart("letters", Letters(), 2.0, credit)]), **options)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_pieces_join_to_the_text(tiny_model, tmp_path, family):
    # Kills: a character cut between two tokens, special tokens read as text, blanks lost between tokens.
    trainer = trainer_of(tiny_model, tmp_path, model=str(tiny_model(family)))
    tokenizer = trainer.policy.tokenizer
    rows = [tokenizer.encode(t, add_special_tokens=False) for t in ("a cat's café 🐈‍⬛ it", "naïve", " x  y ", "")]
    rows[1] = [*rows[1], tokenizer.eos_token_id]
    rows.append(rows[0][:-4])  # may end within a character
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id or 0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    pieces = stages.pieces_of(trainer.policy, Responses(ids, mask, torch.ones(len(rows), dtype=torch.bool)))
    assert [len(p) for p in pieces] == [len(row) for row in rows]
    assert ["".join(p) for p in pieces] == tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert pieces[1][-1] == "" and sum(map(bool, pieces[0])) > 5


def test_dense_rewards_pay_each_token_and_the_score_once(tiny_model, tmp_path):
    trainer = with_credit(tiny_model, tmp_path, "dense", kl_coef=0.0, gamma=0.9)
    rollout, pieces = sampled(trainer)
    stages.earn(rollout, trainer.config, 0.0)
    for row, mask, own, text in zip(rollout.rewards, rollout.responses.mask, pieces, rollout.texts, strict=True):
        assert row[mask].tolist() == [2.0 * letters(piece) for piece in own]
        assert row.sum() == 2.0 * letters(text)
    assert rollout.scores.tolist() == [2.0 * letters(text) for text in rollout.texts]


def test_shaping_and_dense_agree_without_discount_and_part_with_it(tiny_model, tmp_path):
    def token_rewards(credit, gamma):
        trainer = with_credit(tiny_model, tmp_path / f"{credit}{gamma}", credit, kl_coef=0.0, gamma=gamma)
        rollout, _ = sampled(trainer)
        stages.earn(rollout, trainer.config, 0.0)
        return rollout

    dense, shaped, last = (token_rewards(credit, 1.0) for credit in ("dense", "shaping", "last"))
    assert dense.rewards.abs().sum() > 0
    torch.testing.assert_close(shaped.rewards, dense.rewards)
    assert not torch.allclose(last.rewards, dense.rewards)
    # Shaping keeps the discounted return from the start, whatever gamma is (Ng et al. 1999); dense pay does not.
    shaped, last, dense = (token_rewards(credit, 0.8) for credit in ("shaping", "last", "dense"))
    start = [returns.discounted_returns(r.rewards, r.responses.mask, 0.8)[:, 0] for r in (shaped, last, dense)]
    torch.testing.assert_close(start[0], start[1])
    assert not torch.allclose(start[0], start[2])


@pytest.mark.parametrize("critic", ["head", "none"])
def test_dropped_rows_are_as_if_they_had_not_been_sampled(tiny_model, tmp_path, critic):
    """A reward of NaN under `drop`, or any other number of the same rows: the update is the same."""

    def run(bad):
        def reward(completions, **_):
            return [bad if i % 3 == 1 else letters(text) for i, text in enumerate(completions)]

        part = RewardPart("letters", reward, 1.0, nonfinite="drop")
        trainer = trainer_of(tiny_model, tmp_path / f"{bad}", WeightedRewards([part]), critic=critic)
        metrics = trainer.step(1)
        return metrics, weights(trainer)

    (one, left), (two, same) = run(float("nan")), run(float("inf"))
    assert one["reward"] == two["reward"] and np.isfinite(one["policy_loss"])
    assert all(torch.equal(left[name], same[name]) for name in left)
    _, other = run(100.0)
    assert not all(torch.equal(left[name], other[name]) for name in left)


def test_a_step_whose_rows_are_all_dropped_changes_nothing(tiny_model, tmp_path):
    reward = RewardPart("broken", lambda completions, **_: [float("nan")] * len(completions), nonfinite="drop")
    trainer = trainer_of(tiny_model, tmp_path, WeightedRewards([reward]))
    before = weights(trainer)
    trainer.step(1)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_moments_of_running_normalisation_survive_a_resume(tiny_model, tmp_path):
    def trainer(folder):
        part = RewardPart("letters", Letters(), 1.0, normalize="running")
        return trainer_of(tiny_model, tmp_path / folder, WeightedRewards([part]), save_steps=2)

    unbroken = trainer("a")
    unbroken.train()
    resumed = trainer("b")
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoints" / "step-000002")
    # 4 steps of 12 responses; held-out scores in between have taught it nothing
    assert resumed.reward_funcs.state_dict()["moments"]["letters"]["count"] == 48
    assert resumed.reward_funcs.state_dict() == unbroken.reward_funcs.state_dict()
    for name, value in weights(unbroken).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_every_reward_sees_the_picture_and_every_column(tiny_model, tmp_path):
    seen = {}

    def look(prompts, completions, image, wanted, id, ended, completion_ids, **_):
        seen.update(sizes={picture.size for picture in image}, ids=id, wanted=wanted, ended=ended)
        assert len(image) == len(completions) == len(completion_ids) == len(prompts)
        return [0.0] * len(completions)

    trainer_of(tiny_model, tmp_path, look).step(1)
    assert seen["sizes"] == {rows(1)[0]["image"].size} and len(set(seen["ids"])) == 4 and len(seen["ended"]) == 12


@pytest.mark.parametrize("critic", ["head", "none"])
def test_empty_and_equal_responses_teach_nothing_and_break_nothing(tiny_model, tmp_path, critic):
    def constant(completions, **_):
        assert set(completions) == {""}
        return [1.0] * len(completions)

    trainer = trainer_of(tiny_model, tmp_path, constant, rows(1), prompts_per_step=1, critic=critic)
    vocabulary = trainer.policy.banned.shape[0]
    trainer.policy.ban([i for i in range(vocabulary) if i not in trainer.policy.end_ids])  # the end token comes first
    before = weights(trainer)
    metrics = [trainer.step(step) for step in (1, 2)]
    assert [m["equal_groups"] for m in metrics] == [1.0, 1.0]  # which the diagnoses tell
    assert all(np.isfinite(v) for m in metrics for v in m.values())
    assert metrics[0]["response_length"] == 1.0
    adapters = [name for name in before if "value_head" not in name]
    drift = max((weights(trainer)[name] - before[name]).abs().max().item() for name in adapters)
    assert drift < 1e-4 if critic == "head" else drift == 0.0


def test_dense_credit_without_a_critic_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="'letters' is credited token by token, but critic='none'"):
        with_credit(tiny_model, tmp_path, "dense", critic="none")


def test_dense_pay_shaping_and_penalty_add_up(tiny_model, tmp_path):
    parts = [RewardPart("paid", Letters(), 2.0, "dense"), RewardPart("shaped", Letters(), 3.0, "shaping")]
    trainer = trainer_of(tiny_model, tmp_path, WeightedRewards(parts), kl_coef=0.0, missing_eos_penalty=10.0)
    rollout, pieces = sampled(trainer)
    stages.earn(rollout, trainer.config, 0.0)
    for i, (own, text) in enumerate(zip(pieces, rollout.texts, strict=True)):
        tokens = rollout.rewards[i][rollout.responses.mask[i]]
        penalty = 0.0 if rollout.responses.ended[i] else 10.0
        expected = [5.0 * letters(piece) for piece in own]  # undiscounted shaping is the increments, once more
        expected[-1] -= penalty
        torch.testing.assert_close(tokens, torch.tensor(expected))
        assert rollout.scores[i] == 5.0 * letters(text) - penalty
    assert not rollout.responses.ended.all() and rollout.dense is not None and rollout.potentials is not None


def test_schedules_follow_the_training_step(tiny_model, tmp_path):
    later = {"schedule": "constant", "from": 0.0, "to": 1.0, "start": 2, "steps": 1}
    trainer = trainer_of(tiny_model, tmp_path, WeightedRewards([RewardPart("letters", Letters(), later)]))
    rewards = [trainer.step(step)["reward"] for step in (1, 2, 3)]
    assert rewards[0] == 0.0 and rewards[2] > 0.0


def test_dropped_rows_take_no_part_in_whitening_and_explained_variance(tiny_model, tmp_path):
    def reward(completions, **_):
        return [1e6 if i % 3 == 1 else letters(text) for i, text in enumerate(completions)]

    def run(bad):
        def dropped(completions, **_):
            return [bad if i % 3 == 1 else value for i, value in enumerate(reward(completions))]

        part = RewardPart("letters", dropped, 1.0, nonfinite="drop")
        trainer = trainer_of(tiny_model, tmp_path / str(bad), WeightedRewards([part]), whiten_rewards=True)
        return trainer.step(1)

    assert run(float("nan"))["explained_variance"] == run(float("-inf"))["explained_variance"]
    kept, poisoned = run(float("nan")), run(1e6)
    assert kept["value_loss"] < 100 and poisoned["reward"] > 1e4


def test_weights_beside_a_combination_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="reward_weights belongs to plain functions"):
        with_credit(tiny_model, tmp_path, "last", reward_weights=[2.0])


def test_a_reward_that_fails_names_the_step(tiny_model, tmp_path):
    def broken(completions, **_):
        raise KeyError("no such thing")

    def wrong(completions, **_):
        return ["?"] * len(completions)

    with pytest.raises(RuntimeError, match=r"step 2: reward 'wrong', row 0"):
        trainer_of(tiny_model, tmp_path, wrong).step(2)
    with pytest.raises(RuntimeError, match=r"step 1: reward 'broken', row 0 .*KeyError: 'no such thing'") as caught:
        trainer_of(tiny_model, tmp_path, broken).step(1)
    assert isinstance(caught.value.__cause__, KeyError)  # a fault of the user's own program keeps its traceback


def test_default_metrics_see_pictures_and_tokens(tiny_model, tmp_path):
    class Lazy(list):
        def text(self, index):
            return {key: value for key, value in self[index].items() if key != "image"}

    def look(completions, image, completion_ids, **_):
        return [float(picture.size[0] + len(ids)) for picture, ids in zip(image, completion_ids, strict=True)]

    trainer = trainer_of(tiny_model, tmp_path, look)
    trainer.eval_dataset = Lazy(rows(3))
    assert trainer.evaluate().metrics["reward"].min() > 32

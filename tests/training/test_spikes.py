"""A gradient far longer than usual is told, and on request not learned from, exactly (row 18)."""

from __future__ import annotations

import json

import pytest
import torch
from test_trainer import trainer_of, weights

from mmft.training import update as updates
from mmft.training.checkpoint import load_checkpoint, save_checkpoint
from mmft.training.guards import Alarm
from mmft.training.spikes import FIRST, WINDOW, Spikes

LENGTHS = [1.0, 3.0, 2.0, 5.0, 4.0, 2.0, 3.0, 1.0]  # median 2.5


def test_the_ratio_by_hand():
    spikes = Spikes(10.0)
    assert len(LENGTHS) == FIRST and [spikes.ratio(x) for x in LENGTHS] == [None] * FIRST
    assert spikes.ratio(250.0) == 100.0
    assert spikes.ratio(30.0) == 10.0  # one spike among nine has moved the median to 3: a mean would be at 30


def test_a_new_level_is_learned_from_after_half_a_window():
    """With spikes left out of the history a run whose gradients grew for good would never learn again."""
    spikes = Spikes(10.0)
    for _ in range(WINDOW):
        spikes.ratio(1.0)
    found = [spikes.ratio(100.0) for _ in range(WINDOW)]
    assert found[0] == 100.0 and sum(ratio > 10.0 for ratio in found) == WINDOW // 2


def test_no_gradient_and_no_number_are_no_history():
    spikes = Spikes()
    for length in [0.0, float("nan"), float("inf"), *LENGTHS[:-1]]:
        assert spikes.ratio(length) is None
    assert spikes.ratio(1.0) is None and spikes.ratio(2.5) == 1.0
    assert not spikes.skips and Spikes(10.0).skips and spikes.limit == 10.0


def test_the_history_survives_json_bit_by_bit():
    spikes, again = Spikes(10.0), Spikes(10.0)
    for i in range(WINDOW + 7):
        spikes.ratio(0.1 + i / 3)
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert again.ratio(7.7) == spikes.ratio(7.7) and again.state_dict() == spikes.state_dict()


def with_history(tiny_model, folder, **options):
    """A trainer after two steps of four updates each."""
    trainer = trainer_of(tiny_model, folder, num_mini_batches=2, micro_prompts=1, **options)
    assert [told(trainer, step, trainer.step(step)) for step in (1, 2)] == [[], []]
    return trainer


def told(trainer, step: int, metrics: dict[str, float]) -> list[Alarm]:
    return [alarm for alarm in trainer.guards.look(step, metrics) if alarm.guard == "spike"]


def spiked(monkeypatch, trainer, update: int, factor: float = 100.0) -> dict[str, list]:
    """Step 3 with the loss of one of its four updates times ``factor``; what stood before and after each update."""
    original, calls, seen = updates.microbatch_loss, [0], []

    def loss(*args):
        if calls[0] % 2 == 0:  # of two microbatches, the first
            seen.append(state(trainer))
            # A skipped gradient may not come in with the next one.
            assert not any(p.grad is not None and p.grad.any() for p in trainer.policy.parameters())
        found = original(*args)
        calls[0] += 1
        return (found[0] * factor if (calls[0] - 1) // 2 == update else found[0]), found[1]

    with monkeypatch.context() as patch:
        patch.setattr(updates, "microbatch_loss", loss)
        metrics = trainer.step(3)
    return {"metrics": metrics, "alarms": told(trainer, 3, metrics), "states": [*seen, state(trainer)]}


def state(trainer) -> dict[str, torch.Tensor]:
    moments = trainer.optimizer.state_dict()["state"]
    return weights(trainer) | {f"{i}/{name}": v.clone() for i, slot in moments.items() for name, v in slot.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("update", range(4))
def test_a_spike_is_skipped_exactly_and_told(tiny_model, tmp_path, monkeypatch, update):
    found = spiked(monkeypatch, with_history(tiny_model, tmp_path, skip_spikes=10.0), update)
    changed = [not same(one, other) for one, other in zip(found["states"], found["states"][1:], strict=False)]
    assert changed == [i != update for i in range(4)]  # weights and the optimizer's moments and counters
    (alarm,) = found["alarms"]
    assert (alarm.guard, alarm.step, alarm.action) == ("spike", 3, "skip") and "not learned from" in alarm.text
    assert found["metrics"]["spike"] == 0.25 and found["metrics"]["spike_ratio"] > 30


def test_without_the_key_a_spike_is_told_and_learned_from(tiny_model, tmp_path, monkeypatch):
    found = spiked(monkeypatch, with_history(tiny_model, tmp_path), 3)
    assert not same(found["states"][3], found["states"][4])
    (alarm,) = found["alarms"]
    assert alarm.action == "log" and "train.skip_spikes" in alarm.text


def test_a_sound_step_has_no_spike(tiny_model, tmp_path, monkeypatch):
    found = spiked(monkeypatch, with_history(tiny_model, tmp_path, skip_spikes=10.0), 0, factor=1.0)
    assert found["alarms"] == [] and found["metrics"]["spike"] == 0 and 0 < found["metrics"]["spike_ratio"] < 10


def test_a_resumed_run_knows_what_is_usual(tiny_model, tmp_path, monkeypatch):
    """Else the first minibatches after every resume would be unguarded, and the run another one."""
    unbroken = with_history(tiny_model, tmp_path, skip_spikes=10.0)
    folder = save_checkpoint(unbroken, 2)
    resumed = trainer_of(tiny_model, tmp_path, num_mini_batches=2, micro_prompts=1, skip_spikes=10.0)
    load_checkpoint(resumed, folder)
    one, other = (spiked(monkeypatch, trainer, 1) for trainer in (unbroken, resumed))
    assert one["metrics"]["spike_ratio"] == other["metrics"]["spike_ratio"] > 30
    assert same(one["states"][-1], other["states"][-1])

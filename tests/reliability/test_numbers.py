"""Numbers that are not finite stop a run before they reach a weight (row 13); rewards that teach nothing (row 16)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training")]

from launching import launch  # noqa: E402
from planted import PLACES, VALUES, planted  # noqa: E402
from test_trainer import trainer_of, weights  # noqa: E402

from mmft.training import rollout as stages  # noqa: E402

WHERE = {"sampled log-prob": "rollout", "sampled value": "rollout", "reference": "rollout"}


def says(text: str, place: str, rank: int, rows: list[str]) -> bool:
    """Whether a message has the step, the place, the rank and rows that are that rank's, and nobody else."""
    where = r"step 2, " + WHERE.get(place, r"pass \d, minibatch \d")
    found = re.match(rf"{where}: ([^;]+) is not finite on rank (\d) \(rows ([^)]*)\)\. No process", text)
    return bool(found) and int(found[2]) == rank and set(found[3].split(", ")) <= set(rows)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_is_not_finite_changes_nothing_and_is_named(tiny_model, tmp_path, place, value):
    trainer = trainer_of(tiny_model, tmp_path, critic_start="zero", num_mini_batches=2)
    trainer.step(1)
    before = weights(trainer)
    moments = {k: v["exp_avg"].clone() for k, v in trainer.optimizer.state_dict()["state"].items()}
    rows = trainer.prompts(2).row_ids
    with planted(trainer, place, VALUES[value]), pytest.raises(FloatingPointError) as stopped:
        trainer.step(2)
    assert says(str(stopped.value), place, 0, rows), str(stopped.value)
    assert all(torch.equal(x, before[name]) for name, x in weights(trainer).items())
    state = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(state[key]["exp_avg"], x) for key, x in moments.items())


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    ("values", "config"),
    [
        (["nan"], None),
        pytest.param(["inf", "-inf"], None, marks=SOAK),
        pytest.param(["nan", "inf", "-inf"], "zero2", marks=SOAK),
        pytest.param(["nan", "inf", "-inf"], "zero3", marks=SOAK),
    ],
    ids=str,
)
def test_on_one_of_two_ranks_both_stop_and_both_name_it(tiny_model, tmp_path, values, config):
    model = str(tiny_model("llava"))
    done = launch(tmp_path, HERE / "planted.py", str(tmp_path), model, *values, config=config, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    print(f"\nplanted on rank 1 of 2, {config or 'ddp'}: {len(ranks[0])} cases")
    assert len(ranks[0]) == len(PLACES) * len(values)
    for case, guilty in ranks[1].items():
        other = ranks[0][case]
        place = case.rpartition(" ")[0]
        assert guilty["unchanged"] and other["unchanged"], case
        assert guilty["said"] == other["said"] and says(other["said"], place, 1, guilty["rows"]), (case, other["said"])
        assert not set(guilty["rows"]) & set(other["rows"])


# ---------------------------------------------------------------- row 16


def equal(completions, **_):
    return [0.7] * len(completions)


def ends_at_once(trainer, monkeypatch):
    """The end token is all that may be sampled: what training reads agrees with it."""
    policy = trainer.policy
    policy.ban([i for i in range(len(policy.banned)) if i != policy.tokenizer.eos_token_id])


def says_nothing(trainer, monkeypatch):
    """Responses without a single token, as an engine of another's may return them."""
    sample = stages.sample

    def silent(*args):
        rollout = sample(*args)
        rollout.responses.mask.zero_()
        rollout.texts = [""] * len(rollout.texts)
        for x in (rollout.old.logprobs, rollout.old.values, rollout.old.entropy):
            if x is not None:
                x.zero_()
        return rollout

    monkeypatch.setattr(stages, "sample", silent)


def as_it_is(trainer, monkeypatch):
    pass


STRANGE = {
    "all responses empty": (says_nothing, {}),
    "the end token first": (ends_at_once, {}),
    "all rewards equal": (as_it_is, {}),
    "one picture": (as_it_is, {"prompts_per_step": 1, "num_generations": 2}),
    "one picture, one response": (as_it_is, {"prompts_per_step": 1, "num_generations": 1}),
}


@pytest.mark.parametrize("critic", ["head", "none"])
@pytest.mark.parametrize("case", STRANGE)
def test_a_step_that_teaches_nothing_is_said_once_and_breaks_nothing(tiny_model, tmp_path, monkeypatch, case, critic):
    change, options = STRANGE[case]
    if critic == "none" and options.get("num_generations") == 1:
        with pytest.raises(ValueError, match="num_generations >= 2"):
            trainer_of(tiny_model, tmp_path, equal, critic=critic, **options)
        return
    seen, credit = [], stages.credit
    trainer = trainer_of(tiny_model, tmp_path, equal, critic=critic, kl_coef=0.0, whiten_rewards=True, **options)
    change(trainer, monkeypatch)
    monkeypatch.setattr(stages, "credit", lambda rollout, *args: (credit(rollout, *args), seen.append(rollout)))
    metrics = [trainer.step(step) for step in (1, 2)]
    assert all(np.isfinite(value) for m in metrics for value in m.values()), metrics
    assert all(torch.isfinite(x).all() for x in weights(trainer).values())
    assert all(torch.isfinite(rollout.advantages).all() for rollout in seen) and len(seen) == 2
    if critic == "none":
        assert all((rollout.advantages == 0).all() for rollout in seen)
    if change is ends_at_once:
        assert [m["response_length"] for m in metrics] == [1.0, 1.0]
    told = [
        alarm for step, numbers in enumerate(metrics * 2, 1) for alarm in trainer.guards.diagnoses.look(step, numbers)
    ]
    assert [(alarm.guard, alarm.step) for alarm in told] == [("equal_rewards", 2)]

"""Numbers that are not finite stop a run before they reach a weight (row 13); rewards that teach nothing (row 16)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training")]

from launched import launch  # noqa: E402
from planted import PLACES, VALUES, planted  # noqa: E402
from test_trainer import trainer_of, weights  # noqa: E402

WHERE = {"sampled log-prob": "rollout", "sampled value": "rollout", "reference": "rollout"}


def says(text: str, place: str, rank: int, rows: list[str]) -> bool:
    """Whether a message has the step, the place, the rank and rows that are that rank's, and nobody else."""
    where = r"step 2, " + WHERE.get(place, r"pass \d, minibatch \d")
    found = re.match(rf"{where}: (.+) is not finite on rank (\d) \(rows ([^)]*)\)\. No process", text)
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


def test_on_one_of_two_ranks_both_stop_and_both_name_it(tiny_model, tmp_path):
    done = launch(tmp_path, HERE / "planted.py", str(tmp_path), str(tiny_model("llava")), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    print(f"\nplanted on rank 1 of 2: {len(ranks[0])} cases")
    assert len(ranks[0]) == len(PLACES) * len(VALUES)
    for case, guilty in ranks[1].items():
        other = ranks[0][case]
        place = case.rpartition(" ")[0]
        assert guilty["unchanged"] and other["unchanged"], case
        assert guilty["said"] == other["said"] and says(other["said"], place, 1, guilty["rows"]), (case, other["said"])
        assert not set(guilty["rows"]) & set(other["rows"])

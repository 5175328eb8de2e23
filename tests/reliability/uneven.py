"""Run by `test_distributed_faults.py` on two ranks: runs whose work, or whose rewards, are not the same on both."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
from accelerate.utils import gather_object
from test_trainer import rows, trainer_of, weights

from mmft.training import update as updates
from mmft.training.config import A2CConfig
from mmft.training.trainer import A2CTrainer
from reward_models import RewardPart, WeightedRewards

RANK = int(os.environ.get("RANK", "0"))
NAN = float("nan")


def lengths(completions) -> list[float]:
    return [float(len(text)) for text in completions]


def reward(bad=None, on: tuple[int, ...] = (1,), **part) -> WeightedRewards:
    """The length of a response; ``bad`` for all rows of the ranks ``on``. A second part is bad nowhere."""

    def odd(completions, **columns):
        return [bad] * len(completions) if RANK in on and columns.get("ended") is not None else lengths(completions)

    good = RewardPart("good", lambda completions, **_: lengths(completions))
    return WeightedRewards([RewardPart("odd", odd, **part), good])


DROP = {"bad": NAN, "nonfinite": "drop"}
# Options of the trainer and of the reward; the second number is how many rows there are to train on and to evaluate.
CASES = {
    "seven rows for batches of four, three to evaluate": ({"eval_batch": 1}, {}, (7, 3)),
    "one row to train on, one to evaluate": ({"eval_batch": 1}, {}, (1, 1)),
    "all of rank 1 dropped": ({}, DROP, (6, 3)),
    "the same in two minibatches of single prompts": ({"num_mini_batches": 2, "micro_prompts": 1}, DROP, (7, 3)),
    "the same without a critic": ({"critic": "none"}, DROP, (6, 3)),
    "the same with whitened rewards": ({"whiten_rewards": True}, DROP, (6, 3)),
    "the same with running moments": ({}, DROP | {"normalize": "running"}, (6, 3)),
    "the same by A2C, normalised by group": ({"a2c": True}, DROP | {"normalize": "group"}, (6, 3)),
    "everything dropped on both": ({}, DROP | {"on": (0, 1)}, (6, 3)),
    "no opinion on any row of rank 1": ({}, {"bad": None}, (5, 2)),
}


def digest(trainer) -> str:
    moments = [x for slot in trainer.optimizer.state_dict()["state"].values() for x in slot.values()]
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in [*weights(trainer).values(), *moments])).hexdigest()


def spike_on_one(folder: Path, model: Path) -> list:
    """Step 3, whose last minibatch has a loss a hundredfold on rank 1: what each rank saw, before and after it."""
    trainer = trainer_of(lambda family: model, folder, reward(), num_mini_batches=2, skip_spikes=10.0)
    for step in (1, 2):
        trainer.step(step)
    original, stood = updates.microbatch_loss, []

    def loss(*args):
        stood.append(digest(trainer))
        found = original(*args)
        return (100.0 * found[0] if len(stood) == 4 and RANK == 1 else found[0]), found[1]

    with mock.patch.object(updates, "microbatch_loss", loss):
        metrics = trainer.step(3)
    return gather_object([[metrics["spike"], metrics["spike_ratio"], *stood, digest(trainer)]])


def main(folder: Path, model: Path) -> None:
    warnings.simplefilter("ignore")
    found, spike = {}, spike_on_one(folder / "spike", model)
    for name, (options, kind, (train, held_out)) in CASES.items():
        options = dict(options)
        classes = {"cls": A2CTrainer, "config_class": A2CConfig} if options.pop("a2c", False) else {}
        trainer = trainer_of(
            lambda family: model,
            folder / "run" / str(len(found)),
            reward(**kind),
            rows(train),
            max_steps=2,
            critic_start="fit",
            eval_steps=1,
            **options,
            **classes,
        )
        trainer.eval_dataset = rows(held_out)
        trainer.train()
        lines = (folder / "run" / str(len(found)) / "metrics.jsonl").read_text().splitlines() if RANK == 0 else []
        metrics = [json.loads(line) for line in lines]
        found[name] = {
            "steps": len(metrics),
            "same": len(set(gather_object([digest(trainer)]))) == 1,
            "finite": all(np.isfinite(x.numpy()).all() for x in weights(trainer).values()),
            "learned": [m.get("grad_norm", 0.0) for m in metrics],
            "evaluated": [m.get("eval/reward") is not None for m in metrics[:1]],
            "null": sorted({key for m in metrics for key, value in m.items() if value is None}),
        }
    if RANK == 0:
        (folder / "found.json").write_text(json.dumps({"cases": found, "spike": spike}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

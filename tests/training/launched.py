"""Run by `test_distributed.py` under a launch file, or in its own process: cases that must come out alike.

    accelerate launch --config_file FILE launched.py FOLDER MODEL CASE,CASE...

Each case leaves ``FOLDER/CASE.json`` and ``FOLDER/CASE.safetensors``, written by the first process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from test_trainer import count_wanted, trainer_of

from mmft.training import distributed
from mmft.training.checkpoint import save_adapter
from reward_models import RewardPart, WeightedRewards

SHOWN = ("reward", "kl", "policy_loss", "value_loss", "response_length", "grad_norm", "first_ratio_error")


def trainer(folder: Path, model: Path, reward=count_wanted, **options):
    return trainer_of(lambda family: model, folder / "run", reward, report_to=("ledger",), **options)


def trained(trainer) -> dict[str, torch.Tensor]:
    return distributed.trained_weights(trainer.accelerator, trainer.prepared)


def steps(trainer, numbers: range) -> dict[str, Any]:
    """The steps' metrics and ledger (row and hash of each response's tokens)."""
    found: dict[str, Any] = {"metrics": [], "ledger": []}
    for step in numbers:
        found["metrics"].append({name: value for name, value in trainer.step(step).items() if name in SHOWN})
        found["ledger"].append([list(entry) for entry in trainer.written])
    return found


def sgd(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Self-test, an uneven evaluation, three steps in microbatches, and the adapter on disk."""
    running = trainer(folder, model, optimizer="sgd", learning_rate=0.05, micro_prompts=1)
    running.begin()
    start = trained(running)
    found = steps(running, range(1, 4)) | {"texts": running.evaluate().texts}
    weights = trained(running)
    with distributed.whole(running.accelerator, running.prepared):
        if running.accelerator.is_main_process:
            save_adapter(running.policy, folder, weights)
    running.accelerator.wait_for_everyone()
    return found | {"moved": max(float((weights[n] - start[n]).abs().max()) for n in weights)}, weights


def adamw(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Three steps of two minibatches, with rewards that keep statistics over all processes."""
    rewards = WeightedRewards(
        [
            RewardPart("count_wanted", count_wanted, normalize="running"),
            RewardPart("length", lambda completions, **_: [float(len(t)) for t in completions], {"share": 0.2}),
        ]
    )
    running = trainer(folder, model, rewards, num_mini_batches=2)
    start = trained(running)
    found = steps(running, range(1, 4)) | {"rewards": running.reward_funcs.state_dict()}
    weights = trained(running)
    return found | {"moved": max(float((weights[n] - start[n]).abs().max()) for n in weights)}, weights


def dropped(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Ten steps in which all rows of the last process are bad, each with an evaluation of three rows."""
    bad = int(os.environ.get("RANK", "0")) == 1

    def reward(completions, **_):
        return [float("nan") if bad else float(len(text)) for text in completions]

    running = trainer(folder, model, WeightedRewards([RewardPart("some", reward, nonfinite="drop")]))
    # The evaluation is asked about all rows at once, by every process.
    running.compute_metrics = lambda texts, rows, ended: {"length": torch.tensor([len(t) for t in texts]).numpy()}
    found: dict[str, Any] = {"evaluated": []}
    for step in range(1, 11):
        found |= steps(running, range(step, step + 1))
        found["evaluated"].append(len(running.evaluate().texts))
    return found, trained(running)


def guard(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A gradient, then a loss, then a value that is not finite, on the last process alone."""
    running = trainer(folder, model)
    running.step(1)
    accelerator, policy = running.accelerator, running.policy
    last = accelerator.process_index == accelerator.num_processes - 1
    before = trained(running)
    found: dict[str, Any] = {"said": {}, "unchanged": {}}
    for kind in ("gradient", "loss", "value"):
        handle = None
        if last:
            handle = _poison(policy, kind)
        try:
            running.step(2)
            said = "nothing"
        except FloatingPointError as error:
            said = str(error)
        if handle is not None:
            handle.remove()
        distributed.drop_gradient(accelerator, running.prepared, running.optimizer)
        after = trained(running)
        found["said"][kind] = gather_object([said])
        found["unchanged"][kind] = all(torch.equal(before[n], after[n]) for n in before)
    return found, after


def _poison(policy, kind: str):
    """A hook on the policy's forward pass in training that makes one number infinite."""

    def spoil(module, args, out):
        if not out.logprobs.requires_grad:
            return
        if kind == "value":
            out.values = out.values + torch.inf
        elif kind == "loss":
            out.logprobs = out.logprobs * torch.nan
        else:
            out.logprobs.register_hook(lambda gradient: gradient * torch.inf)

    return policy.register_forward_hook(spoil, prepend=True)


def state(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A step taken twice from one saved state, bitwise the same."""
    running = trainer(folder, model)
    accelerator, prepared, optimizer = running.accelerator, running.prepared, running.optimizer
    running.step(1)
    weights = trained(running)
    tensors, plain = distributed.optimizer_state(accelerator, optimizer)
    running.step(2)
    once = trained(running)
    running.step(3)
    distributed.load_trained_weights(accelerator, prepared, weights)
    back = all(torch.equal(value, weights[name]) for name, value in trained(running).items())
    distributed.load_optimizer_state(accelerator, optimizer, tensors, plain)
    running.step(2)
    twice = trained(running)
    same = all(torch.equal(once[name], twice[name]) for name in once)
    sharded = distributed.optimizer_is_sharded(accelerator, optimizer)
    return {"back": back, "same": same, "sharded": sharded, "kept": len(tensors)}, twice


CASES: dict[str, Callable[[Path, Path], tuple[dict[str, Any], dict[str, torch.Tensor]]]] = {
    "sgd": sgd,
    "adamw": adamw,
    "dropped": dropped,
    "guard": guard,
    "state": state,
}


def run(folder: Path, model: Path, names: list[str]) -> None:
    """Runs cases one after the other; every process has to."""
    for name in names:
        found, weights = CASES[name](folder / name, model)
        if int(os.environ.get("RANK", "0")) == 0:
            save_file(weights, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(found))


def shard_everything() -> None:
    """ZeRO-3 leaves small weights whole, and all of a tiny model's are small."""
    settle = distributed._settle_deepspeed

    def also(plugin, config) -> None:
        settle(plugin, config)
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    distributed._settle_deepspeed = also


if __name__ == "__main__":
    shard_everything()
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
    distributed.close()

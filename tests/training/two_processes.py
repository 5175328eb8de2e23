"""Run by `test_two_processes.py`: two steps of PPO on a tiny model; the first process writes down what came out."""

import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from test_trainer import count_wanted, trainer_of, weights

from reward_models import RewardPart, WeightedRewards

folder, model, minibatches = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rewards = WeightedRewards(
    [
        RewardPart("count_wanted", count_wanted, normalize="running"),
        RewardPart("length", lambda completions, **_: [float(len(text)) for text in completions], {"share": 0.2}),
    ]
)
trainer = trainer_of(lambda family: model, folder / "run", rewards, num_mini_batches=minibatches, micro_prompts=1)
metrics = [trainer.step(step) for step in (1, 2)]
if trainer.accelerator.is_main_process:
    save_file({name: value.contiguous() for name, value in weights(trainer).items()}, folder / "weights.safetensors")
    kept = ("reward", "kl", "policy_loss", "response_length", "grad_norm")
    numbers = [{key: m[key] for key in kept} for m in metrics]
    found = {"processes": trainer.accelerator.num_processes, "steps": numbers}
    (folder / "metrics.json").write_text(json.dumps(found | {"rewards": trainer.reward_funcs.state_dict()}))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
# Without the interpreter's own farewell: now and then a thread of gloo outlives it, and the process aborts after the
# work is done ("terminate called without an active exception").
sys.stdout.flush()
os._exit(0)

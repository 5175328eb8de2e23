"""Two processes are one: the same global batch gives the same responses, numbers and weights (DDP over gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def run(folder: Path, model: Path, processes: int, minibatches: int) -> tuple[dict, dict[str, torch.Tensor]]:
    folder.mkdir()
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [
        *(launcher if processes > 1 else [sys.executable]),
        str(HERE / "two_processes.py"),
        str(folder),
        str(model),
        str(minibatches),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "metrics.json").read_text()), load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("minibatches", [1, 2])  # they decide which prompts a process gets
def test_two_processes_are_one(tiny_model, tmp_path, minibatches):
    model = tiny_model("llava")
    one, weights = run(tmp_path / "one", model, 1, minibatches)
    two, others = run(tmp_path / "two", model, 2, minibatches)
    assert (one["processes"], two["processes"]) == (1, 2)
    first, second = one["steps"], two["steps"]
    for key in ("reward", "response_length"):  # the very same responses: sampling is seeded per row
        assert [s[key] for s in first] == pytest.approx([s[key] for s in second], abs=1e-6)
    for key in ("kl", "policy_loss"):
        assert [s[key] for s in first] == pytest.approx([s[key] for s in second], abs=1e-4)
    assert first[0]["grad_norm"] == pytest.approx(second[0]["grad_norm"], rel=1e-3)
    for name, value in weights.items():
        # Far below a step of AdamW (1e-3), above the rounding that AdamW enlarges where gradients are tiny.
        torch.testing.assert_close(value, others[name], atol=1e-4, rtol=0)
    moments, variances = (flat(result["rewards"]) for result in (one, two))
    assert moments == pytest.approx(variances, rel=1e-4) and len(moments) > 3


def flat(state: object) -> list[float]:
    """Every number of a nested state, in order."""
    if isinstance(state, dict):
        return [number for key in sorted(state) for number in flat(state[key])]
    if isinstance(state, list):
        return [number for value in state for number in flat(value)]
    return [float(state)] if isinstance(state, int | float) else []

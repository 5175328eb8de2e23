"""One PPO iteration of a shape: the trainer that benchmarks time, and a process of its own to time it in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks._models import PROMPT, Shape

MIB = 1 << 20


class NewPictures(Sequence):
    """``count`` rows ``id, prompt, image`` (or ``images``), made when asked for: no two pictures are alike, so no
    cache helps, and none is kept, so that the data hold no memory."""

    def __init__(self, count: int, side: int, pictures: int = 1):
        self.count, self.side, self.pictures = count, side, pictures

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        rng = np.random.default_rng(i)
        blocks = rng.integers(0, 256, (self.pictures, 8, 8, 3), dtype=np.uint8)
        images = [Image.fromarray(b).resize((self.side, self.side), Image.Resampling.BICUBIC) for b in blocks]
        row: dict[str, Any] = {"id": str(i), "prompt": [{"role": "user", "content": PROMPT}]}
        return row | ({"image": images[0]} if self.pictures == 1 else {"images": images})


def variety(completions, **columns) -> list[float]:
    """A reward that costs nothing and differs between responses: how many different characters they have."""
    return [len(set(completion[0]["content"])) / 64 for completion in completions]


def trainer(folder: Path, shape: Shape, scratch: str, steps: int, dtype: str = "float32", pictures: int = 1, **options):
    """A PPOTrainer of the shape: one pass over the experience, one optimizer step, KL to the adapters-off reference.

    The end-of-sequence token is banned, so every response has the shape's length.

    Args:
        pictures: in each prompt.
        options: further fields of `PPOConfig`.
    """
    from mmft.training.config import PPOConfig
    from mmft.training.trainer import PPOTrainer
    from mmft.vlm.load import load_model, lora_config

    model, processor = load_model(str(folder), dtype=dtype)
    settings = {
        "output_dir": scratch,
        "max_steps": steps,
        "prompts_per_step": shape.prompts,
        "num_generations": shape.group,
        "max_completion_length": shape.length,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "num_ppo_epochs": 1,
        "micro_prompts": shape.micro_prompts,
        "report_to": (),
    }
    rows = NewPictures(steps * shape.prompts, shape.side, pictures)
    made = PPOTrainer(model, variety, PPOConfig(**settings | options), rows, None, processor, lora_config(model))
    made.policy.ban(made.policy.end_ids)
    return made


def in_process(script: str, order: dict[str, Any], threads: int) -> Any:
    """What ``python script --worker ORDER --json FILE`` writes: a measurement in a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, script, "--worker", json.dumps(order), "--json", answer.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the measurement {order} failed:\n{done.stderr[-4000:]}")
        return json.loads(Path(answer.name).read_text())


def resident() -> float:
    """MiB of memory that this process holds now."""
    return psutil.Process().memory_info().rss / MIB


def reset_peak() -> float:
    """MiB held now; the high-water mark starts again from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak() -> float:
    """The highest number of MiB held since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024

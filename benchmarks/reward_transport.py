"""What it costs to have a reward in a child process, or behind HTTP on this machine, instead of calling it.

A reward that does nothing gets 256 rows (a prompt, a caption, five references), alone and with 32 photo-sized noise
pictures that eight rows share each. Medians of `--repeats` calls. Noise is the worst case for PNG and JPEG.

    python benchmarks/reward_transport.py [--repeats 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reward_models.client import HttpReward
from reward_models.isolation import Isolated

ROWS, PICTURES, SIZE = 256, 32, (375, 500)
REWARD = "def nothing(completions, **columns):\n    return [0.0] * len(completions)\n"


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return 1e3 * statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)) for _ in range(PICTURES)]
    text = {
        "prompts": ["Describe the picture."] * ROWS,
        "completions": [f"a dog, number {i}, runs over the grass" for i in range(ROWS)],
        "references": [[f"dog {i} runs near fence {j} on the grass" for j in range(5)] for i in range(ROWS)],
    }
    pictures = text | {"image": [noise[i * PICTURES // ROWS] for i in range(ROWS)]}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "reward.py").write_text(REWARD)
        path = f"{folder}/reward.py:nothing"
        start = time.perf_counter()
        with Isolated(path) as child:
            found["child: start"] = 1e3 * (time.perf_counter() - start)
            found["child: text"] = milliseconds(lambda: child(**text), options.repeats)
            found["child: pictures"] = milliseconds(lambda: child(**pictures), options.repeats)
        command = [
            sys.executable,
            "-m",
            "reward_models.serve",
            "--rewards",
            json.dumps([{"name": path}]),
            "--port",
            "0",
        ]
        environment = {key: value for key, value in os.environ.items() if key != "REWARD_TOKEN"}
        server = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            plain = HttpReward(url, batch_size=ROWS)
            found["http: text"] = milliseconds(lambda: plain(**text), options.repeats)
            for kind in ("png", "jpeg"):
                sending = HttpReward(url, batch_size=ROWS, send_images=True, image_format=kind)
                found[f"http: pictures as {kind}"] = milliseconds(lambda s=sending: s(**pictures), options.repeats)  # type: ignore[misc]
        finally:
            server.terminate()
            server.wait()
    print(
        f"{ROWS} rows, {PICTURES} pictures of {SIZE[1]} x {SIZE[0]}; milliseconds, medians of {options.repeats} calls"
    )
    for what, value in found.items():
        print(f"{what:<24} {value:8.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The plain path samples as the shared prefix does: each row from its own stream."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, load_model, lora_config

GROUP, LENGTH = 3, 6


def test_a_rows_responses_do_not_depend_on_its_batch_nor_on_the_path(tiny_model):
    model, processor = load_model(str(tiny_model("llava")))
    policy = build_policy(model, processor, lora_config(model, r=4))
    stream = np.random.default_rng(0)
    rows = [
        {"prompt": "say " + "it " * i, "image": Image.fromarray(stream.integers(0, 256, (32, 32, 3), dtype=np.uint8))}
        for i in range(3)
    ]

    def written(chosen: list[int]) -> list[list[int]]:
        prompts = policy.pictures.prompts(
            [rows[i] for i in chosen], [f"r{i}" for i in chosen], policy.device, pixels=True
        )
        responses, _ = generate(policy, prompts, GROUP, LENGTH, temperature=0.9, seed=3)
        return [ids[mask].tolist() for ids, mask in zip(responses.ids, responses.mask, strict=True)]

    packed = written([0, 1, 2])
    policy.take_plain_path()
    together = written([0, 1, 2])
    assert together == packed
    assert [row for i in (2, 0, 1) for row in written([i])] == [
        together[i * GROUP + g] for i in (2, 0, 1) for g in range(GROUP)
    ]
    assert len({tuple(row) for row in together}) > GROUP  # rows and responses differ from each other
    torch.manual_seed(5)
    assert written([1]) == together[GROUP : 2 * GROUP]  # whatever the process's own stream is at

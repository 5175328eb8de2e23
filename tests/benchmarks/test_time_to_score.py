"""Time to a score: both sides must see the same rows and be scored alike, and the seconds must be read rightly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import time_to_score

ORDER = {
    "system": "ppo",
    "seed": 3,
    "steps": 2,
    "rows": 8,
    "trl": "batch=4",
    "rate": 5e-3,
    "passes": 1,
    "options": ["rollout.prompts_per_step=2", "rollout.num_generations=2", "train.micro_prompts=2"],
}
ORDER["options"] += ["data.train_rows=50", "algorithm.kl_coef=0.01"]


def said_by(side, order: dict[str, Any], tmp_path: Path, stop_after: int = 99) -> list[dict[str, float]]:
    said: list[dict[str, float]] = []

    def turn(found: dict[str, float]) -> bool:
        said.append(found)
        return len(said) < stop_after

    side(order, str(tmp_path), turn)
    return said


def test_both_sides_start_alike_and_learn(tmp_path: Path) -> None:
    ours = said_by(time_to_score.ours, ORDER, tmp_path)
    theirs = said_by(time_to_score.theirs, ORDER | {"system": "grpo"}, tmp_path)
    assert len(ours) == len(theirs) == 3
    assert ours[0]["seconds"] == theirs[0]["seconds"] == 0
    assert ours[0]["cider_d"] == pytest.approx(theirs[0]["cider_d"], abs=1e-9)
    assert ours[2]["seconds"] > ours[1]["seconds"] > 0 and theirs[2]["seconds"] > theirs[1]["seconds"] > 0
    # At this rate two steps change captions: a copy that never got the trained adapters would not.
    assert theirs[2]["cider_d"] != theirs[0]["cider_d"]
    assert ours[2]["cider_d"] != ours[0]["cider_d"]


def test_a_step_of_two_passes_is_evaluated_once_and_a_run_can_be_stopped(tmp_path: Path) -> None:
    order = ORDER | {"system": "grpo", "passes": 2}
    assert len(said_by(time_to_score.theirs, order, tmp_path)) == 3
    assert len(said_by(time_to_score.theirs, order, tmp_path, stop_after=2)) == 2
    assert len(said_by(time_to_score.ours, ORDER, tmp_path, stop_after=2)) == 2


def test_trl_gets_the_rows_of_mmfts_steps_in_their_order(tmp_path: Path) -> None:
    from mmft.training.run import assemble, rows_of

    recipe = time_to_score.recipe_of(ORDER, str(tmp_path))
    rows = time_to_score.rows_in_order(rows_of(recipe, recipe.data.train, recipe.data.train_rows), recipe)
    trainer = assemble(recipe)
    prompts = [trainer.prompts(step) for step in (1, 2)]
    taken = [row for batch in prompts for row in batch.rows]
    assert [row["references"] for row in rows] == [row["references"] for row in taken]
    assert [row["image"].tobytes() for row in rows] == [row["image"].tobytes() for row in taken]
    # And the same tokens.
    message = [{"type": "image"}, {"type": "text", "text": rows[0]["prompt"][0]["content"]}]
    text = trainer.policy.processor.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True
    )
    ids = trainer.policy.processor(images=[rows[0]["image"]], text=[text]).input_ids[0]
    assert list(ids) == prompts[0].prompt_ids[0][prompts[0].prompt_mask[0]].tolist()


def run(name: str, seed: int, seconds: list[float], scores: list[float], **more) -> dict[str, Any]:
    return {"name": name, "seed": seed, "seconds": seconds, "cider_d": scores, **more}


def test_seconds_to_a_level_are_read_off_straight_lines() -> None:
    found = run("x", 0, [0.0, 10.0, 30.0, 40.0], [2.0, 3.0, 5.0, 4.0])
    assert time_to_score.reached(3.0, found) == 10.0
    assert time_to_score.reached(4.0, found) == 20.0  # the first time, halfway up
    assert time_to_score.reached(4.0, found, "steps") == 1.5
    assert time_to_score.reached(2.0, found) == 0.0
    assert time_to_score.reached(5.5, found) == math.inf


def test_ratios_are_to_tuned_trl_and_bounded_where_it_never_arrives(tmp_path: Path) -> None:
    trl = {"rate": 1e-3, "passes": 1}
    result = {
        "levels": {0: [3.0, 4.0], 1: [3.0, 4.0]},
        "best": trl,
        "runs": [
            run("mmft PPO", 0, [0.0, 4.0], [2.0, 4.0]),
            run("mmft leave-one-out", 0, [0.0, 8.0], [2.0, 4.0]),
            run("TRL GRPO 0.0005", 0, [0.0, 90.0], [2.0, 3.0], **trl | {"rate": 5e-4}),
            run("TRL GRPO 0.001", 0, [0.0, 40.0], [2.0, 4.0], **trl),
            run("mmft PPO", 1, [0.0, 4.0], [2.0, 4.0]),
            run("mmft leave-one-out", 1, [0.0, 4.0], [2.0, 3.5]),
            run("TRL GRPO 0.001", 1, [0.0, 50.0], [2.0, 3.9], **trl),
        ],
    }
    assert time_to_score.ratios(result, "mmft PPO") == [pytest.approx(0.1), pytest.approx(0.08)]
    assert time_to_score.ratios(result, "mmft leave-one-out") == [pytest.approx(0.2), math.inf]
    lines = time_to_score.table(result).splitlines()
    assert lines[2] == "| mmft PPO | 0 | 3.000 | 2.0 | 0.5 | 4.000 | 4.0 | 1.0 | 4.000 |"
    assert lines[-2].startswith("mmft PPO: 0.090 of the seconds") and lines[-2].endswith(": met")
    assert lines[-1].endswith("NOT met")
    time_to_score.plot(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_every_rate_is_tried_and_the_fastest_also_with_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves that rise by 100 x rate x passes a step, to 4 at most."""
    asked = []

    def curve(name: str, order: dict[str, Any], level: float = math.inf) -> dict[str, Any]:
        asked.append((name, order["seed"], order["steps"]))
        gain = {"ppo": 0.5, "loo": 0.5}.get(order["system"], order.get("rate", 0) * 100 * order.get("passes", 1))
        scores = [min(2.0 + gain * i, 4.0) for i in range(order["steps"] + 1)]
        end = next((i for i, score in enumerate(scores) if score >= level), len(scores) - 1) + 1
        seconds = [float(i * order.get("passes", 1)) for i in range(end)]
        return {"name": name, **order, "seconds": seconds, "cider_d": scores[:end]}

    monkeypatch.setattr(time_to_score, "curve", curve)
    options = {"threads": 1, "rows": 8, "options": [], "steps": 8, "trl_steps": 40, "trl": "batch=4", "level": None}
    result = time_to_score.compare(options | {"seeds": [0, 1], "rates": [1e-3, 2e-3]})
    assert result["levels"][0] == pytest.approx([3.8, 3.9])  # 90 and 95 % of the way from 2 to 4
    # The level takes 19 steps at 0.1 a step, and 10 at 0.2; nobody gets more than one step beyond the best so far.
    assert asked == [
        ("mmft PPO", 0, 8),
        ("mmft leave-one-out", 0, 8),
        ("TRL GRPO 0.001", 0, 40),
        ("TRL GRPO 0.002", 0, 20),
        ("TRL GRPO 0.002, 2 passes", 0, 11),
        ("mmft PPO", 1, 8),
        ("mmft leave-one-out", 1, 8),
        (time_to_score._name(result["best"]), 1, 40),
    ]
    json.dumps(result)

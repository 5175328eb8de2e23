"""The monitor: metrics.jsonl, TensorBoard, progress, table."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.training.monitor import Monitor


def lines(run: Path) -> list[dict]:
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_valid_json_at_once(tmp_path):
    """NaN and infinity become null; numpy numbers are numbers; a line is on disk before the run ends."""
    monitor = Monitor(tmp_path / "run", 3, trackers=(), progress=False)
    monitor.log(1, {"reward": float("nan"), "kl": float("inf"), "entropy": np.float32(0.5)})
    assert lines(tmp_path / "run") == [{"step": 1, "reward": None, "kl": None, "entropy": 0.5}]
    monitor.close()
    monitor.close()


def test_resume_drops_later_steps_and_half_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "reward": {i}.5}}\n' for i in range(1, 6)) + '{"step": 6, "re')
    monitor = Monitor(tmp_path, 9, trackers=(), progress=False, resume_step=3)
    monitor.log(4, {"reward": 7.0})
    monitor.close()
    assert lines(tmp_path) == [
        {"step": 1, "reward": 1.5},
        {"step": 2, "reward": 2.5},
        {"step": 3, "reward": 3.5},
        {"step": 4, "reward": 7.0},
    ]


def test_new_run_starts_a_new_file(tmp_path):
    for reward in (1.0, 2.0):
        monitor = Monitor(tmp_path, 9, trackers=(), progress=False)
        monitor.log(1, {"reward": reward})
        monitor.close()
    assert lines(tmp_path) == [{"step": 1, "reward": 2.0}]


def test_other_ranks_do_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path / "run", 1, is_main=False)
    monitor.log(1, {"reward": 1.0})
    monitor.log_images(1, [Image.new("RGB", (4, 4))], ["a"])
    monitor.table({"reward": {"mean": 1.0}}, {"reward": {"mean": 2.0}}, {})
    monitor.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_plain_lines_away_from_a_terminal(tmp_path, capsys):
    monitor = Monitor(tmp_path, 100, trackers=())
    for step in range(1, 101):
        monitor.log(step, {"reward": step / 10, "kl": float("nan"), "tokens_per_second": 1234.4})
    monitor.close()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 20
    assert printed[0].startswith("step 5/100  reward 0.500  tokens/s 1234  ") and printed[0].endswith("left")
    assert "KL" not in printed[0]


def test_table(tmp_path, capsys):
    monitor = Monitor(tmp_path, 1, trackers=(), progress=False)
    before = {"cider_d": {"mean": 2.0, "low": 1.9, "high": 2.1}, "old": {"mean": 1.0}}
    after = {"cider_d": {"mean": 2.5, "low": 2.4, "high": 2.6}, "reward/[b]new": {"mean": 3.0}}
    difference = {"cider_d": {"mean": 0.5, "low": 0.4, "high": 0.6, "relative": 0.25}}
    monitor.table(before, after, difference)
    monitor.close()
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "CIDEr-D" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["CIDEr-D", "2.000", "2.500", "+0.500 [+0.400, +0.600]", "+25.0 %"]
    assert "[b]new" in printed  # not read as markup


def test_tensorboard_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(tmp_path, 2, progress=False)
    monitor.log(1, {"reward": 1.0, "kl": float("nan")})
    monitor.log(2, {"reward": 2.0})
    monitor.log_images(2, [Image.new("L", (4, 4))], ["a grey square"])
    monitor.close()
    monitor = Monitor(tmp_path, 2, progress=False, resume_step=1)
    monitor.log(2, {"reward": 5.0})
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 1.0), (2, 5.0)]
    assert "kl" not in events.Tags()["scalars"]


def test_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match="'wandb'.*tensorboard"):
        Monitor(tmp_path, 1, trackers=("wandb",))

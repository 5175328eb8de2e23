"""The monitor: metrics.jsonl, progress, alarms, table, what comes next. Trackers: `test_trackers`."""

import json
import shlex
from pathlib import Path

import numpy as np

from mmft.training.evaluate import Evaluation
from mmft.training.guards import Alarm
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
    monitor.evaluated(1, [], None, Evaluation(["a"], {"reward": np.ones(1)}))
    monitor.farewell(0)
    monitor.table({"reward": {"mean": 1.0}}, {"reward": {"mean": 2.0}}, {})
    monitor.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_plain_lines_away_from_a_terminal(tmp_path, capsys):
    monitor = Monitor(tmp_path, 100, trackers=())
    for step in range(1, 101):
        monitor.log(step, {"reward": step / 10, "kl": float("nan"), "tokens_per_second": 1234.4})
    monitor.close()
    start, *printed = capsys.readouterr().out.splitlines()
    assert start == f"100 steps; look on: {tmp_path / 'report.html'}" and len(printed) == 20
    assert printed[0].startswith("step   5/100  reward   0.500  tokens/s   1234  ") and printed[0].endswith("left")
    assert "KL" not in printed[0]
    assert printed[-1].index("tokens/s") == printed[0].index("tokens/s")  # in columns


def test_held_out_scores_on_the_way(tmp_path, capsys):
    """Of the main metric, beside what it was; those before and after the run stand in the table."""
    monitor = Monitor(tmp_path, 20, trackers=(), progress=False)
    before = Evaluation(["a"], {"words": np.array([3.0]), "cider_d": np.array([1.0])})
    now = Evaluation(["b"], {"words": np.array([4.0]), "cider_d": np.array([1.5])})
    for step in (0, 10, 20):
        monitor.evaluated(step, [], before, now)
    monitor.close()
    assert capsys.readouterr().out == "step 10/20  held-out CIDEr-D 1.500 (1.000 before training)\n"


def test_alarms_are_told_in_one_line_and_kept(tmp_path, capsys):
    alarm = Alarm("clipped", 7, 0.5, 0.3, "log", "half of [the] tokens are beyond the clip " + "and so on " * 30)
    monitor = Monitor(tmp_path, 20, trackers=(), progress=False)
    monitor.alarms([alarm])
    monitor.farewell(1)
    monitor.close()
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"step 7, clipped: {alarm.text}"
    assert json.loads((tmp_path / "alarms.jsonl").read_text()) == alarm.as_dict()
    assert any("1 warning" in line and str(tmp_path / "alarms.jsonl") in line for line in rest)


def test_the_farewell_names_commands_that_exist(tmp_path, capsys):
    from typer.main import get_command

    from mmft.cli import app

    run = tmp_path / "a run"
    monitor = Monitor(run, 1, trackers=(), progress=False)
    monitor.farewell(0)
    monitor.close()
    printed = capsys.readouterr().out
    assert f"{run}/report.html" in printed and "warning" not in printed
    commands = [shlex.split(line.split("mmft ", 1)[1]) for line in printed.splitlines() if "mmft " in line]
    assert len(commands) >= 4
    for verb, *arguments in commands:
        command = get_command(app).commands[verb]
        known = {option for parameter in command.params for option in parameter.opts}
        assert str(run) in arguments and {a for a in arguments if a.startswith("-")} <= known, verb


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
    assert "It got better. Held-out CIDEr-D went from 2.000 to 2.500" in printed

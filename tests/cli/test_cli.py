"""The command `mmft`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mmft.cli import main

RECIPE = "recipes/caption_ppo.yaml"
FEW = ["data.train_rows=40", "--rows", "12"]


def test_doctor_finds_nothing_in_the_shipped_recipe(capsys, tmp_path):
    assert main(["doctor", "rewards", RECIPE, *FEW, "--json", str(tmp_path / "found.json")]) == 0
    assert "nothing that was tried" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["flagged"] == [] and found["rows"] == 12 and found["honest"]["cider_d"] > 1


def test_doctor_finds_the_hole(capsys, tmp_path):
    (tmp_path / "wordy.py").write_text(
        "def wordy(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    rewards = f"rewards=[{{name: '{tmp_path}/wordy.py:wordy'}}]"
    assert main(["doctor", "rewards", RECIPE, rewards, *FEW]) == 1
    assert "four times as long (100% of rows)" in capsys.readouterr().out


def test_wrong_recipes_end_with_2_before_torch(tmp_path):
    (tmp_path / "r.yaml").write_text("rewards: [{name: cidr_d}]\n")
    code = f"import sys; from mmft.cli import main; r = main(['doctor', 'rewards', {str(tmp_path / 'r.yaml')!r}]); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(r, 'torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "2 False" and "cider_d" in done.stderr


@pytest.mark.parametrize("size", ["-3", "0", "nan", "inf"])
def test_no_gpu_has_such_a_memory(size, capsys):
    assert main(["doctor", "memory", RECIPE, "--device-gib", size]) == 2
    assert "--device-gib" in capsys.readouterr().err


def test_wrong_rewards_are_one_line(capsys):
    assert main(["doctor", "rewards", RECIPE, "rewards=[{name: 'no_such_module:f'}]", *FEW]) == 2
    assert capsys.readouterr().err.startswith("error: rewards[0]")

"""The report of a 200-step run in a browser: the numbers of the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_report_of_200_steps_is_small_and_whole(tmp_path):
    command = [sys.executable, "benchmarks/report_size.py", "--folder", str(tmp_path / "run")]
    done = subprocess.run([*command, "--json", str(tmp_path / "found.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bytes"] <= 5_000_000 and found["pictures_shown"] == found["pictures"] >= 24
    assert found["console_messages"] == found["requests"] == [] and found["pixels_beyond_the_screen"] == 0
    assert found["report_seconds"] < 0.01 * found["run_seconds"] + 1  # the first report is there whatever it takes

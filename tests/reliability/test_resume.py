"""Rows 1 to 3, 5 to 10 of the reliability table: runs that are killed, starved or stopped, and what they come back as.

The short ones run with every commit; those marked soak by the dozen (``make soak``), and print what they counted.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from kill_runner import PPO_SHORT, Runner, differences, result

from mmft.training.transaction import Checkpoints

FAILPOINTS = ("first_file", "half_way", "before_manifest", "before_rename", "after_rename", "deleting")


@pytest.fixture(scope="module")
def runner():
    started = Runner()
    yield started
    started.close()


def run_whole(runner, folder: Path, overrides: list[str] | None = None, **options) -> float:
    """A run without a mishap; its seconds."""
    began = time.monotonic()
    code, output = runner.run("ppo", folder=str(folder), overrides=overrides or [], **options)
    assert code == 0, output[-3000:]
    return time.monotonic() - began


def kill(runner, folder: Path, overrides: list[str], **how) -> None:
    code, output = runner.run("ppo", folder=str(folder), overrides=overrides, **how)
    assert code == -signal.SIGKILL, f"not killed ({how}): {output[-2000:]}"


@pytest.fixture(scope="module")
def short(runner, tmp_path_factory):
    """The unbroken short run."""
    folder = tmp_path_factory.mktemp("short")
    run_whole(runner, folder, PPO_SHORT)
    return result(folder, "step-000008")


@pytest.mark.parametrize("point", ["half_way:2", "before_rename:3", "deleting:1", "before_update:5"])
def test_a_killed_run_resumes_to_the_same_end(runner, short, tmp_path, point):
    kill(runner, tmp_path, PPO_SHORT, env={"MMFT_FAILPOINT": point})
    run_whole(runner, tmp_path, PPO_SHORT, resume="latest")
    assert differences(short, result(tmp_path, "step-000008")) == []


@pytest.mark.soak
def test_row_1_ppo_killed_twenty_times(runner, tmp_path):
    seconds = run_whole(runner, tmp_path / "unbroken")
    whole, equal, tried = result(tmp_path / "unbroken"), 0, 0
    stream = random.Random(1)
    plans: list[dict] = [{"env": {"MMFT_FAILPOINT": f"{p}:{stream.randint(2, 9)}"}} for p in FAILPOINTS]
    plans += [{"instant": stream.uniform(0.0, 0.6)} for _ in range(15)]
    for number, plan in enumerate(plans):
        folder, how = tmp_path / str(number), dict(plan)
        if (share := how.pop("instant", None)) is not None:
            how |= {"once": str(folder / "checkpoints" / "step-000005"), "signals": [(share * seconds, signal.SIGKILL)]}
        kill(runner, folder, [], **how)
        run_whole(runner, folder, resume="latest")
        tried += 1
        wrong = differences(whole, result(folder))
        equal += not wrong
        print(f"row 1: {plan}: {'equal' if not wrong else 'DIFFERENT in ' + ', '.join(wrong)}", flush=True)
    print(f"row 1: {equal}/{tried} bitwise equal to the unbroken run ({seconds:.0f} s)")
    assert equal == tried == 21

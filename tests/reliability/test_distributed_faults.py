"""One of two processes is killed, raises, hangs or has nothing to learn from (rows 19 to 21)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training")]

from launching import ROOT, end, launch, running, start  # noqa: E402
from uneven import CASES  # noqa: E402

REWARDS = HERE / "faulty_rewards.py"
SHORT = ["train.steps=4", "data.train_rows=8", "eval.rows=4", "eval.every=0", "rollout.prompts_per_step=4"]
SHORT += ["rollout.num_generations=2", "train.micro_prompts=null", "train.save_every=1", "output.trackers=[]"]
LAST_SCREEN = 40  # lines


@pytest.fixture
def faulty(tmp_path):
    """``faulty(reward, seconds)``: a two-process run of the recipe; the launch, and the end of its output."""
    place = tmp_path / "launch"

    def run(reward: str, timeout: float):
        rewards = f"rewards=[{{name: '{REWARDS}:{reward}', options: {{folder: '{tmp_path}'}}}}]"
        options = [*SHORT, rewards, f"train.timeout={timeout}", f"output.dir={tmp_path / 'run'}"]
        process = start(place, ROOT / "recipes" / "caption_ppo.py", *options)
        fault = tmp_path / "step2.rank1"  # written when the fault is due
        wait_for(lambda: fault.exists() and fault.read_text() or process.poll() is not None, 120)
        assert fault.exists(), (place / "err").read_text()[-3000:]
        return process, int(fault.read_text()), time.monotonic()

    yield run
    end(place)


def wait_for(there, seconds: float) -> float:
    """Seconds until something is there."""
    began = time.monotonic()
    while not there():
        assert time.monotonic() - began < seconds, "it took too long"
        time.sleep(0.05)
    return time.monotonic() - began


def ended(tmp_path: Path, process, within: float) -> tuple[float, str]:
    """Seconds from the fault to the end of everything, and the last screen; no process may be left."""
    seconds = wait_for(lambda: process.poll() is not None, within)
    assert process.returncode != 0
    wait_for(lambda: not running(tmp_path / "launch"), 5)
    return seconds, "\n".join((tmp_path / "launch" / "err").read_text().splitlines()[-LAST_SCREEN:])


def test_an_exception_in_the_reward_of_one_ends_both(faulty, tmp_path):
    process, _, _ = faulty("raises", 600)
    seconds, screen = ended(tmp_path, process, 60)
    print(f"\nexception on rank 1: everything ended after {seconds:.1f} s")
    said = r"rank 1 failed in phase 'reward' of step 2: RewardError: step 2: reward 'raises', row 2 (id 'scene-"
    assert said in screen and "KeyError: 'no colour in scene-" in screen
    assert f"rank 0, first cause: {said}" in (tmp_path / "launch" / "err").read_text()


def test_a_killed_process_is_named_and_ends_the_other(faulty, tmp_path):
    process, pid, _ = faulty("hangs", 600)
    os.kill(pid, signal.SIGKILL)
    seconds, screen = ended(tmp_path, process, 60)
    print(f"\nrank 1 killed: everything ended after {seconds:.1f} s")
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in screen and "SIGKILL" in screen
    assert "rank 1, which is without a sign of life since phase 'reward' of step 2" in screen


@pytest.mark.soak
@pytest.mark.parametrize(("reward", "doing"), [("hangs", "is in"), ("holds", "is without a sign of life since")])
def test_a_process_that_hangs_ends_both_in_time(faulty, tmp_path, reward, doing):
    process, _, began = faulty(reward, 20)
    _, screen = ended(tmp_path, process, 60)
    seconds = time.monotonic() - began
    print(f"\nrank 1 {reward}, T = 20 s: everything ended after {seconds:.1f} s")
    assert seconds < 35
    whole = (tmp_path / "launch" / "err").read_text()
    assert "rank 0, in phase 'step' of step 2, waited 2" in whole
    assert f"for rank 1, which {doing} phase 'reward' of step 2" in whole
    assert "rank 1" in screen and "'reward' of step 2" in screen
    assert "in holds" in whole or "in hangs" in whole  # the stacks show the line that hangs


@pytest.mark.soak
def test_a_killed_launcher_leaves_no_process(faulty, tmp_path):
    process, _, began = faulty("hangs", 600)
    process.kill()
    wait_for(lambda: not running(tmp_path / "launch"), 60)
    print(f"\nlauncher killed: everything ended after {time.monotonic() - began:.1f} s")
    assert "the launcher is gone" in (tmp_path / "launch" / "err").read_text()


def test_uneven_work_and_rewards_that_are_all_bad_on_one_rank(tiny_model, tmp_path):
    done = launch(tmp_path, HERE / "uneven.py", str(tmp_path), str(tiny_model("llava")), timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "found.json").read_text())
    one, other = said["spike"]  # of one rank alone, and skipped by both alike
    assert one == other and one[0] == 0.25 and one[1] > 10
    assert len(set(one[2:6])) == 4 and one[5] == one[6]
    found = said["cases"]
    print(f"\nuneven work on two ranks: {len(found)}/{len(CASES)} finished")
    assert found.keys() == set(CASES) and len(found) == 10
    for name, case in found.items():
        assert case["steps"] == 2 and case["same"] and case["finite"], (name, case)
        assert case["evaluated"] == [True], name
        assert case["null"] == (["reward", "reward/odd"] if "everything" in name else []), (name, case["null"])
        taught = [norm > 0 for norm in case["learned"]]
        assert taught == ([False, False] if "everything" in name else [True, True]), name

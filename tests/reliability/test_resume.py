"""Rows 1 to 3 and 5 to 9 of the reliability table: runs that are killed, starved or stopped, and come back.

The short ones run with every commit; those marked soak by the dozen (``make soak``), and print what they counted.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from kill_runner import PPO_SHORT, Runner, differences, hashes, lines, result

from mmft.training.transaction import Checkpoints, step_of

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


@pytest.mark.parametrize("point", ["before_rename:3", "deleting:1", "before_update:5"])
def test_a_killed_run_resumes_to_the_same_end(runner, short, tmp_path, point):
    kill(runner, tmp_path, PPO_SHORT, env={"MMFT_FAILPOINT": point})
    run_whole(runner, tmp_path, PPO_SHORT, resume="latest")
    assert differences(short, result(tmp_path, "step-000008")) == []


SHORT = {"preference": ["train.steps=12"], "supervised": ["data.train_rows=8", "warm_start.epochs=1"]}


@pytest.mark.parametrize("job", SHORT)
def test_heads_and_warm_starts_resume_to_the_same_end(runner, tmp_path, job):
    code, output = runner.run(job, folder=str(tmp_path / "whole"), overrides=SHORT[job])
    assert code == 0, output[-3000:]
    killed = {"folder": str(tmp_path / "killed"), "overrides": SHORT[job]}
    code, output = runner.run(job, env={"MMFT_FAILPOINT": "before_rename:2"}, **killed)
    assert code == -signal.SIGKILL, output[-3000:]
    code, output = runner.run(job, resume="latest", **killed)
    assert code == 0, output[-3000:]
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole") != {}


def test_row_7_a_full_disk_costs_nothing_but_time(runner, short, tmp_path):
    kill(runner, tmp_path, PPO_SHORT, env={"MMFT_FAILPOINT": "before_update:5"})  # after the checkpoint of step 4
    # The adapter has 800 kB, everything written before it less than 60.
    code, output = runner.run("ppo", folder=str(tmp_path), overrides=PPO_SHORT, resume="latest", limit=100_000)
    checkpoints = tmp_path / "checkpoints"
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: NotSaved") and "step-000006 was not saved" in last and ".safetensors" in last
    assert "bytes" in last and "too large" in last
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000004"]
    run_whole(runner, tmp_path, PPO_SHORT, resume="latest")
    assert differences(short, result(tmp_path, "step-000008")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row_8_a_signal_saves_and_the_run_goes_on_later(runner, short, tmp_path, number):
    once = {"once": str(tmp_path / "checkpoints" / "step-000002"), "signals": [(0.05, number)]}
    code, output = runner.run("ppo", folder=str(tmp_path), overrides=PPO_SHORT, **once)
    waited = time.time() - (tmp_path / "checkpoints" / "step-000002").stat().st_mtime - 0.05
    assert code == 128 + number and waited < 30
    print(f"row 8: {number.name}: saved and ended with code {code} after {waited:.1f} s")
    said = output[output.index(f"ended by {number.name} after step") :]
    step = int(said.split("after step ")[1].split(":")[0])
    assert f"saved {tmp_path}/checkpoints/step-{step:06d}; go on by --resume" in said.replace("\n", "")
    assert 2 <= step < 8 and (tmp_path / "checkpoints" / f"step-{step:06d}" / "manifest.json").is_file()
    run_whole(runner, tmp_path, PPO_SHORT, resume="latest")
    assert differences(short, result(tmp_path, "step-000008")) == []


SLOW = """
import time
calls = 0
def slow(completions, **_):
    global calls
    calls += 1
    if calls == 4:
        open(__file__ + ".called", "w").close()
        time.sleep(120)
    return [float(len(text)) for text in completions]
"""


def test_row_8_a_second_signal_does_not_wait(runner, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    overrides = [*PPO_SHORT, f"rewards=[{{name: '{tmp_path / 'slow.py'}:slow'}}]"]
    called = {"once": str(tmp_path / "slow.py.called"), "signals": [(0.5, signal.SIGTERM), (2.0, signal.SIGTERM)]}
    code, output = runner.run("ppo", folder=str(tmp_path / "run"), overrides=overrides, **called)
    waited = time.time() - (tmp_path / "slow.py.called").stat().st_mtime
    assert code == 143 and "once more ends it at once" in output
    assert waited < 2.0 + 5.0
    print(f"row 8: the second signal ended it after {waited - 2.0:.1f} s")
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest().name == "step-000002"


def test_row_6_rotation_always_leaves_a_whole_checkpoint(runner, tmp_path):
    stream, step, kills, saves = random.Random(0), 0, 0, 0
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for number in range(20):
        point = ("deleting", "after_rename", "before_rename", "deleting")[number % 4]
        failpoint = {"MMFT_FAILPOINT": f"{point}:{stream.randint(2, 12)}"}
        code, _ = runner.run("rotate", folder=str(checkpoints.folder), start=step + 1, stop=step + 100, env=failpoint)
        assert code == -signal.SIGKILL
        found = checkpoints.latest()
        assert found is not None
        kills, saves, step = kills + 1, saves + step_of(found) - step, step_of(found)
    code, _ = runner.run("rotate", folder=str(checkpoints.folder), start=step + 1, stop=max(step + 3, 201))
    last = checkpoints.latest()
    assert code == 0 and len(list(checkpoints.folder.iterdir())) == 2  # nothing half written or half deleted is left
    print(f"row 6: {step_of(last)} saves, {kills} kills in rotation, a whole checkpoint after each")
    assert step_of(last) >= 200


def test_row_5_no_whole_checkpoint_ends_in_code_2(runner, tmp_path):
    kill(runner, tmp_path, PPO_SHORT, env={"MMFT_FAILPOINT": "before_manifest:2"})
    (tmp_path / "checkpoints" / "step-000002" / "state.json").unlink()
    code, output = runner.run("ppo", folder=str(tmp_path), overrides=PPO_SHORT, resume="latest")
    assert code == 2 and "nothing to resume: none of the checkpoints" in output and "state.json is missing" in output
    assert "step-000004 was never finished" in output and "step 1/8" not in output


@pytest.mark.soak
def test_row_2_the_others_killed_three_times_each(runner, tmp_path):
    equal = tried = 0
    for job in ("a2c", "preference", "supervised"):
        code, output = runner.run(job, folder=str(tmp_path / job), overrides=[])
        assert code == 0, output[-3000:]
        for point in ("before_rename:2", "before_manifest:4", "deleting:1"):
            folder = tmp_path / f"{job}-{point}"
            code, output = runner.run(job, folder=str(folder), overrides=[], env={"MMFT_FAILPOINT": point})
            assert code == -signal.SIGKILL, output[-3000:]
            code, output = runner.run(job, folder=str(folder), overrides=[], resume="latest")
            assert code == 0, output[-3000:]
            same = hashes(tmp_path / job) == hashes(folder)
            tried, equal = tried + 1, equal + same
            print(f"row 2: {job} killed at {point}: {'equal' if same else 'DIFFERENT'}", flush=True)
    print(f"row 2: {equal}/{tried} bitwise equal")
    assert equal == tried == 9


@pytest.mark.soak
def test_row_3_no_row_is_lost_or_scored_twice(runner, tmp_path):
    run_whole(runner, tmp_path / "unbroken")
    whole = lines(tmp_path / "unbroken" / "ledger.jsonl")
    points = [f"before_{phase}:{step}" for phase in ("reference", "reward", "update") for step in (7, 18, 33)]
    for number, point in enumerate(points):
        folder = tmp_path / str(number)
        kill(runner, folder, [], env={"MMFT_FAILPOINT": point})
        run_whole(runner, folder, resume="latest")
        assert lines(folder / "ledger.jsonl") == whole, point
    print(f"row 3: {len(points)}/{len(points)} ledgers of {len(whole)} responses identical")


@pytest.mark.soak
def test_row_9_one_seed_one_result(runner, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_whole(runner, tmp_path / name, [f"seed={seed}"])
    one, other, third = (result(tmp_path / name) for name in "abc")
    assert differences(one, other) == []
    wrong = set(differences(one, third))
    print(f"row 9: equal seeds equal in {', '.join(one)}; another seed differs in {', '.join(sorted(wrong))}")
    assert {"adapter", "value head", "optimizer", "metrics", "ledger", "samples"} <= wrong


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

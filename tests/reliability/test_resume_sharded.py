"""Row 12: several processes, each with a shard of the optimizer, one killed between the writes of two shards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kill_runner import PPO

from mmft.training.transaction import Checkpoints, sha256, verify

ROOT = Path(__file__).parents[2]
OVERRIDES = [*PPO, "data.train_rows=12", "train.steps=4", "train.save_every=2", "eval.every=0", "eval.rows=4"]


def launch(config: str | None, folder: Path, *arguments: str, failpoint: str = "") -> tuple[int, str]:
    """Exit code and output of the recipe under a launch file (None: one process)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MMFT_FAILPOINT": failpoint}
    command = [sys.executable]
    if config is not None:
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--mixed_precision", "no"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
        command += ["--main_process_port", str(port)]
    command += [str(ROOT / "recipes" / "caption_ppo.py"), *OVERRIDES, f"output.dir={folder}", *arguments]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    return child.returncode, output


def hashes(folder: Path) -> dict[str, str]:
    """Of what the run came to, and of every process's part of the last checkpoint."""
    checkpoint = folder / "checkpoints" / "step-000004"
    names = [name for name in verify(checkpoint) if name.endswith(".safetensors")]
    assert [n for n in names if n.startswith("rank-")] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    paths = [folder / "adapter" / "adapter_model.safetensors", folder / "value_head.safetensors"]
    return {str(p.relative_to(folder)): sha256(p) for p in [*paths, *(checkpoint / name for name in names)]}


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_row_12_one_rank_killed_between_shards(engine, tmp_path):
    code, output = launch(engine, tmp_path / "unbroken")
    assert code == 0, output[-5000:]
    whole = hashes(tmp_path / "unbroken")
    code, _ = launch(engine, tmp_path / "broken", failpoint="before_shard@1:2")
    assert code != 0
    checkpoints = Checkpoints(tmp_path / "broken" / "checkpoints")
    left = checkpoints.folder / ".writing-step-000004"
    assert (left / "rank-00000.safetensors").is_file() and not (left / "rank-00001.safetensors").exists()
    assert checkpoints.latest().name == "step-000002"
    code, output = launch(None, tmp_path / "broken", "--resume")  # one process is another run
    assert code == 2 and "made with world_size 2, this run has world_size 1" in output
    assert f"made with engine {engine}, this run has engine one" in output
    code, output = launch(engine, tmp_path / "broken", "--resume")
    assert code == 0, output[-5000:]
    assert ".writing-step-000004 was never finished" in output
    found = hashes(tmp_path / "broken")
    assert found == whole
    print(f"row 12: {engine}, 2 processes, killed between shards: {len(found)}/{len(whole)} hashes equal")


TELLS = """
import os, signal
calls = 0
def tells(completions, **_):
    global calls
    calls += 1
    # In the third step, and to one process alone.
    if calls == 3 and os.environ["RANK"] == "1" and os.path.exists(__file__ + ".once"):
        os.unlink(__file__ + ".once")
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.soak
def test_row_8_a_signal_to_one_process_ends_both_after_the_same_step(tmp_path):
    (tmp_path / "tells.py").write_text(TELLS)
    rewards = f"rewards=[{{name: '{tmp_path / 'tells.py'}:tells'}}]"
    code, output = launch("cpu_2proc", tmp_path / "unbroken", rewards)
    assert code == 0, output[-5000:]
    (tmp_path / "tells.py.once").touch()
    code, output = launch("cpu_2proc", tmp_path / "broken", rewards)
    assert (
        code != 0 and output.count("ended by SIGTERM after step") == 1 and "Traceback" not in output.split("step 1")[1]
    )
    assert Checkpoints(tmp_path / "broken" / "checkpoints").latest().name in ("step-000002", "step-000003")
    code, output = launch("cpu_2proc", tmp_path / "broken", rewards, "--resume")
    assert code == 0, output[-5000:]
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "unbroken")
    print(f"row 8: 2 processes, SIGTERM to one: {len(hashes(tmp_path / 'broken'))} hashes equal")

"""Trackers by name: what of a run arrives in each service, that no secret does, and that none can end a run."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.training.evaluate import Evaluation
from mmft.training.monitor import Monitor
from mmft.training.trackers import check_trackers

SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"
OPTIONS = {"kl_coef": 0.02, "guards": {"share": {"limit": 0.95}}, "vllm": {"api_key": SECRET}}
ROWS = [{"id": f"row{i}", "image": Image.new("RGB", (40, 30), (250, 10 * i, 0)), "prompt": "?"} for i in range(3)]
ROWS.append({"id": "sound", "prompt": "?"})


def evaluation(word: str, score: float) -> Evaluation:
    return Evaluation([f"{word} {i}" for i in range(4)], {"cider_d": np.full(4, score)})


def two_steps(folder: Path, tracker: str) -> Monitor:
    """A run of three steps, ended after the second."""
    monitor = Monitor(folder, 3, trackers=(tracker,), options=OPTIONS)
    monitor.evaluated(0, ROWS, evaluation("old", 1.0), evaluation("old", 1.0))
    for step in (1, 2):
        numbers = {"reward": step / 2, "reward/cider_d": float(step), "kl": float("nan")}
        assert monitor.wants_distributions(step)
        monitor.log(step, numbers, distributions={"ratio": np.array([0.9, 1.0, 1.0, 1.3], dtype=np.float32)})
    monitor.evaluated(2, ROWS, evaluation("old", 1.0), evaluation("new", 2.5))
    return monitor


def resumed_after(step: int, folder: Path, tracker: str) -> Monitor:
    monitor = Monitor(folder, 3, trackers=(tracker,), resume_step=step, options=OPTIONS)
    for now in range(step + 1, 4):
        monitor.log(now, {"reward": now / 2, "reward/cider_d": float(now)})
    return monitor


def secret_files(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> EventAccumulator:
        return EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "histograms": 0, "tensors": 0}).Reload()

    two_steps(tmp_path, "tensorboard").close()
    pictures = read().Images("held_out/1")
    assert [e.step for e in pictures] == [0] and pictures[0].height == 30  # once, for they stay the same
    resumed_after(1, tmp_path, "tensorboard").close()
    assert secret_files(tmp_path) == [] and not (tmp_path / "trackers.json").exists()
    assert [p.name for p in tmp_path.joinpath("tensorboard").iterdir() if p.is_dir()] == []  # one run in its list
    events = read()
    # the second step was taken back by the resume, and written again
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/cider_d")] == [(0, 1.0)]
    assert "kl" not in events.Tags()["scalars"]
    (histogram,) = events.Histograms("distribution/ratio")
    assert (histogram.histogram_value.num, round(histogram.histogram_value.max, 3)) == (4, 1.3)
    text = events.Tensors("held_out/1/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "before: old 1" in text and "held_out/3/text_summary" not in events.Tags()["tensors"]
    options = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "guards.share.limit: 0.95" in options and "(hidden)" in options


# ---------------------------------------------------------------- Weights & Biases, offline


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """wandb as in a new process without a login."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield wandb
    wandb.teardown()


def records(folder: Path) -> list:
    """What an offline run has written: records in blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data, place, found, whole = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if (1 << 15) - place % (1 << 15) < 7:
            place += (1 << 15) - place % (1 << 15)
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def history(found: list) -> list[dict]:
    rows = [r.history for r in found if r.HasField("history")]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def test_wandb(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", f"rewards.0.options.token={SECRET}"])
    monitor = two_steps(tmp_path / "run", "wandb")
    print("a line on the screen")
    monitor.close()
    resumed_after(2, tmp_path / "run", "wandb").close()
    wandb.teardown()  # its process writes the files, and has done so once it is gone
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert first.name.rsplit("-", 1)[1] == second.name.rsplit("-", 1)[1]  # one run to the service
    assert secret_files(tmp_path) == [] and sys.argv[1].endswith(SECRET)
    found = records(first)
    rows = {row["_step"]: row for row in history(found)}
    assert [rows[step].get("reward") for step in (0, 1, 2)] == [None, 0.5, 1.0]
    assert (rows[0]["eval/cider_d"], rows[2]["eval/cider_d"]) == (1.0, 2.5) and "kl" not in rows[1]
    assert rows[1]["distribution/ratio/_type"] == "histogram" and sum(rows[1]["distribution/ratio/values"]) == 4
    table = json.loads((first / "files" / rows[2]["held_out/path"]).read_text())
    assert [(row[0], row[2], row[3]) for row in table["data"]][1] == ("row1", "old 1", "new 1")
    artifact = [r.artifact for r in found if r.HasField("artifact")][-1]  # the table with its pictures
    pictures = [item.local_path for item in artifact.manifest.contents if item.path.endswith(".png")]
    assert len(table["data"]) == 3 == len(pictures) and Image.open(pictures[0]).size == (40, 30)
    config = {i.key or i.nested_key[0]: i.value_json for r in found for i in r.config.update}
    assert config["guards.share.limit"] == "0.95" and config["vllm.api_key"] == '"(hidden)"'
    assert [row["reward"] for row in history(records(second))] == [1.5]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, wandb, capsys):
    monitor = two_steps(tmp_path, "wandb")
    wandb.finish()  # by a reward function of the user's, say
    monitor.log(3, {"reward": 7.0})
    monitor.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["reward"] == 7.0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert told.startswith("wandb is left out from here on: ") and told.endswith("metrics.jsonl has all numbers")


def test_wandb_without_a_login(wandb, monkeypatch):
    """Asked in a terminal with nobody there, it would hold the run for ever."""
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(ValueError, match="wandb has no login: run `wandb login`, or set WANDB_MODE=offline"):
        check_trackers(["wandb"])


# ---------------------------------------------------------------- MLflow, in files


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    import mlflow

    two_steps(tmp_path / "run", "mlflow").close()
    resumed_after(2, tmp_path / "run", "mlflow").close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mmft").experiment_id])  # one run, gone on with
    assert run.info.run_name == "run" and run.info.status == "FINISHED"

    def curve(name: str) -> list[tuple[int, float]]:
        # Written by a pool of threads: MLflow keeps them in the order they arrived in, and shows them by step.
        return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))

    assert curve("reward") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert curve("reward.cider_d") == [(1, 1.0), (2, 2.0), (3, 3.0)] and curve("eval.cider_d") == [(0, 1.0), (2, 2.5)]
    assert run.data.params["guards.share.limit"] == "0.95" and run.data.params["vllm.api_key"] == "(hidden)"
    folder = Path(client.download_artifacts(run.info.run_id, "held_out"))
    steps = ["step-000000.json", "step-000002.json"]
    assert sorted(p.name for p in folder.iterdir()) == ["00.png", "01.png", "02.png", *steps]
    captions = json.loads((folder / "step-000002.json").read_text())["captions"]
    assert captions[1] == {"id": "row1", "before": "old 1", "now": "new 1"}
    assert secret_files(tmp_path) == []


def test_a_store_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())  # which MLflow refuses unless allowed
    with pytest.raises(ValueError, match="output.trackers: mlflow did not start: .*maintenance mode.*leave it out"):
        check_trackers(["mlflow"])


# ---------------------------------------------------------------- wrong names


def test_unknown_and_missing_trackers(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord': expected one of tensorboard, wandb"):
        check_trackers(["tensorbord"])
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed, whether it is or not
    with pytest.raises(ValueError, match="output.trackers: trackio is not installed: pip install trackio"):
        check_trackers(["tensorboard", "trackio"])
    monkeypatch.delitem(sys.modules, "trackio")
    (tmp_path / "trackio").mkdir()  # a folder is no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.getcwd())
    importlib.invalidate_caches()
    if importlib.util.find_spec("trackio").origin is None:
        with pytest.raises(ValueError, match="trackio is not installed"):
            check_trackers(["trackio"])

"""One process = two = ZeRO-1/2/3 = FSDP2: the same rows, responses, losses and weights, by the shipped launch files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from mmft.training import distributed

HERE = Path(__file__).parent
FILES = HERE.parents[1] / "accelerate_configs"
# engine -> launch file. Those of several GPUs or machines are launched where there are such.
ENGINES = {
    "ddp": "cpu_2proc",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero3_offload": "zero3_offload",
    "fsdp2": "fsdp2",
}
CASES = {
    "ddp": ["sgd", "adamw", "dropped", "guard", "state"],
    "zero1": ["sgd"],
    "zero2": ["sgd", "adamw", "dropped", "guard", "state"],
    "zero3": ["sgd", "adamw", "dropped", "guard", "state"],
    "zero3_offload": ["sgd", "state"],
    "fsdp2": ["sgd", "adamw", "dropped", "guard", "state"],
}


def launch(name: str, *arguments: object, script: Path = HERE / "launched.py") -> str:
    """Runs a script under a launch file on two processes of the CPU; what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(str(p) for p in (HERE, HERE.parent, HERE.parents[1]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(FILES / f"{name}.yaml"), "--mixed_precision", "no"]
    command += ["--main_process_port", str(port), str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def one(tiny_model, tmp_path_factory):
    """The cases on one process, this one."""
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        launched.run(folder, tiny_model("llava"), ["sgd", "adamw", "state"])
    finally:
        torch.set_num_threads(threads)
    return folder


def results(folder: Path, case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / f"{case}.json").read_text()), load_file(folder / f"{case}.safetensors")


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree(engine, one, tiny_model, tmp_path):
    launch(ENGINES[engine], tmp_path, tiny_model("llava"), ",".join(CASES[engine]))
    for case in CASES[engine]:
        if case in ("sgd", "adamw"):
            _compare(engine, case, one, tmp_path)
    if "adamw" in CASES[engine]:
        ours, others = (flat(results(folder, "adamw")[0]["rewards"]) for folder in (one, tmp_path))
        assert ours == pytest.approx(others, rel=1e-4) and len(ours) > 3
    _adapters_alike(one / "sgd", tmp_path / "sgd", tiny_model("llava"))
    if "dropped" in CASES[engine]:
        assert results(tmp_path, "dropped")[0]["evaluated"] == [3] * 10
    if "guard" in CASES[engine]:
        _guarded(engine, results(tmp_path, "guard")[0])
    if "state" in CASES[engine]:
        found, _ = results(tmp_path, "state")
        assert (found["back"], found["same"], found["sharded"]) == (True, True, engine != "ddp")
        assert found["kept"] > 0


def _compare(engine: str, case: str, one: Path, other: Path) -> None:
    (expected, weights), (found, others) = results(one, case), results(other, case)
    assert found["ledger"] == expected["ledger"]  # the same rows, and their responses token for token
    for ours, theirs in zip(expected["metrics"], found["metrics"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5), (engine, case)
    assert weights.keys() == others.keys() and all(value.numel() for value in others.values())
    apart = max(float((weights[name] - others[name]).abs().max()) for name in weights)
    print(f"{engine} {case}: weights moved by {expected['moved']:.2g}, {apart:.2g} apart from one process")
    # AdamW divides by the gradient's size, so rounding of tiny gradients shows at the scale of the step.
    assert apart <= {"sgd": 1e-6, "adamw": 1e-4}[case] and expected["moved"] > 1e-3
    if case == "sgd":
        assert found["texts"] == expected["texts"]


def _adapters_alike(one: Path, other: Path, model: Path) -> None:
    """What is on disk reloads by plain PEFT onto the untouched base, and is the same adapter."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    saved = load_file(other / "adapter" / "adapter_model.safetensors")
    expected = load_file(one / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert max(float((saved[name] - expected[name]).abs().max()) for name in saved) <= 1e-6
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), other / "adapter")
    inside = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert inside.keys() == saved.keys() and all(torch.equal(inside[name], saved[name]) for name in saved)
    head = load_file(other / "value_head.safetensors")
    assert {name: tuple(value.shape) for name, value in head.items()} == {"weight": (1, 64), "bias": (1,)}
    assert all(float(value.abs().max()) > 0 for value in head.values())


def _guarded(engine: str, found: dict) -> None:
    """Both processes say the same: what, in which step, on which process, of which rows; and no weight has moved."""
    assert found["unchanged"] == {"gradient": True, "loss": True, "value": True}
    for kind, said in found["said"].items():
        assert len(said) == 2 and said[0] == said[1], (kind, said)
        assert said[0].startswith("step 2, pass 1") and "is not finite" in said[0], said[0]
        assert "rank 1 (rows r" in said[0], said[0]
        # Under FSDP2 nobody sees a process's own gradients before they are summed.
        assert ("rank 0" in said[0]) == (engine == "fsdp2" and kind == "gradient"), said[0]


@pytest.mark.soak
@pytest.mark.parametrize("engine", ENGINES)
def test_the_recipe_runs_unchanged(engine, tmp_path):
    """The bundled model and the built-in world, from the rows to the report, with checkpoints."""
    small = "train.steps=2 train.save_every=1 train.micro_prompts=1 rollout.prompts_per_step=4 "
    small += "rollout.num_generations=4 eval.rows=5 eval.every=0 data.train_rows=200 output.trackers=[]"
    recipe = HERE.parents[1] / "recipes" / "caption_ppo.py"
    launch(ENGINES[engine], *small.split(), f"output.dir={tmp_path / 'run'}", script=recipe)
    for name in ("summary.json", "report.html", "adapter/adapter_model.safetensors", "checkpoints/step-000002"):
        assert (tmp_path / "run" / name).exists(), name
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2] and metrics[0]["first_ratio_error"] <= 1e-4


@pytest.mark.parametrize("file", sorted(path.stem for path in FILES.glob("*.yaml")))
def test_launch_files_are_what_the_launcher_takes(file):
    config = load_config_from_file(str(FILES / f"{file}.yaml"))  # it refuses keys that it does not know
    assert config.num_processes >= 1
    assert f"accelerate_configs/{file}.yaml" in (FILES / f"{file}.yaml").read_text()


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "sgd"])
def test_other_optimizers_train_and_resume(optimizer, tiny_model, tmp_path):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    # 8-bit AdamW keeps moments as bytes of weights of 4,096 numbers and more; of these adapters none is as large.
    running = launched.trainer(tmp_path, tiny_model("llava"), optimizer=optimizer, learning_rate=0.01, full=True)
    start = launched.trained(running)
    running.step(1)
    weights = launched.trained(running)
    assert any(not torch.equal(start[name], weights[name]) for name in weights)
    kept = distributed.optimizer_state(running.accelerator, running.optimizer)
    assert any(value.dtype == torch.uint8 for value in kept[0].values()) == (optimizer == "adamw_8bit")
    running.step(2)
    once = launched.trained(running)
    distributed.load_trained_weights(running.accelerator, running.prepared, weights)
    distributed.load_optimizer_state(running.accelerator, running.optimizer, *kept)
    running.step(2)
    again = launched.trained(running)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_weights_of_another_model_are_refused(tiny_model, tmp_path):
    running = launched.trainer(tmp_path, tiny_model("llava"))
    for weights, match in (
        ({"value_head.weights": torch.zeros(1, 64)}, "'value_head.weights' belongs to no trainable parameter"),
        ({"value_head.weight": torch.zeros(1, 65)}, r"has shape \(1, 65\), the model's has \(1, 64\)"),
    ):
        with pytest.raises(ValueError, match=match):
            distributed.load_trained_weights(running.accelerator, running.prepared, weights)


def flat(state: object) -> list[float]:
    """Every number of a nested state, in order."""
    if isinstance(state, dict):
        return [number for key in sorted(state) for number in flat(state[key])]
    if isinstance(state, list):
        return [number for value in state for number in flat(value)]
    return [float(state)] if isinstance(state, int | float) else []

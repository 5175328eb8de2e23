"""The benchmark against TRL, at a size that takes seconds: it must compare equal work, and its table must not lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from benchmarks import _systems, vs_trl
from benchmarks._models import PROMPT, SHAPES, build, rows
from benchmarks._plots import figure
from benchmarks._trl import Setting

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model, and rows of two iterations."""
    home = tmp_path_factory.mktemp("vs_trl")
    folder = build(TINY, home / "model")
    Dataset.from_list(rows(TINY, TINY.prompts * 2 + 1)).save_to_disk(str(home / "rows"))
    return folder, home / "rows"


def measured(system: str, workload: tuple[Path, Path], setting: str | int | None) -> tuple[list[dict], dict]:
    """What is said before the first iteration and after each, and at the end."""
    said: list[dict[str, Any]] = []
    end = _systems.measure(system, TINY, *workload, setting, lambda found: not said.append(found))
    return said, end


@pytest.fixture(scope="module")
def mmft_logprobs(workload) -> list[float]:
    return measured("ppo", workload, 1)[0][0]["logprobs"]


# Generation in two parts and a static cache: what the sweep tries must do the same work.
@pytest.mark.parametrize(
    ("system", "setting"),
    [("loo", None), ("grpo", "batch=4"), ("grpo", "batch=2,generation=2,cache=static"), ("rloo", "batch=4")],
)
def test_each_side_does_the_whole_of_the_work(workload, mmft_logprobs, system: str, setting: str | None) -> None:
    # `measure` itself raises when responses are shorter than asked or the trainer saw other rewards.
    said, end = measured(system, workload, setting)
    first, *iterations = said
    assert first["logprobs"] == pytest.approx(mmft_logprobs, abs=1e-4)
    assert all(logprob < -1 for logprob in first["logprobs"])  # of a real distribution, not zeros on both sides
    assert len(iterations) == 2
    for found in iterations:
        assert set(found["phases"]) == set(_systems.PHASES)
        assert all(seconds > 0 for seconds in found["phases"].values())
        assert sum(found["phases"].values()) == pytest.approx(found["seconds"], rel=0.3)  # nothing large unnamed
        assert found["peak_mib"] >= found["increase_mib"] >= 0
    # The trainers cut texts differently at the ends; the score must not depend on it.
    assert all(score == len(set(text.strip())) / 64 for text, score in end["seen"])
    json.dumps([said, end])  # what the worker hands back


def test_a_response_that_stops_early_is_noticed(workload, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _systems._ours
    monkeypatch.setattr(_systems, "_ours", lambda *a: (honest(*a)[0], TINY.length - 0.25))
    with pytest.raises(RuntimeError, match="expected 8 of 3"):
        measured("ppo", workload, None)


def test_rewards_that_a_trainer_changed_are_noticed(workload, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _systems._ours
    monkeypatch.setattr(_systems, "_ours", lambda *a: (honest(*a)[0] + 0.01, float(TINY.length)))
    with pytest.raises(RuntimeError, match="mean reward"):
        measured("ppo", workload, None)


def test_processes_take_turns(tmp_path: Path) -> None:
    result = vs_trl.compare(TINY, tmp_path, ["loo", "grpo"], pairs=2, trl="batch=4", threads=1, sweep=False)
    assert [len(runs) for runs in result["iterations"].values()] == [2, 2]  # the warm-up is not among them
    assert result["settings"] == {"loo": None, "grpo": "batch=4"}
    assert 0 <= result["logprob_gap"] < 1e-4
    assert "loo/grpo" in result["ratios"]
    json.dumps(result)
    vs_trl.plot([result], tmp_path / "phases.png")
    assert (tmp_path / "phases.png").read_bytes().startswith(b"\x89PNG")


def test_log_probs_that_differ_stop_the_comparison() -> None:
    same = {"ppo": [-3.0, -4.0], "grpo": [-3.0, -4.0 + 5e-4]}
    assert vs_trl._same_logprobs(same) == pytest.approx(5e-4)
    with pytest.raises(RuntimeError, match=r"differ by up to 1\.00e-02"):
        vs_trl._same_logprobs({"ppo": [-3.0, -4.0], "loo": [-3.0, -4.0], "grpo": [-3.01, -4.0]})


def test_the_fastest_setting_that_works_is_taken() -> None:
    seconds = {"batch=2": 3.0, "batch=4": 2.0, "batch=4,cache=static": 1.0, "1": 0.5, "2": 0.4}

    def trial(system: str, setting: str | int) -> dict[str, Any]:
        found = {"system": system, "setting": setting}
        return found | (
            {"failed": "no static cache"} if "static" in str(setting) else {"seconds": seconds[str(setting)]}
        )

    trials, settings = vs_trl._settings(TINY, ["ppo", "loo", "grpo", "rloo"], trial, None)
    assert settings == {"ppo": 2, "loo": 2, "grpo": "batch=4", "rloo": "batch=4"}
    assert [t["system"] for t in trials] == ["grpo"] * 3 + ["ppo"] * 2
    _, given = vs_trl._settings(TINY, ["loo", "rloo"], trial, "batch=2")
    assert given == {"loo": 2, "rloo": "batch=2"}


def test_setting_is_read_back_and_mistakes_are_named() -> None:
    for setting in (Setting(16), Setting(8, 64), Setting(4, None, "static", compile=True)):
        assert Setting.parse(str(setting)) == setting
    for wrong in ("16", "batch=x", "generation=8", "batch=8,cach=static", "batch=8,compile=no"):
        with pytest.raises(ValueError, match="expected batch=N"):
            Setting.parse(wrong)


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    order = {"system": "ppo", "shape": "tiny", "folder": str(tmp_path), "dataset": "", "setting": None, "threads": 1}
    with (
        vs_trl.Process(vs_trl.__file__, order, 1) as process,
        pytest.raises(RuntimeError, match=r"has no config\.json"),
    ):
        process.read()


def test_pictures_differ_so_that_no_cache_helps() -> None:
    pictures = [row["image"].tobytes() for row in rows(TINY, 6)]
    assert len(set(pictures)) == 6


def test_prompts_take_few_tokens_and_every_output_of_the_head_is_a_token(workload) -> None:
    from mmft.vlm.load import load_model

    model, processor = load_model(str(workload[0]))
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.get_output_embeddings().weight.shape[0]  # else mmft would have fewer to choose of
    assert len(tokenizer(PROMPT).input_ids) < len(PROMPT) // 2
    assert tokenizer.decode(tokenizer(PROMPT).input_ids) == PROMPT


def test_table_reads_ratios_the_right_way_round() -> None:
    def run(seconds: float, peak: float) -> dict[str, Any]:
        phases = {"rollout": seconds / 2, "reference": seconds / 8, "reward": 0.0, "update": seconds / 4}
        return {"seconds": seconds, "peak_mib": peak, "increase_mib": peak / 2, "phases": phases}

    found = {
        "ppo": [run(1.0, 100.0), run(1.0, 100.0), run(9.0, 100.0)],
        "grpo": [run(5.0, 200.0), run(5.5, 200.0), run(27.0, 200.0)],
    }
    result = {
        "shape": {"name": "bundled", "prompts": 2, "group": 4, "length": 10, "side": 96},
        "settings": {"ppo": 8, "grpo": "batch=16"},
        "logprob_gap": 1e-6,
        "iterations": found,
        "ratios": vs_trl._ratios(found),
        "targets": {"speed": 6.0, "peak": 0.5},
    }
    # By pair: 5, 5.5 and 3; not the ratio of the medians.
    assert result["ratios"]["ppo/grpo"]["speed"] == {"median": 5.0, "low": 3.0, "high": 5.5}
    lines = vs_trl.table(result).splitlines()
    ppo = next(line for line in lines if line.startswith("ppo ")).split()
    # s/iteration, 8 samples, 80 tokens, peak, increase, phases
    assert ppo[1:] == ["1.000", "8.00", "80.0", "100", "50", "0.500", "0.125", "0.000", "0.250"]
    assert any("samples/s" in line and line.endswith("target >= 6: NOT met") for line in lines[3:])
    assert any("peak memory" in line and line.endswith("target <= 0.5: met") for line in lines)


def test_a_plot_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "x.png") as (axes,):
        axes.plot([1, 1 / 0])
    assert not (tmp_path / "x.png").exists()

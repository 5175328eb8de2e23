"""The benchmark against TRL, at a size that takes seconds: it must compare equal work, and its table must not lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks import vs_trl
from benchmarks._models import PROMPT, SHAPES, build, rows

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("vs_trl")
    folder = build(TINY, home / "model")
    Dataset.from_list(rows(TINY, TINY.prompts * 2)).save_to_disk(str(home / "rows"))
    return folder, home / "rows"


@pytest.mark.parametrize(("system", "batch"), [("mmft", None), ("trl", 4)])
def test_each_side_does_the_whole_of_the_work(workload, system: str, batch: int | None) -> None:
    # `measure` itself raises when responses are shorter than asked or the trainer saw other rewards.
    result = vs_trl.measure(system, TINY, *workload, steps=1, batch=batch)
    assert len(result["seconds"]) == 1  # the warm-up is not among them
    assert result["seconds"][0] > 0
    assert result["peak_mib"] >= result["increase_mib"] >= 0
    # The trainers cut texts differently at the ends; the score must not depend on it.
    assert all(score == len(set(text.strip())) / 64 for text, score in result["seen"])
    json.dumps(result)  # what the worker hands back


def test_a_response_that_stops_early_is_noticed(workload, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = vs_trl._run_mmft
    monkeypatch.setattr(vs_trl, "_run_mmft", lambda *a: honest(*a) | {"length": TINY.length - 0.25})
    with pytest.raises(RuntimeError, match="tokens each"):
        vs_trl.measure("mmft", TINY, *workload, steps=1, batch=None)


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
    def run(seconds: float, peak: float) -> dict:
        return {"seconds": [seconds], "peak_mib": peak, "increase_mib": peak / 2, "phases": {"time/rollout": 0.5}}

    def ratio(value: float) -> dict:
        return {"median": value, "low": value, "high": value}

    result = {
        "shape": {"name": "bundled", "prompts": 2, "group": 4, "length": 10, "side": 96},
        "trl_batch": 8,
        "pairs": [{"mmft": run(1.0, 100.0), "trl": run(5.0, 200.0)}],
        "ratios": {"speed": ratio(5.0), "peak": ratio(0.5), "increase": ratio(0.5)},
        "targets": {"speed": 6.0, "peak": 0.6},
    }
    lines = vs_trl.table(result).splitlines()
    mmft = next(line for line in lines if line.startswith("mmft ")).split()
    assert mmft[1:4] == ["1.000", "8.00", "80.0"]  # s/iteration, 8 samples, 80 tokens
    assert any("samples/s" in line and "NOT met" in line for line in lines[2:])
    assert any("peak memory" in line and line.endswith(": met") for line in lines)

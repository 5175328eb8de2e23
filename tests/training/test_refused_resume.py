"""A resume that is refused leaves the run folder as it was; one that is taken writes its own recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmft.recipe import load_recipe
from mmft.training.run import run

ROOT = Path(__file__).parents[2]
SMALL = ["train.steps=1", "eval.rows=2", "rollout.prompts_per_step=2", "rollout.num_generations=2", "eval.every=0"]
SMALL += ["train.micro_prompts=null", "data.train_rows=8", "rollout.max_completion_length=4", "output.trackers=[]"]


def test_a_refused_resume_changes_no_file(tmp_path, capsys):
    def recipe(*words: str):
        return load_recipe(ROOT / "recipes" / "caption_ppo.yaml", [*SMALL, f"output.dir={tmp_path}", *words])

    def kept() -> dict[str, bytes]:
        return {name: (tmp_path / name).read_bytes() for name in ("recipe.yaml", "document_frequencies.npz")}

    run(recipe())
    before = kept()
    with pytest.raises(SystemExit) as stopped:
        run(recipe("seed=7", "data.train_rows=9"), resume="latest")
    assert stopped.value.code == 2 and "made with seed 0, this run has seed 7" in capsys.readouterr().err
    assert kept() == before
    run(recipe("train.steps=2"), resume="latest")
    assert load_recipe(tmp_path / "recipe.yaml").train.steps == 2

"""Runs side by side: what differs, how sure that is, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmft.cli import main
from mmft.evaluation.compare import compare_runs, different_settings, write_comparison

RECIPE = """seed: {seed}
rewards:
- {{name: cider_d, weight: {weight}}}
train: {{steps: 20, learning_rate: 0.001}}
output: {{dir: {folder}}}
"""


def make_run(folder: Path, gain=0.0, seed=0, weight=1.0, rows=range(40), signature="CIDEr-D|df:1", words="a red ring"):
    """A finished run whose caption of row i scores i / 10 + 1 + gain."""
    (folder / "pictures").mkdir(parents=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i in rows:
            picture = f"pictures/{i}.png" if i < 20 else None
            if picture:
                Image.new("RGB", (32, 24), (5 * i, 80, 90)).save(folder / picture)
            line = {"id": f"row-{i}", "step": 20, "picture": picture, "references": [f"a ring {i}"]}
            line |= {"before": "a ring", "after": words, "columns": {}}
            line["scores_before"] = {"cider_d": i / 10, "reward": i / 10}
            line["scores_after"] = dict.fromkeys(("cider_d", "reward"), i / 10 + 1 + gain)
            line["credit_after"] = [[word, 0.5] for word in words.split()]
            file.write(json.dumps(line) + "\n")
    steps = [{"step": s, "reward": s / 10 + gain, "kl": 0.1, "eval/cider_d": 1.0} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    side = {"mean": 2.0 + gain, "low": 1.9, "high": 2.1}
    summary = {"before": {"cider_d": {"mean": 1.0}, "corpus_bleu_4": {"mean": 0.5}}, "rows": len(rows)}
    summary |= {"after": {"cider_d": side, "corpus_bleu_4": side}, "signatures": {"held-out cider_d": signature}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text(RECIPE.format(seed=seed, weight=weight, folder=folder))
    return folder


def test_differences_are_paired_and_have_the_right_sign(tmp_path):
    """Scores spread over 4 points; only pairing by picture finds a gain of 0.1 on every one of them."""
    found = compare_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", gain=0.1)])
    row = next(row for row in found.rows if row.name == "cider_d")
    assert found.changes(row) == [("+0.100", "+0.100 … +0.100", "good")]
    assert [v.text[:25] for v in found.verdicts] == ["b is better than a in CID"]
    assert compare_runs([tmp_path / "b", tmp_path / "a"]).verdicts[0].state == "bad"
    corpus = next(row for row in found.rows if row.name == "corpus_bleu_4")
    assert found.changes(corpus) == [("–", "", "open")]


def test_rows_are_matched_by_what_they_are_not_where_they_stand(tmp_path):
    found = compare_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", rows=range(39, 9, -1))])
    assert found.changes(found.rows[0])[0][0] == "+0.000"
    assert any("Differences of b are over the 30 pictures that a was scored on, too;" in note for note in found.notes)


def test_what_cannot_be_compared_is_said_and_not_compared(tmp_path):
    first = make_run(tmp_path / "a")
    others = {
        "pictures": make_run(tmp_path / "b", rows=range(100, 140)),
        "signature": make_run(tmp_path / "c", signature="CIDEr-D|df:2"),
        "weights": make_run(tmp_path / "d", weight=3.0),
    }
    found = {name: compare_runs([first, run]) for name, run in others.items()}
    assert "different pictures" in found["pictures"].notes[0] and not found["pictures"].verdicts
    assert "CIDEr-D is computed differently in a and c" in found["signature"].notes[0]
    assert "rewards of a and d are put together differently" in found["weights"].notes[0]
    changed = {name: [row.name for row in f.rows if row.change[0]] for name, f in found.items()}
    assert changed == {"pictures": [], "signature": ["reward"], "weights": ["cider_d"]}


def test_a_run_without_result_and_one_that_goes_on(tmp_path):
    runs = [make_run(tmp_path / name) for name in "abc"]
    (runs[1] / "summary.json").unlink()
    (runs[2] / "summary.json").unlink()
    (runs[2] / "samples.jsonl").unlink()
    found = compare_runs(runs)
    assert "b is not finished: its captions are those of step 20." in found.notes
    assert "c has no held-out result yet." in found.notes
    assert write_comparison(found, tmp_path / "page.html").is_file()


def test_a_run_that_goes_on_is_compared_where_data_and_rewards_are_the_same(tmp_path):
    """It has not written down yet how it scores; that is no sign of its scoring differently."""
    first = make_run(tmp_path / "a")
    runs = [make_run(tmp_path / "b", gain=0.1), make_run(tmp_path / "c", weight=3.0), make_run(tmp_path / "d")]
    for run in runs:
        (run / "summary.json").unlink()
    (runs[2] / "recipe.yaml").write_text("data: {name: other}")
    found = compare_runs([first, *runs])
    row = next(row for row in found.rows if row.name == "cider_d")
    assert [text for text, _, _ in found.changes(row)] == ["+0.100", "+0.000", "–"]
    row = next(row for row in found.rows if row.name == "reward")
    assert [text for text, _, _ in found.changes(row)] == ["+0.100", "–", "–"]
    assert not any("computed differently" in note for note in found.notes)
    assert "Whether a and d are scored alike is known when both are finished: no comparison." in found.notes


def test_few_pictures_are_no_verdict(tmp_path):
    found = compare_runs([make_run(tmp_path / "a", rows=range(3)), make_run(tmp_path / "b", gain=1.0, rows=range(3))])
    assert [v.state for v in found.verdicts] == ["open"] and "too few pictures" in found.verdicts[0].text
    row = next(row for row in found.rows if row.name == "cider_d")
    assert found.changes(row) == [("+1.000", "", "open")]


def test_only_keys_that_differ_are_shown():
    one = {"seed": 0, "train": {"steps": 5, "lr": 0.1}, "rewards": [{"name": "a"}], "output": {"dir": "x"}}
    two = {
        "seed": 0,
        "train": {"steps": 9, "lr": 0.1},
        "rewards": [{"name": "a"}, {"name": "b"}],
        "output": {"dir": "y"},
    }
    assert different_settings([one, two]) == [("train.steps", ["5", "9"]), ("rewards.1.name", ["–", "b"])]
    assert different_settings([{"a": None}, {"a": False}]) == [("a", ["null", "false"])]


def test_the_command(tmp_path, capsys):
    hostile = "<script>alert(1)</script>[red]"
    runs = [make_run(tmp_path / "runs" / "a"), make_run(tmp_path / "runs" / "b", gain=0.1, seed=7, words=hostile)]
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "b is better than a in CIDEr-D" in said and str(tmp_path / "runs" / "compare.html") in said.replace("\n", "")
    page = (tmp_path / "runs" / "compare.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/webp") == 16  # 8 where they are apart, 8 of the others; each once
    assert "<code>seed</code></th><td>0</td><td>7</td>" in page and "steps</code>" not in page
    assert page.count('class="s0"') == page.count('class="s1"') == 3  # reward, held-out, KL: a line per run
    assert main(["report", str(runs[0])]) == 0 and "CIDEr-D went from 1.000 to 2.000" in capsys.readouterr().out


@pytest.mark.parametrize("names, problem", [(["a"], "expected 2 to 6"), (["a", "a"], "named twice"),
                                            (["a", "absent"], "does not exist")])  # fmt: skip
def test_wrong_input_is_named(tmp_path, capsys, names, problem):
    make_run(tmp_path / "a")
    assert main(["compare", *(str(tmp_path / name) for name in names)]) == 2
    assert problem in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [make_run(tmp_path / name / "run") for name in "ab"]
    assert compare_runs(runs).names == [str(run) for run in runs]

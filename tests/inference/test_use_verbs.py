"""`mmft caption`, and the lines of Python in the README."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from mmft import Captioner, push
from mmft.cli import main
from mmft.hub.folder import read_run
from mmft.recipe import load_recipe
from mmft.training.run import assemble


def test_captions_of_a_folder(photos, trained, capsys, tmp_path):
    assert main(["caption", str(photos), "--model", str(trained), "--json", str(tmp_path / "c.json")]) == 0
    files = [photos / "images" / f"{i}.png" for i in range(8)]
    texts = Captioner(trained).caption(files)
    assert capsys.readouterr().out.splitlines() == [f"{f}: {t}" for f, t in zip(files, texts, strict=True)]
    said = [{"file": str(f), "caption": t} for f, t in zip(files, texts, strict=True)]
    assert json.loads((tmp_path / "c.json").read_text()) == said


def test_merging_what_is_not_there_says_so_in_plain_words(tmp_path, capsys):
    assert main(["merge", "nowhere", str(tmp_path / "out")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_the_code_of_a_model_is_run_only_where_that_is_asked_for(photos, monkeypatch, capsys):
    asked = []

    def made(self, source, *, trust_remote_code, **_):
        asked.append(trust_remote_code)
        raise ValueError("seen")

    monkeypatch.setattr(Captioner, "__init__", made)
    for words in (["caption", str(photos), "--model", "scenes-vlm"], ["evaluate", "scenes-vlm"]):
        assert main(words) == main([*words, "--trust-remote-code"]) == 2
    assert asked == [False, True] * 2


def test_one_bad_picture_among_good_ones(photos, tmp_path, capsys):
    """The bundled model, where none is named; several draws of each."""
    (tmp_path / "bad.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    good = photos / "images" / "1.png"
    words = ["caption", str(tmp_path / "bad.png"), str(good), str(tmp_path / "pipe.png"), "--method", "sample"]
    assert main([*words, "--num", "2", "--json", str(tmp_path / "c.json")]) == 1
    said = capsys.readouterr()
    assert [line.partition(": ")[0] for line in said.out.splitlines()] == [str(good)] * 2
    assert "bad.png is not a picture" in said.err and "pipe.png is a special file" in said.err
    assert ["error" in line for line in json.loads((tmp_path / "c.json").read_text())] == [True, False, False, True]
    assert main(["caption", str(tmp_path / "bad.png"), "https://example.org/a.png"]) == 2
    assert "addresses are not fetched" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["caption", str(tmp_path / "empty")]) == 2 and "holds no pictures" in capsys.readouterr().err


def test_nobody_waits_for_what_captions_do_not_need(photos):
    """A fresh process: PEFT, TRL and their like would take seconds to import."""
    heavy = {"peft", "trl", "datasets", "tensorboard", "bitsandbytes", "deepspeed", "pandas", "sklearn", "matplotlib"}
    code = f"import sys; from mmft.cli import main; code = main(['caption', {str(photos / 'images' / '0.png')!r}]); "
    code += f"print(code, sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    caption, state = done.stdout.splitlines()
    assert state == "0 []" and caption.startswith(str(photos)) and "plus" in caption, done.stderr


def test_a_run_in_python_is_published_like_any_other(trained, tmp_path):
    """Its recipe says what it was made of, and makes the same trainer again."""
    assert push(trained, "ann/scenes", dry_run=tmp_path / "out") == str(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LoRA adapters, rank 16" in card and "scenes-vlm" in card and "cider" in card
    run = read_run(trained)
    assert run.base.kind == "bundled" and run.recipe["data"]["train_rows"] == 8
    recipe = load_recipe(trained / "recipe.yaml", [f"output.dir={tmp_path / 'again'}"])
    again = assemble(recipe)
    assert again.config.learning_rate == 0.02 and again.config.num_generations == 4
    told = json.loads((trained / "summary.json").read_text())["signatures"]
    assert {f"reward {name}": text for name, text in again.signatures().items()}.items() <= told.items()
